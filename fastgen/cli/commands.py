"""All commands of `fastgen`."""

from __future__ import annotations

import os
from typing import Any

import click

from fastgen import __version__
from fastgen.cli.data import data
from fastgen.cli.engines import doctor, engines
from fastgen.cli.export import export
from fastgen.cli.generate import generate
from fastgen.cli.importing import import_
from fastgen.cli.index import copies, index
from fastgen.cli.pack import pack
from fastgen.cli.pictures import compare
from fastgen.cli.score import score
from fastgen.cli.serve import serve
from fastgen.cli.sweep import sweep
from fastgen.cli.train import train


class Commands(click.Group):
    """Ctrl-C ends a command without the empty line that click would print."""

    def make_context(self, *arguments: Any, **settings: Any) -> click.Context:
        try:
            return super().make_context(*arguments, **settings)
        except KeyboardInterrupt:
            raise click.Abort from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise click.Abort from None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="fastgen")
@click.option("--verbose", is_flag=True, help="Show what other libraries log and warn of (also FASTGEN_VERBOSE=1).")
def cli(verbose: bool) -> None:
    """Train a conditional diffusion model, export it, and generate with it fast, with proof of parity."""
    if verbose:
        os.environ["FASTGEN_VERBOSE"] = "1"


for command in (
    data,
    train,
    export,
    generate,
    serve,
    score,
    sweep,
    compare,
    index,
    copies,
    import_,
    pack,
    doctor,
    engines,
):
    cli.add_command(command)
