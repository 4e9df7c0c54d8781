"""The cache folder, of what can be computed again: encoded training data, compiled engines."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

from fastgen.errors import InputError

VARIABLE = "FASTGEN_CACHE"


def cache_dir() -> Path:
    """`$FASTGEN_CACHE`, else `fastgen` in the user's cache folder; created with mode 0700.

    Raises InputError when it cannot be created, or when other users could write to it: its content is trusted.
    """
    folder = Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else _user_cache() / "fastgen"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        hint = f"set {VARIABLE} to a folder of yours"
        raise InputError(f"{folder}: cannot be used as the cache: {error.strerror}; {hint}") from None
    check_private(folder)
    return folder


def check_private(folder: Path) -> None:
    """InputError when other users can write to a folder of the cache: what lies there is executed."""
    mode = folder.stat()
    if os.name == "posix" and (mode.st_uid not in (0, os.getuid()) or mode.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
        hint = f"run `chmod 700 {folder}`, or set {VARIABLE} to a folder of yours"
        raise InputError(f"{folder}: other users can write to this cache; {hint}")


def _user_cache() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
