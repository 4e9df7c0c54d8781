"""`fastgen data`: render datasets of our own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fastgen.cli.parameters import FOLDER, NEW, SEED, Whole, argument, option

COUNT, SIZE = Whole(1, 10_000_000), Whole(32, 256)


@click.group()
def data() -> None:
    """Render datasets of our own, in the schemas of the two reference tasks."""


@data.command()
@argument("out", type=NEW)
@option("--count", type=COUNT, default=500, show_default=True, help="Number of monsters; each has eight action poses.")
@option("--size", type=SIZE, default=256, show_default=True, help="Image height and width, 32 to 256 px.")
@option("--frames", type=Whole(1, 64), default=4, show_default=True, help="Frames per action (the main pose has one).")
@option(
    "--test-count",
    type=Whole(0, 1_000_000),
    default=64,
    show_default=True,
    help="Requests in test.json, of monsters not trained on.",
)
@option("--seed", type=SEED, default=0, show_default=True, help="The same seed and options, the same images.")
@option("--workers", type=Whole(1, 1024), help="Processes.  [default: one per core]")
def monsters(out: Path, **options: Any) -> None:
    """Render monsters with descriptions: train_info.json, train/, test.json."""
    from fastgen.data.synthetic import write_monsters

    write_monsters(out, **options)
    click.echo(f"wrote {out}")


@data.command()
@argument("out", type=NEW)
@option("--count", type=COUNT, default=18009, show_default=True, help="Number of scenes.")
@option("--size", type=SIZE, default=64, show_default=True, help="Image height and width, 32 to 256 px.")
@option("--labels", "label_lists", type=FOLDER, help="A train.json to take file names and label lists from.")
@option(
    "--hold-out",
    multiple=True,
    type=FOLDER,
    metavar="FILE|reference",
    help="Label sets that must not be trained on: a request file, fingerprints (.txt), or the i-CLEVR task's own tests.",
)
@option("--seed", type=SEED, default=0, show_default=True, help="The same seed and options, the same images.")
@option("--workers", type=Whole(1, 1024), help="Processes.  [default: one per core]")
def iclevr(out: Path, **options: Any) -> None:
    """Render scenes of cubes, spheres and cylinders: train.json, objects.json, iclevr/, test.json, new_test.json."""
    from fastgen.data.synthetic import write_iclevr

    write_iclevr(out, **options)
    click.echo(f"wrote {out}")
