"""The command line: parse, call, print. Everything heavy is imported inside the command that needs it.

This module is light itself: Ctrl-C ends a command in one line also while the commands are imported.
"""

from __future__ import annotations

import atexit
import signal


def main() -> None:
    """The `fastgen` command: errors are lines on stderr, exit code 2 for the user's input, 130 after Ctrl-C, 1 otherwise."""
    # A command that has ended keeps its exit code: Python's own end takes a moment with large libraries.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    try:
        from fastgen.cli.process import run

        run()
    except KeyboardInterrupt:
        exec("")  # see fastgen/cli/process.py
        raise SystemExit(130) from None
