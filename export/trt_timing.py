"""TensorRT's timing cache: how long kernels take on this card, so that the next build need not measure them again."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastgen.cachedir import cache_dir, check_private
from fastgen.engines.base_trt import Platform
from fastgen.jsonfiles import write_bytes

DIGEST_BYTES = 32  # a file is the SHA-256 of what follows, then TensorRT's own bytes


def timing_file(platform: Platform) -> Path:
    """The file of this TensorRT and GPU in the cache folder. Raises InputError when others could write to it."""
    folder = cache_dir() / "timings"
    folder.mkdir(mode=0o700, exist_ok=True)
    check_private(folder)
    gpu = platform.gpu
    return folder / (
        re.sub(r"[^\w.]+", "-", f"{platform.trt.__version__} {gpu.name} {gpu.compute_capability}") + ".timing"
    )


def load_timings(config: Any, path: Path, say: Callable[[str], None]) -> None:
    """Give a build the timings of earlier ones; a damaged or foreign file is announced, and timing starts anew."""
    data = _read(path, say)
    cache = config.create_timing_cache(data)
    if cache is None or not config.set_timing_cache(cache, False):
        say(f"{path}: TensorRT does not accept these timings; measuring anew")
        config.set_timing_cache(config.create_timing_cache(b""), False)


def save_timings(config: Any, path: Path) -> None:
    """Store a build's timings together with what other processes stored in the meantime."""
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f"{path.name}.lock")):
        cache = config.get_timing_cache()
        others = config.create_timing_cache(_read(path, lambda line: None))
        if others is not None:
            cache.combine(others, False)
        data = bytes(cache.serialize())
        write_bytes(path, hashlib.sha256(data).digest() + data)


def _read(path: Path, say: Callable[[str], None]) -> bytes:
    """TensorRT's bytes in a file, once their hash has been verified; none of a missing or damaged one."""
    if not path.is_file():
        return b""
    content = path.read_bytes()
    digest, data = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    if hashlib.sha256(data).digest() != digest:
        say(f"{path}: damaged; measuring anew")
        return b""
    return data
