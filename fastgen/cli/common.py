"""What commands share: kinds of arguments, and how they talk."""

from __future__ import annotations

from pathlib import Path

import click

FOLDER = click.Path(path_type=Path)
POSITIVE = click.IntRange(min=1)


def say(line: str) -> None:
    """A line on stderr."""
    click.echo(line, err=True)
