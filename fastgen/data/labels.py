"""The numbers of labels: those of an objects.json, or their place in the order of the names."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from fastgen.files.jsonfiles import located
from fastgen.files.names import check_known, read_objects

OBJECTS = "objects.json"


def objects_for(labels: Mapping[str, Iterable[str]], folders: Iterable[Path]) -> dict[str, int]:
    """Label -> index, for `labels`: place in the user's data -> labels. By the first objects.json in `folders`, else sorted.

    InputError, with the place, for a label that objects.json lacks.
    """
    file = next((folder / OBJECTS for folder in folders if os.path.isfile(folder / OBJECTS)), None)
    if file is None:
        names = in_order({label for value in labels.values() for label in value})
        return {name: index for index, name in enumerate(names)}
    objects = read_objects(file)
    for place, value in labels.items():
        with located(place):
            check_known(value, objects)
    return objects


def in_order(labels: Iterable[str]) -> list[str]:
    """Sorted by name; by value where all are numbers, as the classes of Hugging Face's datasets are."""
    names = sorted(labels)
    return sorted(names, key=int) if all(map(str.isdecimal, names)) else names
