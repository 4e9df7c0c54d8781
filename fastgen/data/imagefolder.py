"""Hugging Face's imagefolder: images, metadata.jsonl of {"file_name", "text" | "caption" | "prompt" | "labels"}."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fastgen.data.dataset import Dataset, Example, existing, note, nothing_matches
from fastgen.errors import InputError
from fastgen.files.jsonfiles import brief, located, read_jsonl
from fastgen.files.names import check_known, check_labels, check_relative, check_text, read_objects

METADATA, OBJECTS = "metadata.jsonl", "objects.json"
FIELDS = ("text", "caption", "prompt", "labels")  # the first of these that line 1 has is read from every line


def recognise(root: Path) -> bool:
    return any(os.path.isfile(folder / METADATA) for folder in (root, root / "train"))


def read(root: Path) -> Dataset:
    """The images that exist. A row may have several captions. Without objects.json labels are numbered alphabetically."""
    folder = root if os.path.isfile(root / METADATA) else root / "train"
    path = folder / METADATA
    rows = read_jsonl(path)
    field = _field(path, rows)
    values: dict[str, tuple[str, ...]] = {}
    lines: dict[str, int] = {}
    for line, row in rows:
        with located(f"{path}: line {line}"):
            name, value = _row(row, field)
            if name in lines:
                raise InputError(f"file_name {brief(name)} was on line {lines[name]}; list its captions in one row")
            values[name], lines[name] = value, line
    files, others = existing(folder, values)
    if not files:
        raise nothing_matches(path, folder, values, others)
    notes = (
        *note([name for name in values if name not in files], f"images listed in {METADATA} but missing"),
        *note(others, f"images not listed in {METADATA}"),
    )
    pairs = [(name, value) for name, value in values.items() if name in files]
    if field != "labels":
        return Dataset("text", root, tuple(Example(folder / n, v, (), group=n) for n, v in pairs), None, notes)
    examples = tuple(Example(folder / n, (), v, group=n) for n, v in pairs)
    return Dataset("labels", root, examples, _objects(path, values, lines), notes)


def _field(path: Path, rows: list[tuple[int, Any]]) -> str:
    if not rows:
        raise InputError(f'{path}: is empty, expected lines such as {{"file_name": "0.png", "text": "a red dragon"}}')
    line, row = rows[0]
    for field in FIELDS:
        if isinstance(row, dict) and field in row:
            return field
    raise InputError(f"{path}: line {line}: found {brief(row)}, expected file_name and one of {', '.join(FIELDS)}")


def _row(row: Any, field: str) -> tuple[str, tuple[str, ...]]:
    if not isinstance(row, dict) or "file_name" not in row or field not in row:
        raise InputError(f"found {brief(row)}, expected file_name and {field}")
    name = check_relative(row["file_name"], "file_name")
    value = row[field]
    if field == "labels":
        return name, check_labels(value)
    texts = value if isinstance(value, list) and value else [value]
    return name, tuple(check_text(text, field) for text in texts)


def _objects(path: Path, labels: dict[str, tuple[str, ...]], lines: dict[str, int]) -> dict[str, int]:
    folders = (path.parent, path.parent.parent) if path.parent.name == "train" else (path.parent,)
    file = next((folder / OBJECTS for folder in folders if os.path.isfile(folder / OBJECTS)), None)
    if file is None:
        names = sorted({label for value in labels.values() for label in value})
        return {name: index for index, name in enumerate(names)}
    objects = read_objects(file)
    for name, value in labels.items():
        with located(f"{path}: line {lines[name]}"):
            check_known(value, objects)
    return objects
