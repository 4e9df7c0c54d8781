"""Errors that reach the user as one line, with their exit codes; and the type of the functions that tell other lines."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable

LISTED = 90  # characters of the choices that an error lists

Say = Callable[[str], None]  # what shows the user a line of progress or a note


class FastgenError(Exception):
    """Something failed that is not the user's input (a certificate missed, a disk full): exit code 1."""

    exit_code = 1
    longest = 1000  # characters of its line, after `fastgen: error: `


class InputError(FastgenError):
    """The user's file, option or folder is wrong: exit code 2. The message names it, what was found and what helps."""

    exit_code = 2
    longest = 280


class NotReadyError(InputError):
    """This machine lacks what an engine needs: the line has every reason, and what helps."""

    longest = FastgenError.longest


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or the name of its class where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def one_line(message: str, longest: int = InputError.longest) -> str:
    """The message on one line; one that is too long loses its middle, as its end says what helps."""
    line = " ".join(message.split())
    if len(line) <= longest:
        return line
    end = (longest - 5) * 2 // 5
    return f"{line[: longest - 5 - end]} ... {line[-end:]}"


def unknown(kind: str, name: str, choices: Iterable[str]) -> InputError:
    """An InputError for a name that is not among the choices: names the nearest one, and lists as many as fit on a line."""
    options = list(choices)
    shown = len(options)
    while shown > 1 and sum(len(option) + 2 for option in options[:shown]) > LISTED:
        shown -= 1
    listed = ", ".join(options[:shown]) + (f", ... ({len(options)} in all)" if shown < len(options) else "")
    name = one_line(name, 80)
    return InputError(f"unknown {kind} {name!r}{nearest(name, options)} (choices: {listed})")


def nearest(name: str, choices: Iterable[str]) -> str:
    """`; did you mean 'NAME'?`, of the choice that is most like `name`; nothing where none is like it."""
    near = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
