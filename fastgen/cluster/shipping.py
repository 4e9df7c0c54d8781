"""Folders and files that travel to the machines of a cluster: once to each, and checked there."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgen.errors import FastgenError, InputError
from fastgen.files.cachedir import cache_folder
from fastgen.files.folders import new_folder
from fastgen.files.hashes import sha256_file, sha256_names

CACHE = "cluster"  # in the cache folder of a machine
BLOCK = 2**26  # bytes of a file that travel as one object
UNUSED_DAYS = 30  # after which a folder is removed

Put = Callable[[bytes], Any]  # bytes -> a reference to them
Get = Callable[[Any], bytes]


@dataclass(frozen=True)
class ShippedFile:
    """A file on its way: its path in the folder, SHA-256, and references to its blocks."""

    name: str
    sha256: str
    blocks: tuple[Any, ...]


@dataclass(frozen=True)
class Shipment:
    """A folder, or a single file, on its way. `digest`: SHA-256 over its name, and the names and hashes of its files."""

    name: str
    digest: str
    files: tuple[ShippedFile, ...]
    single: bool


def ship(path: Path, put: Put) -> Shipment:
    """Give every file of `path`, a folder or a file, to `put`. Links travel as what they point to. Raises InputError for what
    cannot be read."""
    single = path.is_file()
    path = path.absolute() if single else path.resolve()  # a linked file keeps the link's name, `..` is a folder's own
    files = [path] if single else sorted(_files(path))
    if not files:
        raise InputError(f"{path}: is an empty folder, or none")
    shipped = [_shipped(file, file.name if single else file.relative_to(path).as_posix(), put) for file in files]
    hashes = {f"{path.name}/{file.name}": file.sha256 for file in shipped}
    return Shipment(path.name, sha256_names(hashes), tuple(shipped), single)


def _shipped(file: Path, name: str, put: Put) -> ShippedFile:
    """A file under this name, given to `put` block by block."""
    digest, blocks = hashlib.sha256(), []
    try:
        with open(file, "rb") as stream:
            while block := stream.read(BLOCK):
                digest.update(block)
                blocks.append(put(block))
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    return ShippedFile(name, digest.hexdigest(), tuple(blocks))


def _files(folder: Path) -> Iterator[Path]:
    """The files below a folder; hidden ones, such as those that are being written, stay behind."""
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def unpack(shipment: Shipment, get: Get) -> Path:
    """The folder or file on this machine, in the cache folder: what is there already is used again, and every file's hash is
    checked. Raises FastgenError for one that arrived damaged, and where the cache cannot be written."""
    from filelock import FileLock

    parent = cache_folder(CACHE)
    folder = parent / shipment.digest
    with FileLock(parent / f"{shipment.digest}.lock"):  # the workers of this machine want the same files
        if not folder.is_dir():
            _remove_unused(parent)
            with new_folder(folder, existing="keep") as new:
                for file in shipment.files:
                    target = new / shipment.name / file.name if not shipment.single else new / file.name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    _write(target, file, get)
        _check(folder, shipment)
        os.utime(folder)
    return folder / shipment.name


def _write(target: Path, file: ShippedFile, get: Get) -> None:
    digest = hashlib.sha256()
    with open(target, "wb") as stream:
        for block in file.blocks:
            data = get(block)
            digest.update(data)
            stream.write(data)
    if digest.hexdigest() != file.sha256:
        raise FastgenError(f"{file.name}: arrived damaged: its SHA-256 is not that of the file that was sent")


def _check(folder: Path, shipment: Shipment) -> None:
    """What an earlier job left may have been changed since."""
    for file in shipment.files:
        path = folder / shipment.name / file.name if not shipment.single else folder / file.name
        if not path.is_file() or sha256_file(path) != file.sha256:
            raise FastgenError(f"{path}: was changed after it arrived; delete {folder}")


def _remove_unused(parent: Path) -> None:
    """Remove folders that no job has used for a month."""
    oldest = time.time() - 86_400 * UNUSED_DAYS
    for folder in parent.iterdir():
        with suppress(OSError):  # another process removes it too
            if folder.stat().st_mtime < oldest:
                shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
