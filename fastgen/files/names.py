"""Checks of names and texts from the user's files: file names, captions, labels, objects."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from fastgen.errors import InputError, unknown
from fastgen.files.jsonfiles import brief, located, read_json
from fastgen.files.temporary import is_temporary

CONTACT_SHEET, GRID, STRIP_SHEET = "contact_sheet.png", "grid.png", "strips.png"
SHEETS = (CONTACT_SHEET, GRID, STRIP_SHEET)  # written beside the images; the last two on request
OTHER_FORMATS = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")  # of images, which fastgen does not write
STRIP_FOLDER = "strips"  # has a strip for each image, under the image's name
JOB, MANIFEST = "job.json", "manifest.jsonl"
MERGE_LOCK = ".merge.lock"  # which older versions made
PART_NAME = re.compile(r"shard-\d+-of-\d+\.json")
_FORBIDDEN = re.compile(r"[\\:\x00-\x1f\x7f-\x9f]")
_END = re.compile(r"(?<=[^/. ])[. ]+(?=/|\Z)")
KEPT = frozenset((*SHEETS, STRIP_FOLDER, JOB, MANIFEST, MERGE_LOCK, "score.json", "copies.json"))
SHAPES = ("cube", "sphere", "cylinder")
MAX_TEXT = 100_000  # characters of a prompt, caption, label or name
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
    if name.lower().endswith(OTHER_FORMATS):
        right = str(PurePosixPath(name).with_suffix(".png"))
        raise InputError(f"image_name: found {brief(name)}, and images are PNG files; call it {brief(right)}")
    if not name.endswith(".png") or name.endswith("/.png") or name == ".png":
        raise InputError(f"image_name: found {brief(name)}, expected a name that ends in .png")
    if folded(name) == CONTACT_SHEET:
        raise InputError(f"image_name: {CONTACT_SHEET!r} is kept for the overview of all images; choose another name")
    return name


def check_unreserved(name: str) -> None:
    """InputError for an image name whose first part is a file or folder that a job itself writes beside its images, or whose
    parts look like temporary files; names are compared as `folded`."""
    first, *_ = parts = folded(name).split("/")
    if first in KEPT or PART_NAME.fullmatch(first):
        raise InputError(
            f"image_name: found {brief(name)}, but {brief(first)} is kept for what a job writes; rename it"
        )
    if any(map(is_temporary, parts)):
        raise InputError(f"image_name: found {brief(name)}, which looks like a temporary file of fastgen; rename it")


def folded(name: str) -> str:
    """The form in which file systems may take two names for one: without case, composed, without characters that cannot be
    seen, and without dots and spaces at the end of a part."""
    if not name.isascii():
        name = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
        name = "".join(character for character in name if unicodedata.category(character) != "Cf")
    return _END.sub("", name.lower())


def check_relative(name: object, field: str, longest: int = 255) -> str:
    """`name`, if it is a POSIX path that stays below its folder on every system; else InputError.

    Refused: absolute paths, `.`, `..` and empty parts, backslashes, colons (drives), control characters, parts of more
    than `longest` bytes and paths of more than 1000.
    """
    name = check_text(name, field)
    if _FORBIDDEN.search(name):
        raise InputError(
            f"{field}: found {brief(name)}, expected a name without backslash, colon, NUL or other control characters"
        )
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise InputError(
            f"{field}: found {brief(name)}, expected a relative path inside the folder (no leading or double /, no . or ..)"
        )
    if len(name.encode()) > 1000 or (len(name) * 4 > longest and max(len(part.encode()) for part in parts) > longest):
        raise InputError(f"{field}: found {brief(name)}, expected at most {longest} bytes per part and 1000 in all")
    return name


def check_text(text: object, field: str) -> str:
    """`text`, if it is a string, not blank, that UTF-8 can encode (a lone surrogate cannot); else InputError."""
    if not isinstance(text, str):
        raise InputError(f"{field}: found {brief(text)}, expected text")
    if not text.strip():
        raise InputError(f"{field}: is empty")
    if len(text) > MAX_TEXT or "\0" in text:
        found = f"{len(text):,} characters" if len(text) > MAX_TEXT else "the character NUL"
        raise InputError(f"{field}: found {found}, expected at most {MAX_TEXT:,} characters, none of them NUL")
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
        found = brief(list(labels) if isinstance(labels, tuple) else labels)
        raise InputError(f"labels: found {found}, expected a list of one or more object names")
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
