"""Hugging Face's imagefolder with metadata: images, and metadata.jsonl, .csv or .parquet with a row per image:
{"file_name": "0.png", "text": "a red dragon"}, or "labels": ["red cube"], or "label": "cat"."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastgen.data.dataset import Dataset, Example, existing, note, nothing_matches
from fastgen.data.folders import SPLITS, TRAIN, other_splits
from fastgen.data.labels import objects_for
from fastgen.data.tables import Row, read_table
from fastgen.errors import InputError
from fastgen.files.jsonfiles import brief, located
from fastgen.files.names import check_labels, check_relative, check_text

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # the first of these in a folder is read
NAME = "file_name"
LABELS, LABEL = "labels", ("label", "class", "class_name")  # a list; one name or number
LISTS = {LABELS: ",", "captions": None}  # columns of lists, and what separates the items in a cell of CSV
FIELDS = ("text", "caption", "captions", "prompt", LABELS, *LABEL, "description")  # the first that row 1 has is read


def recognise(root: Path) -> bool:
    return _metadata(root) is not None


def read(root: Path) -> Dataset:
    """The images that exist. A row may have several captions. Without objects.json labels are numbered alphabetically.

    The metadata lies in `root` or in train/, as one of imagefolder's splits. Its names are relative to its folder; names that
    begin with that folder's own name are read too. Where names in the root begin with train/, those of other splits are left
    out.
    """
    path = _metadata(root)
    assert path is not None
    rows = read_table(path, LISTS)
    field = _field(path, rows)
    values: dict[str, tuple[str, ...]] = {}
    places: dict[str, str] = {}
    for place, row in rows:
        with located(f"{path}: {place}"):
            name, value = _read_row(row, field)
            if name in places:
                raise InputError(f"{NAME} {brief(name)} was on {places[name]}; list its captions in one row")
            values[name], places[name] = value, place
    names = _training(values)
    images, others = _images(root, path, names)
    for name, file, first in _twice(images):
        raise InputError(f"{path}: {places[name]}: {NAME} {brief(name)} means {file}, as {places[first]} does")
    notes = (
        *note([name for name in names if name not in images], f"images listed in {path.name} but missing"),
        *note(others, f"images not listed in {path.name}"),
        *note([n for n in values if n not in names], f"images of other splits left out, those of {TRAIN}/ are read"),
        *other_splits(root, path.parent),
        *note(_unread_files(root, path), f"metadata files not read, {path.relative_to(root).as_posix()} is"),
        *note([f for f in FIELDS if f in rows[0][1] and f != field], f"columns of {path.name} not read, {field} is"),
    )
    if field in (LABELS, *LABEL):
        examples = tuple(Example(file, (), values[name], group=name) for name, file in images.items())
        labels = {f"{path}: {places[name]}": value for name, value in values.items()}
        folders = (path.parent, path.parent.parent) if path.parent.name == TRAIN else (path.parent,)
        return Dataset("labels", root, examples, objects_for(labels, folders), notes)
    examples = tuple(Example(file, values[name], (), group=name) for name, file in images.items())
    return Dataset("text", root, examples, None, notes)


def _files(root: Path) -> list[Path]:
    files = [folder / name for folder in (root, root / TRAIN) for name in METADATA]
    return [file for file in files if os.path.isfile(file)]


def _metadata(root: Path) -> Path | None:
    return next(iter(_files(root)), None)


def _unread_files(root: Path, path: Path) -> list[str]:
    return [file.relative_to(root).as_posix() for file in _files(root) if file != path]


def _field(path: Path, rows: list[Row]) -> str:
    if not rows:
        raise InputError(f'{path}: is empty, expected rows such as {{"{NAME}": "0.png", "text": "a red dragon"}}')
    place, row = rows[0]
    with located(f"{path}: {place}"):
        for field in FIELDS:
            if isinstance(row, dict) and field in row and NAME in row:
                return field
        raise _unfit(row, f"one of {', '.join(FIELDS)}")


def _unfit(row: Any, columns: str) -> InputError:
    found = f"the columns {brief(list(row))}" if isinstance(row, dict) else brief(row)
    return InputError(f"found {found}, expected {NAME} and {columns}")


def _read_row(row: Any, field: str) -> tuple[str, tuple[str, ...]]:
    if not isinstance(row, dict) or NAME not in row or field not in row:
        raise _unfit(row, field)
    name = check_relative(row[NAME], NAME)
    value = row[field]
    if field == LABELS:
        return name, check_labels(value)
    if field in LABEL:
        return name, (check_text(str(value) if type(value) is int else value, field),)
    texts = value if isinstance(value, list) and value else [value]
    return name, tuple(check_text(text, field) for text in texts)


def _training(names: Mapping[str, Any]) -> list[str]:
    """The names without those below the folder of another split, where some are below train/."""
    if not any(name.startswith(f"{TRAIN}/") for name in names):
        return list(names)
    others = tuple(f"{split}/" for split in SPLITS if split != TRAIN)
    return [name for name in names if not name.startswith(others)]


def _images(root: Path, path: Path, names: list[str]) -> tuple[dict[str, Path], list[str]]:
    """(name -> its image, for the names that have one, in their order; images beside these, relative to the root, sorted).

    InputError where no name has an image.
    """
    folder = path.parent
    own = os.path.basename(os.path.abspath(folder)) + "/"
    found, others = _find(folder, {name: name for name in names})
    beside = {folder / name for name in others}
    rest = {name.removeprefix(own): name for name in names if name not in found and name.startswith(own)}
    for base in (folder, *((root,) if folder != root else (root / "images", root / TRAIN))):
        more, unlisted = _find(base, rest)
        if more:
            found |= more
            beside |= {base / name for name in unlisted}
        if found:
            break
        rest = {name: name for name in names}  # relative to a folder that writers of metadata mean as well
    if not found:
        raise nothing_matches(path, folder, names, others)
    unlisted = sorted(file.relative_to(root).as_posix() for file in beside - set(found.values()))
    return {name: found[name] for name in names if name in found}, unlisted


def _find(folder: Path, names: dict[str, str]) -> tuple[dict[str, Path], list[str]]:
    """`names`: path below the folder -> name. (name -> file, where there is one; the images beside them)."""
    files, others = existing(folder, names)
    return {names[file]: folder / file for file in files}, others


def _twice(images: dict[str, Path]) -> list[tuple[str, Path, str]]:
    """(name, file, the first name that means it) for names that mean the file of an earlier name."""
    first: dict[Path, str] = {}
    return [(n, file, first[file]) for n, file in images.items() if first.setdefault(file, n) != n]
