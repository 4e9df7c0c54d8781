"""`fastgen train`."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from fastgen.cli.common import FOLDER
from fastgen.errors import InputError


class Train(click.Command):
    """A command whose help lists the presets."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from fastgen.presets import preset_names

        text = f"Presets: {', '.join(preset_names())}."
        formatter.write("\n" + textwrap.fill(text, formatter.width, break_on_hyphens=False) + "\n")


@click.command(cls=Train)
@click.argument("preset")
@click.option("--data", "data_folder", type=FOLDER, help="Dataset folder.  [default: the one found here]")
@click.option("--out", type=FOLDER, help="Model folder.  [default: runs/PRESET-TIME]")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key: unet.train.steps=300.")
@click.option("--skip-bad", is_flag=True, help="Leave out unreadable images (counted) instead of stopping.")
@click.option("--device", help="cpu, cuda, cuda:1, ...  [default: the GPU if there is one]")
@click.option("--tracker", help="tensorboard, wandb, mlflow, ..., or none.  [default: tensorboard if installed]")
@click.option(
    "--resume", type=FOLDER, metavar="CHECKPOINT", help="Begin at another run's: RUN/checkpoints/unet/step-000500."
)
def train(preset: str, data_folder: Path | None, out: Path | None, overrides: Sequence[str], **options: Any) -> None:
    """Train PRESET (a name, or a TOML file) on a dataset. The same command continues a run that was interrupted.

    `accelerate launch -m fastgen train ...` trains on several GPUs.
    """
    from fastgen.data import find_dataset
    from fastgen.models.runs import new_run, set_latest
    from fastgen.presets import load_preset

    loaded = load_preset(preset, overrides)
    folder = data_folder or find_dataset(Path())
    if folder is None:
        raise InputError("no dataset in this folder; give --data DATA, or render one: `fastgen data iclevr DATA`")
    from fastgen.training import train as run
    from fastgen.training.processes import is_main, process_count

    if out is None and process_count() > 1:
        raise InputError("several processes need one output folder: give --out")
    target = out or new_run(loaded.name)
    run(loaded, folder, target, **options)
    if out is None and loaded.family != "evaluator":
        set_latest(target)
    if is_main():
        click.echo(f"model: {target}")
