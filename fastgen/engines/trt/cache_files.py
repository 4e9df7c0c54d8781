"""Small files in the cache folder that TensorRT fills: each is the SHA-256 of what follows, then TensorRT's own bytes."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

from fastgen.files.cachedir import cache_folder, check_private
from fastgen.files.jsonfiles import write_bytes

DIGEST_BYTES = 32


def private_file(folder: str, name: str, suffix: str) -> Path:
    """`<cache>/<folder>/<name><suffix>`; characters that file systems refuse become "-". Raises InputError when others could
    write to it or to the folder."""
    path = cache_folder(folder) / (re.sub(r"[^\w.]+", "-", name) + suffix)
    if os.path.lexists(path):
        check_private(path, file=True)
    return path


def read_hashed(path: Path, damaged: Callable[[], None] = lambda: None) -> bytes:
    """TensorRT's bytes in a file, after verifying their hash. Empty for a missing file, and for a damaged one, which calls
    `damaged()`."""
    if not path.is_file():
        return b""
    content = path.read_bytes()
    digest, data = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    if hashlib.sha256(data).digest() != digest:
        damaged()
        return b""
    return data


def write_hashed(path: Path, data: bytes) -> None:
    """Write TensorRT's bytes and their hash: all of it or nothing."""
    write_bytes(path, hashlib.sha256(data).digest() + data)
    path.chmod(0o600)
