"""SHA-256 of files, and records of a folder's files that show later whether a file has changed."""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastgen.errors import InputError
from fastgen.files.records import Bytes, Record, Sha256


class FileRecord(Record, frozen=True):
    """Size and hash of a file, as `record_files` writes them."""

    bytes: Bytes
    sha256: Sha256


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_names(hashes: Mapping[str, str]) -> str:
    """Hex SHA-256 over names and the hashes of their files, in the order given."""
    digest = hashlib.sha256()
    for name, sha256 in hashes.items():
        digest.update(f"{name}\0{sha256}\n".encode())
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a JSON value, as `json.dumps` writes it by default."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def record_files(folder: Path) -> dict[str, dict[str, Any]]:
    """{"bytes": size, "sha256": hex} of every file below `folder`, by its relative path, sorted."""
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    return {f.relative_to(folder).as_posix(): {"bytes": f.stat().st_size, "sha256": sha256_file(f)} for f in files}


def check_file(path: Path, expected: FileRecord, record: str, remedy: str, *, content: bool = True) -> None:
    """InputError when a file is missing, is no regular file, or differs from what the file called `record` says of it.

    `remedy`: what the user can do. `content`: compare the hash too, not only the size.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path}: is no file, but {record} lists it; {remedy}")
        if status.st_size != expected.bytes:
            problem = f"{status.st_size} bytes, {record} says {expected.bytes}: truncated or replaced"
            raise InputError(f"{path}: {problem}; {remedy}")
        if content and sha256_file(path) != expected.sha256:
            raise InputError(f"{path}: sha256 differs from {record}: altered or damaged; {remedy}")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; {remedy}") from None


def check_inside(path: Path, folder: Path) -> None:
    """InputError where a symlink on the way leads a path below `folder` out of it."""
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError) as error:  # RuntimeError: a circle of links
        raise InputError(f"{path}: cannot be resolved: {error}") from None
    if not inside:
        raise InputError(f"{path}: is a symlink that leaves {folder}; put a copy of the file in its place")
