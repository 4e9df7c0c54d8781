"""The command line: parse, call, print. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import sys
import time
from typing import Any

import click

from fastgen import __version__
from fastgen.cli.common import say
from fastgen.cli.data import data
from fastgen.cli.engines import doctor, engines
from fastgen.cli.export import export
from fastgen.cli.generate import generate
from fastgen.cli.importing import import_
from fastgen.cli.index import copies, index
from fastgen.cli.pack import pack
from fastgen.cli.pictures import compare
from fastgen.cli.score import score
from fastgen.cli.sweep import sweep
from fastgen.cli.train import train
from fastgen.errors import FastgenError, InputError, one_line
from fastgen.files.installing import hint


class Commands(click.Group):
    """Ctrl-C ends a command without the empty line that click would print."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise click.Abort from None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="fastgen")
def cli() -> None:
    """Train a conditional diffusion model, export it, and generate with it fast, with proof of parity."""


for command in (data, train, export, generate, score, sweep, compare, index, copies, import_, pack, doctor, engines):
    cli.add_command(command)


def main() -> None:
    """The `fastgen` command: errors are lines on stderr, exit code 2 for the user's input, 1 otherwise."""
    start = time.perf_counter()
    try:
        cli(prog_name="fastgen", standalone_mode=False)
    except FastgenError as error:
        _fail(error.exit_code, *getattr(error, "problems", [str(error)]), longest=error.longest)
    except click.exceptions.NoArgsIsHelpError as error:
        say(error.format_message())
        sys.exit(2)
    except click.UsageError as error:
        _fail(2, f"{error.format_message()} (see `{error.ctx.command_path if error.ctx else 'fastgen'} --help`)")
    except click.Abort:
        say(f"fastgen: interrupted after {time.perf_counter() - start:.0f} s; the same command continues")
        sys.exit(130)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("fastgen", "export"):
            raise
        _fail(2, f"this command needs {error.name}, not installed here: {hint('export')}")
    except OSError as error:
        _fail(1, f"{error.filename}: {error.strerror}" if error.filename else str(error))


def _fail(exit_code: int, *messages: str, longest: int = InputError.longest) -> None:
    for message in messages:
        say(f"fastgen: error: {one_line(message, longest)}")
    sys.exit(exit_code)
