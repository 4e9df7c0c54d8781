"""The cache folder, of what can be computed again: encoded training data, compiled engines."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

from fastgen.errors import InputError
from fastgen.files.jsonfiles import brief

VARIABLE = "FASTGEN_CACHE"
HINT = f"set {VARIABLE} to a folder of yours"


def cache_dir() -> Path:
    """`$FASTGEN_CACHE`, else `fastgen` in the user's cache folder; created with mode 0700.

    Raises InputError when it cannot be created, or when other users could write to it: its content is trusted.
    """
    given = os.environ.get(VARIABLE)
    if given == "":
        raise InputError(f"{VARIABLE}: is empty, expected a folder; unset it for {_user_cache() / 'fastgen'}")
    folder = _user_cache() / "fastgen" if given is None else Path(given)
    _make(folder)
    _check(folder, os.stat(folder), stat.S_IFDIR)  # the user may have put a link in its place
    return folder


def cache_folder(*names: str) -> Path:
    """The folder of these names below the cache folder, created with mode 0700.

    Raises InputError as `cache_dir` does, for every folder on the way: for a link too, and for a file in a folder's place.
    """
    folder = cache_dir()
    for name in names:
        folder = folder / name
        _make(folder)
        check_private(folder)
    return folder


def check_private(path: Path, *, file: bool = False) -> None:
    """InputError unless `path` is a folder, or with `file` a file, and no link, that other users cannot write to: what lies in
    the cache is executed."""
    try:
        _check(path, os.lstat(path), stat.S_IFREG if file else stat.S_IFDIR)
    except OSError as error:
        raise InputError(f"{path}: cannot be used as the cache: {error.strerror}; {HINT}") from None


def _check(path: Path, status: os.stat_result, kind: int) -> None:
    expected = "a file" if kind == stat.S_IFREG else "a folder"
    if stat.S_IFMT(status.st_mode) != kind:
        found = (
            "a symlink" if stat.S_ISLNK(status.st_mode) else "a folder" if stat.S_ISDIR(status.st_mode) else "a file"
        )
        found = found if found != expected else "a pipe or a device"
        raise InputError(f"{path}: is {found}, expected {expected} of the cache; remove it, or {HINT}")
    if os.name != "posix":
        return
    if status.st_uid not in (0, os.getuid()):
        raise InputError(f"{path}: belongs to another user, who can write to this cache; {HINT}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise InputError(f"{path}: other users can write to this cache; run `chmod go-w {path}`, or {HINT}")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError:
        raise InputError(f"{brief(str(folder))}: is no folder, so it cannot be the cache; {HINT}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        problem = getattr(error, "strerror", None) or error
        raise InputError(f"{brief(str(folder))}: cannot be used as the cache: {problem}; {HINT}") from None


def _user_cache() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
