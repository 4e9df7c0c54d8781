"""A training set in memory: which image file has which captions or labels, and what a split must keep together."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from fastgen.errors import InputError

FIRST = 10  # how many names a note lists
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


@dataclass(frozen=True)
class Example:
    """One training image with its captions (text family) or labels (label family)."""

    image: Path
    captions: tuple[str, ...]
    labels: tuple[str, ...]
    group: str  # frames of an animation, images of a scene
    descriptions: tuple[str, ...] = ()  # the captions without the action, where the data have them apart
    subject: str = ""  # what a split keeps together, where that is more than the group: a monster's animations


@dataclass(frozen=True)
class Dataset:
    """The examples whose image file exists, in the order of the user's file; `notes` say what was left out."""

    kind: Literal["text", "labels"]
    root: Path
    examples: tuple[Example, ...]
    objects: Mapping[str, int] | None  # label -> index, None for captions
    notes: tuple[str, ...] = ()
    splits_in_file_order: bool = False
    attributes: Mapping[str, tuple[str, ...]] | None = None  # where labels are values of these, one of each

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names, file sizes, captions, labels and objects: the key of a cache of this data.

        It survives a copy to another folder. InputError if an image has disappeared.
        """
        digest = hashlib.sha256(repr((self.kind, sorted((self.objects or {}).items()))).encode())
        for example in self.examples:
            try:
                size = os.stat(example.image).st_size
            except OSError as error:
                raise InputError(f"{example.image}: {error.strerror}; read the dataset again") from None
            name = example.image.relative_to(self.root).as_posix()
            digest.update(repr((name, size, example.captions, example.labels)).encode("utf-8", "backslashreplace"))
        return digest.hexdigest()


def split(dataset: Dataset, validation_fraction: float = 0.1, seed: int = 0) -> tuple[Dataset, Dataset]:
    """(train, validation), never with one subject (one group, where there is no subject) in both; of these,
    int(their number * (1 - validation_fraction)) train, at least one.

    i-CLEVR trains on the first groups in file order (16,206 of 18,009 images). In other files neighbours resemble each
    other, so they are ordered by SHA-256 of "{seed}:{name}", which does not change when the file is reordered.
    """
    if not 0 <= validation_fraction < 1:
        raise InputError(f"validation fraction: found {validation_fraction}, expected 0 <= fraction < 1")
    owners = [example.subject or example.group for example in dataset.examples]
    groups = list(dict.fromkeys(owners))
    if not dataset.splits_in_file_order:
        groups.sort(key=lambda group: hashlib.sha256(f"{seed}:{group}".encode()).digest())
    chosen = set(groups[: max(1, int(len(groups) * (1 - validation_fraction)))])
    pairs = list(zip(dataset.examples, owners, strict=True))
    train = tuple(example for example, owner in pairs if owner in chosen)
    validation = tuple(example for example, owner in pairs if owner not in chosen)
    return replace(dataset, examples=train), replace(dataset, examples=validation)


def files_in(folder: Path) -> set[str]:
    """Names of the files in a folder (links to files too), from one scan; InputError if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except OSError as error:
        raise InputError(f"{folder}: cannot be read as a folder: {error.strerror}") from None


def existing(folder: Path, names: Iterable[str]) -> tuple[set[str], list[str]]:
    """(those of `names`, POSIX paths below `folder`, that are files; the images beside them that are not named, sorted).

    Costs one scan for every folder that the names mention.
    """
    names = set(names)
    found: set[str] = set()
    for parent in {name.rpartition("/")[0] for name in names}:
        if os.path.isdir(folder / parent):
            found.update(f"{parent}/{name}" if parent else name for name in files_in(folder / parent))
    others = [name for name in found - names if name.lower().endswith(IMAGES)]
    return found & names, sorted(others)


def nothing_matches(path: Path, folder: Path, names: Collection[str], others: Collection[str]) -> InputError:
    """The error for a file that names images none of which lies in `folder`: counts, and the first of either side."""
    there = "; ".join(note(others, f"other images are in {folder}")) or f"no image is in {folder}"
    listed = note(names, "are listed")[0]
    return InputError(
        f"no image matches {path}: the first one expected is {folder / next(iter(names))}; {listed}; {there}"
    )


def scene(name: str) -> str:
    """What CLEVR_train_002066_0.png, _1 and _2 have in common; the name itself where no number ends it."""
    stem = name.rpartition(".")[0]
    return re.sub(r"(?<=[^/])_\d+\Z", "", stem)


def note(names: Collection[str], what: str) -> tuple[str, ...]:
    """One line that counts the names and lists the first; none for no names."""
    if not names:
        return ()
    listed = ", ".join(list(names)[:FIRST]) + (", ..." if len(names) > FIRST else "")
    return (f"{len(names):,} {what}: {listed}",)
