"""Recognising the format of a folder of training data, and reading it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from fastgen.data import class_folders, iclevr, imagefolder, monsters, sidecars
from fastgen.data.dataset import Dataset
from fastgen.data.folders import folders_in, images_in
from fastgen.errors import InputError

FORMATS = (monsters, iclevr, imagefolder, sidecars, class_folders)
FOLDERS = ("data", "public_data")  # where `find_dataset` looks besides the folder itself
EXPECTED = (
    "train_info.json + train/, train.json + objects.json + iclevr/, metadata.jsonl, .csv or .parquet, "
    "images with a .txt file each, or a folder of images per class"
)


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
    images = images_in(root)
    found = f"; found {len(images):,} images and nothing that describes them" if images else ""
    below = find_dataset(root)
    raise InputError(
        f"{root}: holds no known dataset, expected {EXPECTED}{found}" + (f"; is it {below}?" if below else "")
    )


def find_dataset(start: str | os.PathLike[str]) -> Path | None:
    """The folder with a known dataset: `start`, else its data/ or public_data/, else the only one inside these two.

    In these two anything that `read_dataset` takes is a dataset. `start` may be any folder, such as that of a project, so there
    captions beside images count where they lie in `start`, train/ or images/, and folders of classes in train/ alone. Raises
    InputError, naming them, if these two hold several; None if none.
    """
    start = Path(start)
    near = [start / name for name in FOLDERS]
    for folder in (start, *near):
        if _says_so(folder) or class_folders.lies_in(folder):
            return folder
    inside = [folder / name for folder in near for name in folders_in(folder)]
    # What is described goes before what is only images in folders, which may be anything, or several datasets side by side.
    below = list(filter(_says_so, inside)) or list(filter(_looks_so, inside)) or list(filter(_looks_so, near))[:1]
    if len(below) > 1:
        raise InputError(f"found several datasets: {', '.join(map(str, below))}; choose one with --data")
    return below[0] if below else None


def _says_so(folder: Path) -> bool:
    """Whether files in a folder, or in its folder of images, describe the images."""
    return _complete(folder) or sidecars.lies_in(folder)


def _looks_so(folder: Path) -> bool:
    return sidecars.recognise(folder) or class_folders.recognise(folder)


def _complete(folder: Path) -> bool:
    """Whether a folder has the files of a format that has a file for all, and for the first two the folder of the images."""
    if monsters.recognise(folder):
        return os.path.isdir(folder / monsters.FRAMES)
    if iclevr.recognise(folder):
        return any(os.path.isdir(folder / name) for name in iclevr.FOLDERS[:-1])
    return imagefolder.recognise(folder)
