"""The command line: parse, call, print. Everything heavy is imported inside the command that needs it.

This module is light itself: Ctrl-C ends a command in one line also while the commands are imported.
"""


def main() -> None:
    """The `fastgen` command: errors are lines on stderr, exit code 2 for the user's input, 130 after Ctrl-C, 1 otherwise."""
    try:
        from fastgen.cli.process import run

        run()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
