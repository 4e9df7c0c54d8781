"""Captions in files beside the images, as kohya-ss and other trainers read them: 0.jpg and 0.txt (or 0.caption)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fastgen.data.dataset import Dataset, Example, files_in, note
from fastgen.data.folders import SPLITS, TRAIN, folders_in, images_in, is_image
from fastgen.errors import InputError
from fastgen.files.jsonfiles import located, read_text
from fastgen.files.names import check_text

CAPTIONS = (".txt", ".caption")  # the first of these that an image has is read
# The images lie in the root or in one of these; or in folders in there, such as kohya-ss's 10_dragon/.
BASES = (TRAIN, "images", "img")
APART = (*SPLITS, *BASES)  # a folder of such a name in the root is read as the base, or not at all
_REPEATS = re.compile(r"[0-9]+_.+")


class _Files(NamedTuple):
    """Names of the files in a folder, by what they are."""

    pairs: list[tuple[str, str]]  # (image, its caption file)
    alone: list[str]  # images without
    unread: list[str]  # further caption files of an image
    other: list[str]


def recognise(root: Path) -> bool:
    return _base(root) is not None


def lies_in(root: Path) -> bool:
    """Whether an image with a caption lies in the root or one of BASES, not deeper: that is no accident in any folder."""
    return any(_files(folder).pairs for folder in (root, *(root / name for name in BASES)))


def read(root: Path) -> Dataset:
    """The images with a caption, sorted by name. Each line of a caption file that is not blank is a caption."""
    base = _base(root)
    assert base is not None
    folders = list(_folders(root, base))
    files = {f"{folder.relative_to(root).as_posix()}/".removeprefix("./"): _files(folder) for folder in folders}
    examples = tuple(
        Example(root / prefix / image, _captions(root / prefix / captions), (), group=prefix + _stem(image))
        for prefix, found in files.items()
        for image, captions in found.pairs
    )
    repeats = [folder.name for folder in folders if folder != base and _REPEATS.fullmatch(folder.name)]
    notes = (
        *note([p + name for p in files for name in files[p].alone], "images without a caption file left out"),
        *note(
            [p + name for p in files for name in files[p].unread], "caption files left out, the image has another one"
        ),
        *note([p + name for p in files for name in files[p].other], "files that are no image and no image's caption"),
        *note(list(_left_out(root, base, folders)), "folders left out"),
        *note(repeats, "folders named after a number of repeats, each image is read once"),
    )
    return Dataset("text", root, examples, None, notes)


def _base(root: Path) -> Path | None:
    """The root, or the first of BASES, that holds an image with a caption, itself or in a folder in it."""
    for base in (root, *(root / name for name in BASES)):
        if any(_files(folder).pairs for folder in _folders(root, base)):
            return base
    return None


def _folders(root: Path, base: Path) -> Iterator[Path]:
    """`base`, and the folders in it that hold images."""
    yield base
    for name in folders_in(base):
        if (base != root or name not in APART) and images_in(base / name):
            yield base / name


def _left_out(root: Path, base: Path, folders: list[Path]) -> Iterator[str]:
    """The folders that may hold images of the dataset, but are not read: splits, and those below the ones that are read."""
    for name in folders_in(root):
        if name in APART and root / name != base and images_in(root / name):
            yield f"{name}/"
    for folder in folders:
        if folder != base:
            yield from (f"{(folder / name).relative_to(root).as_posix()}/" for name in folders_in(folder))


def _files(folder: Path) -> _Files:
    names = sorted(files_in(folder)) if os.path.isdir(folder) else []
    images = images_in(folder)
    captions = [name for ending in CAPTIONS for name in names if name.lower().endswith(ending)]
    first = {_stem(name): name for name in reversed(captions)}
    stems = {_stem(image) for image in images}
    read = {first[stem] for stem in stems & first.keys()}
    unread = [name for name in captions if _stem(name) in stems and name not in read]
    known = {*read, *unread}
    return _Files(
        pairs=[(image, first[_stem(image)]) for image in images if _stem(image) in first],
        alone=[image for image in images if _stem(image) not in first],
        unread=unread,
        other=[name for name in names if not (name in known or is_image(name) or name.startswith("."))],
    )


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _captions(path: Path) -> tuple[str, ...]:
    lines = [line.strip() for line in re.split(r"\r\n|\r|\n", read_text(path, "a text file"))]
    with located(path):
        captions = tuple(check_text(line, "caption") for line in lines if line)
        if not captions:
            raise InputError("is empty, expected a caption on each line")
    return captions
