"""Folders of images without a file that describes them all: what lies in them, and which of them are something else."""

from __future__ import annotations

import os
from pathlib import Path

from fastgen.data.dataset import IMAGES, files_in, note
from fastgen.errors import InputError

TRAIN = "train"
SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")
# Files that say that a folder is no folder of training images: a folder that fastgen wrote, or a project.
WRITTEN = ("job.json", "manifest.jsonl", "contact_sheet.png", "sweep.json", "training.json", "model_index.json")
OTHERS = frozenset((*WRITTEN, "bundle.json", "pyproject.toml", "setup.py", "package.json"))


def is_image(name: str) -> bool:
    return name.lower().endswith(IMAGES) and not name.startswith(".")


def images_in(folder: Path) -> list[str]:
    """Names of the images in a folder, sorted; none where there is no such folder, or where it is something else."""
    files = files_in(folder) if os.path.isdir(folder) else set()
    return sorted(filter(is_image, files)) if OTHERS.isdisjoint(files) else []


def folders_in(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted, without those of tools (.cache, __MACOSX); none where there is no such folder.
    InputError if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith((".", "__")))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputError(f"{folder}: cannot be read as a folder: {error.strerror}") from None


def other_splits(root: Path, base: Path) -> tuple[str, ...]:
    """A note of the folders of other splits beside `base`, the folder train/ of `root`; no line for another `base`."""
    if base != root / TRAIN:
        return ()
    others = [name for name in folders_in(root) if name.lower() in SPLITS and name != TRAIN]
    return note([f"{name}/" for name in others], f"folders of other splits left out, {TRAIN}/ is read")
