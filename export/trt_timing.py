"""TensorRT's timing cache: measured times of kernels on this card, which the next build need not measure again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastgen.engines.trt.cache_files import private_file, read_hashed, write_hashed
from fastgen.engines.trt.platform import Platform
from fastgen.errors import Say


def timing_file(platform: Platform) -> Path:
    """The file of this TensorRT and GPU in the cache folder. Raises InputError when others could write to it."""
    gpu = platform.gpu
    return private_file("timings", f"{platform.version} {gpu.name} {gpu.compute_capability}", ".timing")


def load_timings(config: Any, path: Path, say: Say) -> None:
    """Give a build the timings of earlier ones; where the file is damaged or foreign, `say` gets a line and none are used."""
    data = read_hashed(path, lambda: say(f"{path}: damaged; measuring anew"))
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
        others = config.create_timing_cache(read_hashed(path))
        if others is not None:
            cache.combine(others, False)
        write_hashed(path, bytes(cache.serialize()))
