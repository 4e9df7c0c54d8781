"""Errors that reach the user as one line, with their exit codes; and the type of the functions that tell other lines."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable

Say = Callable[[str], None]  # what shows the user a line of progress or a note


class FastgenError(Exception):
    """Something failed that is not the user's input (a certificate missed, a disk full): exit code 1."""

    exit_code = 1


class InputError(FastgenError):
    """The user's file, option or folder is wrong: exit code 2. The message names it, what was found and what helps."""

    exit_code = 2


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or the name of its class where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def unknown(kind: str, name: str, choices: Iterable[str], limit: int = 40) -> InputError:
    """An InputError for a name that is not among the choices: names the nearest one and lists them all, up to `limit`."""
    options = list(choices)
    near = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    listed = ", ".join(options[:limit]) + (f", ... ({len(options)} in all)" if len(options) > limit else "")
    return InputError(f"unknown {kind} {name!r}{hint} (choices: {listed})")
