"""Attributes such as body or colour, of which each animation of a training set and each requested image has one value."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastgen.data.dataset import Dataset, note
from fastgen.errors import InputError, unknown
from fastgen.files.jsonfiles import MAX_DATA_BYTES, brief, located, read_json
from fastgen.files.names import check_text

FILE = "attributes.json"
MEAN = "attributes"  # the metric that is the mean over all of them
METRICS = (MEAN, "label_accuracy", "fid", "kid", "clip_t", "clip_i")  # names that an attribute cannot have
SCHEMA = 'expected {"0_main": {"body": "cat", "colour": "red", ...}, ...}'

Attributes = Mapping[str, tuple[str, ...]]  # attribute -> its values, all in the order of an evaluator's outputs


def read_attributes(path: str | os.PathLike[str]) -> dict[str, dict[str, str]]:
    """attributes.json, {"0_main": {"body": "cat", ...}, ...}: key of an animation or a request -> attribute -> value."""
    entries = read_json(path, limit=MAX_DATA_BYTES)
    if not isinstance(entries, dict) or not entries:
        raise InputError(f"{path}: found {brief(entries)}; {SCHEMA}")
    for key, entry in entries.items():
        with located(f"{path}: key {brief(key)}"):
            if not isinstance(entry, dict) or not entry:
                raise InputError(f"found {brief(entry)}; {SCHEMA}")
            for name, value in entry.items():
                _check_name(name)
                check_text(value, name)
    return entries


def check_attributes(value: object) -> dict[str, tuple[str, ...]]:
    """{"body": ["cat", ...], ...} with the values as tuples. InputError unless each attribute has different values."""
    if not isinstance(value, Mapping) or not value:
        raise InputError(f'found {brief(value)}, expected {{"body": ["cat", ...], ...}}')
    for name, values in value.items():
        _check_name(name)
        with located(name):
            if not isinstance(values, list | tuple) or len(set(map(str, values))) < max(1, len(values)):
                raise InputError(f"found {brief(values)}, expected a list of different values")
            for text in values:
                check_text(text, "value")
    return {name: tuple(values) for name, values in value.items()}


def label(attribute: str, value: str) -> str:
    """A value of an attribute as a label, "colour: red"."""
    return f"{attribute}: {value}"


def outputs(attributes: Attributes) -> dict[str, int]:
    """Label -> output of the evaluator."""
    pairs = ((name, value) for name, values in attributes.items() for value in values)
    return {label(*pair): i for i, pair in enumerate(pairs)}


def labels_of(entry: Mapping[str, str], attributes: Attributes) -> tuple[str, ...]:
    """A label for each of `attributes`; others in the entry are ignored. InputError for an unknown or missing value."""
    for name, values in attributes.items():
        if name not in entry:
            raise InputError(f"{name} is missing, found {brief(entry)}")
        if entry[name] not in values:
            raise unknown(name, entry[name], values)
    return tuple(label(name, entry[name]) for name in attributes)


def with_labels(dataset: Dataset) -> Dataset:
    """The dataset with labels for an evaluator to learn: unchanged if it has labels; else with the values in its
    attributes.json in place of captions. InputError where there is no such file, or no entry for an animation."""
    if dataset.kind == "labels":
        return dataset
    path = dataset.root / FILE
    if not path.is_file():
        problem = "holds images with captions; an evaluator learns from labels"
        raise InputError(f"{dataset.root}: {problem}, or from {FILE} with {SCHEMA.removeprefix('expected ')}")
    entries = read_attributes(path)
    check_complete(path, entries, {example.group: None for example in dataset.examples}, "animations")
    attributes = _values(path, entries)
    examples = tuple(
        replace(e, captions=(), descriptions=(), labels=labels_of(entries[e.group], attributes))
        for e in dataset.examples
    )
    return replace(dataset, kind="labels", examples=examples, objects=outputs(attributes), attributes=attributes)


def check_complete(path: Path, entries: Collection[str], keys: Iterable[str], what: str) -> None:
    """InputError that lists the first keys without an entry."""
    if missing := [key for key in keys if key not in entries]:
        raise InputError(f"{path}: {note(missing, f'{what} have no entry')[0]}")


def _values(path: Path, entries: Mapping[str, Mapping[str, str]]) -> dict[str, tuple[str, ...]]:
    """The attributes in the order of the first entry, each with the values that occur, sorted."""
    first_key, first = next(iter(entries.items()))
    for key, entry in entries.items():
        if entry.keys() != first.keys():
            difference = f"key {brief(key)} has {', '.join(entry)}"
            raise InputError(
                f"{path}: {difference}, but {brief(first_key)} {', '.join(first)}: expected the same attributes"
            )
    return {name: tuple(sorted({entry[name] for entry in entries.values()})) for name in first}


def _check_name(name: Any) -> None:
    check_text(name, "attribute")
    if name in METRICS:
        raise InputError(f"attribute {name!r}: this is the name of a metric; choose another")
