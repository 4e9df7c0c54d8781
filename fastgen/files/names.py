"""Checks of names and texts from the user's files: file names, captions, labels, objects."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from fastgen.errors import InputError, unknown
from fastgen.files.jsonfiles import brief, located, read_json

CONTACT_SHEET, GRID, STRIP_SHEET = "contact_sheet.png", "grid.png", "strips.png"
SHEETS = (CONTACT_SHEET, GRID, STRIP_SHEET)  # written beside the images; the last two on request
OTHER_FORMATS = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")  # of images, which fastgen does not write
STRIP_FOLDER = "strips"  # has a strip for each image, under the image's name
SHAPES = ("cube", "sphere", "cylinder")
COLOURS = ("gray", "red", "blue", "green", "brown", "purple", "cyan", "yellow")
ICLEVR_OBJECTS = {f"{colour} {shape}": 8 * i + j for i, shape in enumerate(SHAPES) for j, colour in enumerate(COLOURS)}


def safe_path(out: Path, image_name: str) -> Path:
    """`out / image_name`, after checking that writing there cannot leave `out`.

    InputError for a name that points out of it, and for a symlink, or a file where a folder is needed, below it. `out`
    itself may be a symlink.
    """
    check_image_name(image_name)
    path = Path(out)
    parts = PurePosixPath(image_name).parts
    for depth, part in enumerate(parts, start=1):
        path = path / part
        expected = "file" if depth == len(parts) else "folder"
        kind = _kind_of(path)
        if kind not in (None, expected):
            raise InputError(f"image_name {brief(image_name)}: {path} is a {kind}, expected a {expected}; remove it")
    return path


def _kind_of(path: Path) -> str | None:
    try:
        if path.is_symlink():
            return "symlink"
        if path.is_dir():
            return "folder"
        return "file" if path.exists() else None
    except OSError as error:  # such as a path too long for the file system
        raise InputError(f"{path}: {error.strerror}") from None


def check_image_name(name: object) -> str:
    """`name`, if it is a path that ends in .png and stays below the output folder; else InputError."""
    name = check_relative(name, "image_name", longest=200)  # leaves room for a temporary suffix
    path = PurePosixPath(name)
    if path.suffix.lower() in OTHER_FORMATS:
        right = str(path.with_suffix(".png"))
        raise InputError(f"image_name: found {brief(name)}, and images are PNG files; call it {brief(right)}")
    if not path.name.removesuffix(".png") or not name.endswith(".png"):
        raise InputError(f"image_name: found {brief(name)}, expected a name that ends in .png")
    if name.casefold() == CONTACT_SHEET:
        raise InputError(f"image_name: {CONTACT_SHEET!r} is kept for the overview of all images; choose another name")
    return name


def check_relative(name: object, field: str, longest: int = 255) -> str:
    """`name`, if it is a POSIX path that stays below its folder on every system; else InputError.

    Refused: absolute paths, `.`, `..` and empty parts, backslashes, colons (drives), control characters, parts of more
    than `longest` bytes and paths of more than 1000.
    """
    name = check_text(name, field)
    problem = f"{field}: found {brief(name)}"
    if any(character in "\\:" or unicodedata.category(character) == "Cc" for character in name):
        raise InputError(f"{problem}, expected a name without backslash, colon, NUL or other control characters")
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise InputError(f"{problem}, expected a relative path inside the folder (no leading or double /, no . or ..)")
    if max(len(part.encode()) for part in parts) > longest or len(name.encode()) > 1000:
        raise InputError(f"{problem}, expected at most {longest} bytes per part and 1000 in all")
    return name


def check_text(text: object, field: str) -> str:
    """`text`, if it is a string, not blank, that UTF-8 can encode (a lone surrogate cannot); else InputError."""
    if not isinstance(text, str):
        raise InputError(f"{field}: found {brief(text)}, expected text")
    if not text.strip():
        raise InputError(f"{field}: is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{field}: lone surrogate {text[error.start]!r} at character {error.start}") from None
    return text


def check_device(name: str, field: str = "device") -> str:
    """`name`, if it is a device's: cpu, cuda, cuda:1; whether it is there is another question. Else InputError."""
    if not re.fullmatch(r"cpu(:0)?|cuda(:\d{1,4})?", name, re.ASCII):
        raise InputError(f"{field}: found {brief(name)}, expected cpu, cuda, cuda:1, ...")
    return name


def check_labels(labels: object) -> tuple[str, ...]:
    """`labels` as a tuple, if it is a list of one or more different names; else InputError."""
    if not isinstance(labels, list | tuple) or not labels:
        raise InputError(f"labels: found {brief(labels)}, expected a list of one or more object names")
    names = tuple(check_text(label, "labels") for label in labels)
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InputError(f"labels: {brief(name)} occurs twice")
        seen.add(name)
    return names


def check_known(labels: Iterable[str], objects: Mapping[str, int]) -> None:
    """InputError, with the nearest name, for a label that is not among the objects."""
    for label in labels:
        if label not in objects:
            raise unknown("label", label if len(label) < 80 else label[:80] + "...", objects)


def read_objects(path: str | os.PathLike[str]) -> dict[str, int]:
    """objects.json: {"gray cube": 0, ...}, with the indices of `check_objects`; InputError otherwise."""
    objects = read_json(path)
    with located(path):
        check_objects(objects)
    return objects


def check_objects(objects: object) -> None:
    """InputError unless `objects` maps names to the indices 0 .. n - 1, each used once."""
    if not isinstance(objects, Mapping) or not objects:
        raise InputError(f'found {brief(objects)}, expected {{"gray cube": 0, ...}}')
    used: dict[int, str] = {}
    for name, index in objects.items():
        check_text(name, "object name")
        if type(index) is not int or not 0 <= index < len(objects):
            raise InputError(f"{brief(name)}: found index {brief(index)}, expected 0 to {len(objects) - 1}")
        if index in used:
            raise InputError(f"{brief(name)}: index {index} is that of {brief(used[index])} already")
        used[index] = name
