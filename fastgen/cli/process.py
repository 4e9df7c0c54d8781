"""The process of a command: its standard streams, Ctrl-C, and its exit code."""

from __future__ import annotations

import _thread
import errno
import io
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from fastgen.errors import FastgenError, InputError, one_line

INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it
IMPORT_POLL_S = 0.02  # between two looks whether an import has ended
AGAIN_S = 0.5  # after an interrupt, before the next look whether the command ends
STREAMS = {1: "stdout", 2: "stderr"}
OF_THE_INPUT = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR)  # errors of a path that the user gave


class _Output(io.FileIO):
    """A standard stream that may be full, or whose reader may have ended: the command does its work all the same.

    `problem`: why lines were lost, unless their reader wanted no more.
    """

    problem: str | None = None

    def write(self, data: Any, /) -> Any:
        try:
            return super().write(data)
        except BrokenPipeError:
            pass
        except OSError as error:
            self.problem = error.strerror
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)
        return len(data)


class _CtrlC:
    """Ends the command also where a library, or Python itself, swallows the exception or makes another of it: it is raised
    again until the command's end.

    A module that is being imported is finished first: an exception in the midst of an extension's initialization ends the
    process with SIGABRT (torch's, which pybind11 makes).
    """

    def __init__(self) -> None:
        self.pressed = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.pressed:  # twice: the first one is being handled, which may take a while
            os._exit(INTERRUPTED)
        self.pressed = True
        self._interrupt(frame)

    def _interrupt(self, frame: FrameType | None) -> None:
        wait = _is_importing(frame)
        if hasattr(signal, "setitimer"):
            signal.signal(signal.SIGALRM, lambda number, later: self._interrupt(later))
            signal.setitimer(signal.ITIMER_REAL, IMPORT_POLL_S if wait else AGAIN_S)
            if wait or _is_handled(sys.exc_info()[1]):
                return
        raise KeyboardInterrupt

    def settle(self) -> None:
        """The command ends: no more interrupts."""
        if hasattr(signal, "setitimer") and self.pressed:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def again(self, unraisable: Any) -> None:
        """`sys.unraisablehook`: an interrupt in a destructor or a callback comes back in the command."""
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            self.pressed = False
            _thread.interrupt_main()
        else:
            sys.__unraisablehook__(unraisable)


def _is_importing(frame: FrameType | None) -> bool:
    """Whether Python's import system has called this code."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _is_handled(error: BaseException | None) -> bool:
    """`error`: the exception that is being handled, None for none. Whether it is an interrupt, or came up while one was
    handled."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__context__
    return False


def run() -> None:
    """Run the command of `sys.argv`, and end the process where it fails."""
    start = time.perf_counter()
    with _interrupts() as ctrl_c, _streams() as outputs:
        try:
            from fastgen.cli.commands import cli

            cli(prog_name="fastgen", standalone_mode=False)
        except BaseException as error:
            ctrl_c.settle()
            if ctrl_c.pressed or isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
                _say(f"fastgen: interrupted after {time.perf_counter() - start:.0f} s; the same command continues")
                exec(
                    ""
                )  # an interrupt inside exec() is noted, and Python would end by the signal; this clears the note
                sys.exit(INTERRUPTED)
            _explain(error)
        lost = [f"{STREAMS[output.fileno()]}: {output.problem}" for output in outputs if output.problem]
        if lost:
            _fail(1, f"{lost[0]}; the command did its work, but not all that it printed was written")


def _explain(error: BaseException) -> NoReturn:
    """End the process with a line about the error; raise one that is nobody's input, with its traceback."""
    import click

    if isinstance(error, FastgenError):
        _fail(error.exit_code, *getattr(error, "problems", [str(error)]), longest=error.longest)
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        _say(error.format_message())
        sys.exit(2)
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx else "fastgen"
        _fail(2, f"{error.format_message()} (see `{command} --help`)")
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing is not None and missing.partition(".")[0] not in ("fastgen", "export"):
        from fastgen.files.installing import hint

        _fail(2, f"this command needs {missing}, not installed here: {hint('export')}")
    if isinstance(error, OSError):
        code = 2 if error.errno in OF_THE_INPUT else 1
        _fail(code, f"{error.filename}: {error.strerror}" if error.filename else str(error))
    raise error


def _fail(exit_code: int, *messages: str, longest: int = InputError.longest) -> NoReturn:
    for message in messages:
        _say(f"fastgen: error: {one_line(message, longest)}")
    sys.exit(exit_code)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


@contextmanager
def _streams() -> Iterator[list[_Output]]:
    """Standard streams for the time of the block that are open, and whose writing never fails.

    A descriptor that the parent closed is opened on the null device: the next file that the command opens would get its number,
    and so all that libraries print. Streams that something else has replaced, such as a test's, stay.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number: this one
    before = {name: getattr(sys, name) for name in STREAMS.values()}
    outputs = []
    for descriptor, name in STREAMS.items():
        if before[name] in (None, getattr(sys, f"__{name}__")):
            output = _Output(descriptor, "w", closefd=False)
            encoding = getattr(before[name], "encoding", "utf-8")
            buffered = io.BufferedWriter(output)
            text = io.TextIOWrapper(buffered, encoding, errors="backslashreplace", line_buffering=True)
            setattr(sys, name, text)
            outputs.append(output)
    try:
        yield outputs
    finally:
        for name, stream in before.items():
            getattr(sys, name).flush()
            setattr(sys, name, stream)


@contextmanager
def _interrupts() -> Iterator[_CtrlC]:
    """Handles Ctrl-C for the time of the block, unless the parent had it ignored, as a shell does in the background."""
    ctrl_c = _CtrlC()
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield ctrl_c
        return
    hook = sys.unraisablehook
    signal.signal(signal.SIGINT, ctrl_c)
    sys.unraisablehook = ctrl_c.again
    try:
        yield ctrl_c
    finally:
        ctrl_c.settle()
        sys.unraisablehook = hook
        signal.signal(signal.SIGINT, ctrl_c if ctrl_c.pressed else signal.default_int_handler)
