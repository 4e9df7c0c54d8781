"""Commands about finished pictures."""

from __future__ import annotations

from pathlib import Path

import click

from fastgen.cli.common import say
from fastgen.cli.parameters import FOLDER, IMAGES, NEW, argument, option


@click.command()
@argument("a", metavar="A", type=FOLDER)
@argument("b", metavar="B", type=FOLDER)
@option("--out", type=NEW, required=True, help="PNG to write; the figures go into a JSON file beside it.")
@option("--limit", type=IMAGES, help="Only the first N images.")
def compare(a: Path, b: Path, out: Path, limit: int | None) -> None:
    """Compare the images of two folders, from two engines or two samplers: PSNR, largest difference, side by side.

    Each block of the picture has a row of A, of B, and of their amplified difference.
    """
    from fastgen.scoring.pairs import compare as run

    comparison = run(a, b, out, limit)
    for warning in comparison.warnings:
        say(f"warning: {warning}")
    click.echo("\n".join(comparison.lines()))
    click.echo(f"wrote {out} and {out.with_suffix('.json')}")
