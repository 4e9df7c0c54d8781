"""The i-CLEVR task: train.json {"CLEVR_train_002066_0.png": ["cyan cube"]}, objects.json, images in one folder."""

from __future__ import annotations

import os
from pathlib import Path

from fastgen.data.dataset import Dataset, Example, existing, note, nothing_matches, scene
from fastgen.errors import InputError
from fastgen.files.jsonfiles import MAX_DATA_BYTES, brief, located, read_json
from fastgen.files.names import check_known, check_labels, check_relative, read_objects

LABELS, OBJECTS = "train.json", "objects.json"
FOLDERS = ("iclevr", "images", ".")


def recognise(root: Path) -> bool:
    return os.path.isfile(root / LABELS) and os.path.isfile(root / OBJECTS)


def read(root: Path) -> Dataset:
    """The images of train.json that exist, from the first of iclevr/, images/ and the root that has any."""
    objects = read_objects(root / OBJECTS)
    path = root / LABELS
    content = read_json(path, limit=MAX_DATA_BYTES)
    if not isinstance(content, dict) or not content:
        raise InputError(f'{path}: found {brief(content)}, expected {{"CLEVR_train_002066_0.png": ["cyan cube"], ...}}')
    labels = {}
    for name, value in content.items():
        with located(f"{path}: key {brief(name)}"):
            check_relative(name, "image name")
            labels[name] = check_labels(value)
            check_known(labels[name], objects)
    folder, files, others = _images(root, list(labels))
    if not files:
        raise nothing_matches(path, folder, labels, others)
    examples = tuple(Example(folder / name, (), labels[name], scene(name)) for name in labels if name in files)
    notes = (
        *note([name for name in labels if name not in files], f"images listed in {LABELS} but missing"),
        *note(others, f"images not listed in {LABELS}"),
    )
    return Dataset("labels", root, examples, objects, notes, splits_in_file_order=True)


def _images(root: Path, names: list[str]) -> tuple[Path, set[str], list[str]]:
    """(the first folder with any of `names`, else the first that exists; those of `names` in it; the other images in it)."""
    folders = [folder for name in FOLDERS if (folder := root / name).is_dir()]
    for folder in folders:
        files, others = existing(folder, names)
        if files:
            return folder, files, others
    return folders[0], set(), existing(folders[0], names)[1]
