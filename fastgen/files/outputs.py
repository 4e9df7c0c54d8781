"""Whose file lies at an output path: fastgen never writes over a file that the same kind of command did not write.

What a command writes says so itself: a JSON report in its key `written_by`, a PNG sheet in its text chunk `Software`, a
generated image in its text chunk `fastgen`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from fastgen.errors import InputError
from fastgen.files.folders import make_folder
from fastgen.files.jsonfiles import read_json, write_json
from fastgen.files.png import METADATA_KEY, SOFTWARE_KEY, text_chunk
from fastgen.files.temporary import remove_leftovers

Kind = Literal["image", "job", "score", "compare", "copies", "sweep"]
MARK = "written_by"
# Keys that tell the reports of versions without MARK from other JSON; a sweep's scores have more keys than those of `score`.
OLD_REPORTS: Mapping[Kind, frozenset[str]] = {
    "score": frozenset(("metrics", "num_images", "saving", "made_by", "resized")),
    "compare": frozenset(("psnr_db_mean_of_different", "differs", "pairs", "identical")),
    "copies": frozenset(("index_sha256", "thresholds", "folders", "images")),
    "sweep": frozenset(("metrics", "num_images", "scorer", "manifests")),
}


def software(kind: Kind) -> str:
    """The mark of what a kind of command writes."""
    return f"fastgen {kind}"


def check_output(path: Path, kind: Kind, option: str = "--out") -> None:
    """InputError unless `path` can be written: it is free, or a file that the same kind of command wrote earlier; and the first
    of its folders that exists is a folder in which this user may write."""
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        _check_parents(path, option)
        return
    except (OSError, ValueError) as error:  # such as a name that is too long
        raise InputError(f"{option} {path}: {getattr(error, 'strerror', None) or error}; choose another name") from None
    kinds = {stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFLNK: "a symlink"}
    if not stat.S_ISREG(mode):
        found = kinds.get(stat.S_IFMT(mode), "a pipe or a device")
        raise InputError(f"{option} {path}: is {found}, expected a new file; choose another name")
    if kind_of(path) != kind:
        what = "a generated image" if kind == "image" else f"written by fastgen ({kind})"
        raise InputError(f"{option} {path}: exists and is not {what}; choose another name")
    _check_parents(path, option)


def check_output_folder(out: Path, option: str = "--out") -> None:
    """InputError unless `out` is a folder, or can be made: the first of its parents that exists is a folder."""
    if os.path.lexists(out) and not out.is_dir():
        raise InputError(f"{option} {out}: is not a folder; choose another name")
    _check_parents(out / "x", option)


def kind_of(path: Path) -> Kind | None:
    """The kind of command that wrote a file; None for a file of somebody else."""
    with open(path, "rb") as file:
        start = file.read(8)
    if start == b"\x89PNG\r\n\x1a\n":
        if text_chunk(path, METADATA_KEY) is not None:
            return "image"
        mark: object = text_chunk(path, SOFTWARE_KEY)
    else:
        try:
            value = read_json(path)
        except InputError:
            return None
        if not isinstance(value, dict):
            return None
        mark = value.get(MARK)
        if mark is None:
            kinds = [kind for kind, keys in OLD_REPORTS.items() if keys <= value.keys()]
            return ("sweep" if "sweep" in kinds else kinds[0]) if kinds else None
    return next((kind for kind in Kind.__args__ if mark == software(kind)), None)  # type: ignore[attr-defined]


def write_report(path: Path, kind: Kind, value: Mapping[str, Any]) -> None:
    """Write a JSON report with its mark; its folder is made, and what a killed process left when it wrote this file is removed.
    Raises as `check_output` and `write_json` do."""
    check_output(path, kind)
    make_folder(path.parent)
    remove_leftovers(path.parent, [path.name])
    write_json(path, {MARK: software(kind), **value})


def _check_parents(path: Path, option: str) -> None:
    for folder in path.absolute().parents:
        try:
            mode = os.stat(folder).st_mode
        except FileNotFoundError:
            if not folder.is_symlink():
                continue
            raise InputError(f"{option} {path}: {folder} is a broken symlink; choose another name") from None
        except NotADirectoryError:
            continue
        except OSError as error:
            raise InputError(f"{option} {path}: {folder}: {error.strerror}; choose another name") from None
        if not stat.S_ISDIR(mode):
            raise InputError(f"{option} {path}: {folder} is not a folder; choose another name")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise InputError(f"{option} {path}: {folder} cannot be written to; choose another name")
        return
