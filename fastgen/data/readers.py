"""Recognising the format of a folder of training data, and reading it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from fastgen.data import iclevr, imagefolder, monsters
from fastgen.data.dataset import Dataset
from fastgen.errors import InputError

FORMATS = (monsters, iclevr, imagefolder)
FOLDERS = ("data", "public_data")  # where `find_dataset` looks besides the folder itself
EXPECTED = "train_info.json + train/, train.json + objects.json + iclevr/, or metadata.jsonl"


def read_dataset(root: str | os.PathLike[str], *, limit: int | None = None) -> Dataset:
    """The dataset in `root`, or its first `limit` examples; InputError for another folder or a file with a wrong entry."""
    root = Path(root)
    if limit is not None and limit < 1:
        raise InputError(f"limit: found {limit}, expected at least 1")
    for format_ in FORMATS:
        if format_.recognise(root):
            dataset = format_.read(root)
            return dataset if limit is None else replace(dataset, examples=dataset.examples[:limit])
    if not root.is_dir():
        raise InputError(f"{root}: is no folder, expected one with {EXPECTED}")
    below = find_dataset(root)
    raise InputError(f"{root}: holds no known dataset, expected {EXPECTED}" + (f"; is it {below}?" if below else ""))


def find_dataset(start: str | os.PathLike[str]) -> Path | None:
    """The folder with a known dataset: `start`, else its data/ or public_data/, else the only one inside these two.

    Raises InputError, naming them, if these two hold several; None if none.
    """
    start = Path(start)
    near = [start, *(start / name for name in FOLDERS)]
    for folder in near:
        if _complete(folder):
            return folder
    below = [child for folder in near[1:] for child in _folders_in(folder) if _complete(child)]
    if len(below) > 1:
        raise InputError(f"found several datasets: {', '.join(map(str, below))}; choose one with --data")
    return below[0] if below else None


def _folders_in(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(entry.path) for entry in entries if entry.is_dir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"{folder}: cannot be read as a folder: {error.strerror}") from None


def _complete(folder: Path) -> bool:
    """Whether a folder has the files of a known format, and for the first two the folder of their images."""
    if monsters.recognise(folder):
        return os.path.isdir(folder / monsters.FRAMES)
    if iclevr.recognise(folder):
        return any(os.path.isdir(folder / name) for name in iclevr.FOLDERS[:-1])
    return imagefolder.recognise(folder)
