"""Files that list label sets of i-CLEVR's 24 objects, and fingerprints of such sets.

A fingerprint is the first 16 hex digits of SHA-256 over the sorted labels joined by ",", in UTF-8. A list of fingerprints keeps
label sets out of training data where the file of the sets themselves must not be published.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

from fastgen.data.synthetic.scenes import SLOTS
from fastgen.errors import InputError, unknown
from fastgen.files.jsonfiles import brief, read_json, read_text
from fastgen.files.names import ICLEVR_OBJECTS

REFERENCE = "reference"  # the name of the list in HELD_OUT
HELD_OUT = Path(__file__).with_name("held_out.txt")

Labels = tuple[str, ...]
LabelSet = frozenset[str]


def all_label_sets() -> Iterator[Labels]:
    """Every set of one to three objects, each in the order of ICLEVR_OBJECTS: 2,324 of them."""
    return (labels for k in range(1, SLOTS + 1) for labels in combinations(ICLEVR_OBJECTS, k))


def fingerprint(labels: Iterable[str]) -> str:
    """16 hex digits that name a label set, whatever the order of its labels."""
    return hashlib.sha256(",".join(sorted(labels)).encode()).hexdigest()[:16]


def read_held_out(source: Path | str) -> list[LabelSet]:
    """The label sets of a request file, of a .txt file of fingerprints, or of "reference", the list in HELD_OUT.

    Raises InputError with file and row or line.
    """
    if str(source) == REFERENCE:
        return _read_fingerprints(HELD_OUT)
    path = Path(source)
    if path.suffix.lower() == ".txt":
        return _read_fingerprints(path)
    return [frozenset(labels) for labels in _read_requests(path)]


def read_train(path: Path, count: int) -> dict[str, Labels]:
    """The first `count` entries {file name: labels} of a train.json. Raises InputError with file and entry."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(
            f'{path} holds a JSON {type(content).__name__}, expected {{"<file>.png": ["red cube", ...], ...}}'
        )
    for name in content:
        if Path(name).name != name or not name.endswith(".png") or "\\" in name:
            raise InputError(f"{path}: {brief(name)} is not a plain .png file name")
    return {name: _labels(f"{path}: {name!r}", labels) for name, labels in list(content.items())[:count]}


def _read_fingerprints(path: Path) -> list[LabelSet]:
    known = {fingerprint(labels): frozenset(labels) for labels in all_label_sets()}
    lines = read_text(path, "a file of fingerprints").splitlines()
    label_sets = []
    for number, line in enumerate(lines, 1):
        word = line.partition("#")[0].strip().lower()
        if word and word not in known:
            raise InputError(
                f"{path}: line {number}: {brief(word)} is not the fingerprint of 1 to {SLOTS} of the 24 objects"
            )
        if word:
            label_sets.append(known[word])
    return label_sets


def _read_requests(path: Path) -> list[Labels]:
    content = read_json(path)
    if not isinstance(content, list):
        raise InputError(
            f'{path} holds a JSON {type(content).__name__}, expected a list of label lists, [["red cube"], ...]'
        )
    return [_labels(f"{path}: row {i}", labels) for i, labels in enumerate(content)]


def _labels(where: str, labels: Any) -> Labels:
    if not isinstance(labels, list) or not 1 <= len(labels) <= SLOTS:
        raise InputError(f"{where} is {brief(labels)}, expected a list of 1 to {SLOTS} labels")
    for label in labels:
        if not isinstance(label, str) or label not in ICLEVR_OBJECTS:
            raise InputError(f"{where}: {unknown('object', str(label), ICLEVR_OBJECTS)}")
    return tuple(labels)
