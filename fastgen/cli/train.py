"""`fastgen train`."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from fastgen.cli.common import say
from fastgen.cli.parameters import DEVICE, FOLDER, NEW, PATH_OR_NAME, argument, option
from fastgen.errors import InputError

HOLDS = {"text": "captions", "labels": "labels"}


class Train(click.Command):
    """A command whose help lists the presets."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from fastgen.presets import preset_names

        text = f"Presets: {', '.join(preset_names())}."
        formatter.write("\n" + textwrap.fill(text, formatter.width, break_on_hyphens=False) + "\n")


@click.command(cls=Train)
@argument("preset", type=PATH_OR_NAME, required=False)
@option("--data", "data_folder", type=FOLDER, help="Dataset folder.  [default: the one found here]")
@option("--out", type=NEW, help="Model folder.  [default: runs/PRESET-TIME]")
@option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key: unet.train.steps=300.")
@option("--skip-bad", is_flag=True, help="Leave out unreadable images (counted) instead of stopping.")
@option("--device", type=DEVICE, help="cpu, cuda, cuda:1, ...  [default: the GPU if there is one]")
@option("--tracker", help="tensorboard, wandb, mlflow, ..., or none.  [default: tensorboard if installed]")
@option("--resume", type=FOLDER, metavar="CHECKPOINT", help="Begin at another run's: RUN/checkpoints/unet/step-000500.")
def train(
    preset: str | None, data_folder: Path | None, out: Path | None, overrides: Sequence[str], **options: Any
) -> None:
    """Train PRESET (a name, or a TOML file) on a dataset. The same command continues a run that was interrupted.

    Without PRESET the dataset chooses: monsters-64 for images with captions, iclevr-64 for images with labels.
    `accelerate launch -m fastgen train ...` trains on several GPUs.
    """
    from fastgen.data import Dataset, read_dataset
    from fastgen.models.runs import new_run, set_latest
    from fastgen.presets import load_preset, preset_names
    from fastgen.presets.defaults import DEFAULTS

    if preset is not None and data_folder is None and Path(preset).is_dir() and preset not in preset_names():
        raise InputError(f"{preset} is a folder; give it with --data")
    data: Path | Dataset
    if preset is not None:
        loaded, data, chosen = load_preset(preset, overrides), data_folder or _found(), ""
    else:
        data = dataset = read_dataset(data_folder or _found())
        loaded = load_preset(DEFAULTS[dataset.kind], overrides)
        chosen = f"preset: {loaded.name}, the default for images with {HOLDS[dataset.kind]}"
    from fastgen.training import train as run
    from fastgen.training.processes import is_main, process_count

    if out is None and process_count() > 1:
        raise InputError("several processes need one output folder: give --out")
    if chosen and is_main():
        say(chosen)
    target = out or new_run(loaded.name)
    run(loaded, data, target, **options)
    if out is None and loaded.evaluator is None:
        set_latest(target)
    if is_main():
        click.echo(f"model: {target}")


def _found() -> Path:
    """The dataset in the current folder. InputError where there is none."""
    from fastgen.data import find_dataset
    from fastgen.data.readers import EXPECTED, FOLDERS

    folder = find_dataset(Path())
    if folder is None:
        where = f"no dataset in this folder, nor in {'/ or '.join(FOLDERS)}/ ({EXPECTED})"
        raise InputError(f"{where}; give --data DATA, or render one: `fastgen data iclevr DATA`")
    return folder
