"""A training set in memory: image files with their captions or labels, and the groups that a split keeps together."""

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
    """One training image with its captions or its labels."""

    image: Path
    captions: tuple[str, ...]
    labels: tuple[str, ...]
    group: str  # name of its animation or scene
    descriptions: tuple[str, ...] = ()  # captions without the action, where the data have these
    subject: str = ""  # name of what a split keeps together, where that is more than the group: a monster's animations


@dataclass(frozen=True)
class Dataset:
    """The examples whose image file exists, in the order of the user's file; `notes` name what was left out."""

    kind: Literal["text", "labels"]
    root: Path
    examples: tuple[Example, ...]
    objects: Mapping[str, int] | None  # label -> index, None for captions
    notes: tuple[str, ...] = ()
    splits_in_file_order: bool = False
    attributes: Mapping[str, tuple[str, ...]] | None = None  # attribute -> values, where the labels are such values

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names, file sizes, captions, labels and objects: the cache key of this data, the same in another folder.
        InputError if an image has disappeared."""
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
    """(train, validation). A subject (a group, where there are no subjects) is in one of them only; the first
    int(number * (1 - validation_fraction)) subjects train, at least one.

    i-CLEVR's are in file order (16,206 of 18,009 images train). In other files neighbours resemble each other, so subjects are
    ordered by SHA-256 of "{seed}:{name}", whatever the file's order. Raises InputError for a fraction outside [0, 1).
    """
    if not 0 <= validation_fraction < 1:
        raise InputError(f"validation fraction: found {validation_fraction}, expected 0 <= fraction < 1")
    owners = [example.subject or example.group for example in dataset.examples]
    groups = list(dict.fromkeys(owners))
    if not dataset.splits_in_file_order:
        groups.sort(key=lambda group: hashlib.sha256(f"{seed}:{group}".encode()).digest())
    first = set(groups[: max(1, int(len(groups) * (1 - validation_fraction)))])
    pairs = list(zip(dataset.examples, owners, strict=True))
    train = tuple(example for example, owner in pairs if owner in first)
    validation = tuple(example for example, owner in pairs if owner not in first)
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

    Each folder that the names mention is scanned once.
    """
    names = set(names)
    files: set[str] = set()
    for parent in {name.rpartition("/")[0] for name in names}:
        if os.path.isdir(folder / parent):
            files.update(f"{parent}/{name}" if parent else name for name in files_in(folder / parent))
    return files & names, sorted(name for name in files - names if name.lower().endswith(IMAGES))


def nothing_matches(path: Path, folder: Path, names: Collection[str], others: Collection[str]) -> InputError:
    """The error for the file `path`, none of whose image `names` is in `folder`; `others`: the images that are there."""
    there = "; ".join(note(others, f"other images are in {folder}")) or f"no image is in {folder}"
    listed = note(names, "are listed")[0]
    return InputError(
        f"no image matches {path}: the first one expected is {folder / next(iter(names))}; {listed}; {there}"
    )


def scene(name: str) -> str:
    """CLEVR_train_002066_0.png -> CLEVR_train_002066; without the extension alone where no number ends the name."""
    return re.sub(r"(?<=[^/])_\d+\Z", "", name.rpartition(".")[0])


def note(names: Collection[str], what: str) -> tuple[str, ...]:
    """A line that counts the names and lists the first ones; no line for no names."""
    if not names:
        return ()
    listed = ", ".join(list(names)[:FIRST]) + (", ..." if len(names) > FIRST else "")
    return (f"{len(names):,} {what}: {listed}",)
