"""Folders: made, and forced to the disk."""

from __future__ import annotations

import os
from pathlib import Path

from fastgen.errors import FastgenError


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
