"""SHA-256 of files, and records of a folder's files that show later whether a file has changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastgen.errors import InputError


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


def check_file(path: Path, expected: Mapping[str, Any], record: str, remedy: str, *, content: bool = True) -> None:
    """InputError when a file is missing, or differs from what `record_files` wrote of it into the file called `record`.

    `remedy`: what the user can do. `content`: compare the hash too, not only the size.
    """
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            problem = f"{size} bytes, {record} says {expected['bytes']}: truncated or replaced"
            raise InputError(f"{path}: {problem}; {remedy}")
        if content and sha256_file(path) != expected["sha256"]:
            raise InputError(f"{path}: sha256 differs from {record}: altered or damaged; {remedy}")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; {remedy}") from None
