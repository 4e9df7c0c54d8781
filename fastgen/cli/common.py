"""Options and functions that commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fastgen.cli.parameters import EDGE, PATH_OR_NAME, option
from fastgen.errors import InputError


def model_options(command: Any) -> Any:
    """The options that say how a model folder is read, in the order of the help."""
    options = [
        option("--height", type=EDGE, help="Height of the images in px.  [default: training's]"),
        option("--width", type=EDGE, help="Width.  [default: training's]"),
        option(
            "--lora",
            "loras",
            multiple=True,
            type=PATH_OR_NAME,
            metavar="FILE[:SCALE]",
            help="Fuse LoRA weights; repeatable. none: leave out.",
        ),
        option("--allow-pickle", is_flag=True, help="Read weights in pickles (.bin) too, tensors alone."),
    ]
    for add in reversed(options):
        command = add(command)
    return command


def image_size(height: int | None, width: int | None) -> tuple[int, int] | None:
    """(height, width) of --height and --width; None without them. InputError for one alone."""
    if height is None and width is None:
        return None
    if height is None or width is None:
        raise InputError("--height and --width go together; give both")
    return height, width


def say(line: str) -> None:
    """A line on stderr."""
    click.echo(line, err=True)


def model_for(kind: str, engine: str | None) -> Path:
    """The default model for requests of this kind, "text" or "labels"; its name goes to stderr. Raises InputError as
    `find.default_model` does."""
    from fastgen.engines import built_by, source_kind
    from fastgen.models.find import default_model

    default = default_model(kind, source_kind(engine), option=built_by(engine))
    say(f"model: {default}")
    return default.folder
