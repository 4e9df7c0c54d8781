"""Making folders, forcing them to the disk, and writing them complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from fastgen.errors import FastgenError
from fastgen.files.temporary import remove_leftovers, temporary_path


@contextmanager
def new_folder(target: Path, *, existing: Literal["refuse", "replace", "keep"] = "refuse") -> Iterator[Path]:
    """An empty folder beside `target`, which the block fills. At the end of the block it is forced to the disk and renamed to
    `target`: a folder of that name is complete. When the block raises, nothing is left.

    `existing`: what happens to a folder at `target`. "refuse" raises, unless it is empty; "replace" removes it when the new one
    is in its place; "keep" keeps it and drops the new one, as another process wrote the same content. Raises
    FastgenError when the system refuses.
    """
    with scratch_folder(target) as scratch:
        new, old = scratch / "new", scratch / "old"
        new.mkdir()
        yield new
        sync_tree(new)
        if existing == "replace" and target.exists():
            target.rename(old)
        elif existing == "refuse" and target.is_dir():
            target.rmdir()
        try:
            new.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            if existing != "keep" or not target.is_dir():
                raise
        sync_folder(target.parent)


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside `target`, with mode 0700, for the time of the block.

    Those of processes that were killed while they wrote `target` are removed. Raises FastgenError for an OSError, of the block
    too.
    """
    scratch = temporary_path(target)
    try:
        remove_leftovers(target.parent, [target.name])
        scratch.mkdir(mode=0o700, parents=True)
        yield scratch
    except OSError as error:
        raise FastgenError(f"{target}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder and what it holds. Where the process is killed meanwhile, no half of it is left under its name, and
    `remove_leftovers` of the folder above removes the rest. Raises FastgenError when the system refuses."""
    with scratch_folder(folder) as scratch:
        folder.rename(scratch / "old")
        shutil.rmtree(scratch / "old")


def sync_tree(folder: Path) -> None:
    """Force the files below `folder`, and the folders' entries, to the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb+") as stream:
                os.fsync(stream.fileno())
        else:
            sync_folder(file)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Force a folder's entries (its names, not the files' content) to the disk."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents. Raises FastgenError when the system refuses."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FastgenError(f"{folder}: the folder cannot be made: {error.strerror or error}") from None
