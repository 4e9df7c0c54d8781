"""`fastgen data`: render datasets of our own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fastgen.cli.common import FOLDER


@click.group()
def data() -> None:
    """Render datasets of our own, in the schemas of the two reference tasks."""


@data.command()
@click.argument("out", type=FOLDER)
@click.option("--count", default=500, show_default=True, help="Number of monsters; each has eight action poses.")
@click.option("--size", default=256, show_default=True, help="Image height and width, 32 to 256 px.")
@click.option("--frames", default=4, show_default=True, help="Frames per action (the main pose has one).")
@click.option("--test-count", default=64, show_default=True, help="Requests in test.json, of monsters not trained on.")
@click.option("--seed", default=0, show_default=True, help="The same seed and options, the same images.")
@click.option("--workers", type=int, help="Processes.  [default: one per core]")
def monsters(out: Path, **options: Any) -> None:
    """Render monsters with descriptions: train_info.json, train/, test.json."""
    from fastgen.data.synthetic import write_monsters

    write_monsters(out, **options)
    click.echo(f"wrote {out}")


@data.command()
@click.argument("out", type=FOLDER)
@click.option("--count", default=18009, show_default=True, help="Number of scenes.")
@click.option("--size", default=64, show_default=True, help="Image height and width, 32 to 256 px.")
@click.option("--labels", "label_lists", type=FOLDER, help="A train.json to take file names and label lists from.")
@click.option(
    "--hold-out",
    multiple=True,
    type=FOLDER,
    metavar="FILE|reference",
    help="Label sets that must not be trained on: a request file, fingerprints (.txt), or the i-CLEVR task's own tests.",
)
@click.option("--seed", default=0, show_default=True, help="The same seed and options, the same images.")
@click.option("--workers", type=int, help="Processes.  [default: one per core]")
def iclevr(out: Path, **options: Any) -> None:
    """Render scenes of cubes, spheres and cylinders: train.json, objects.json, iclevr/, test.json, new_test.json."""
    from fastgen.data.synthetic import write_iclevr

    write_iclevr(out, **options)
    click.echo(f"wrote {out}")
