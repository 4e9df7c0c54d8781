"""`fastgen import`: somebody's own checkpoint -> a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fastgen.cli.common import say
from fastgen.cli.parameters import FOLDER, NEW, PATH_OR_NAME, STEPS, Choice, Whole, argument, option
from fastgen.files.records import MAX_WIDTH


@click.command("import")
@argument("source", metavar="OLD", type=FOLDER)
@option(
    "--as",
    "preset",
    type=PATH_OR_NAME,
    metavar="PRESET|FILE.toml",
    help="What it is: architecture, noise schedule, sampling.",
)
@option("--out", type=NEW, required=True, help="Model folder to make; must not exist.")
@option("--key", help="Which state dict, or which UNet, where the file holds several.")
@option("--allow-pickle", is_flag=True, help="Read .pt, .pth, .ckpt and .bin files (weights only).")
@option(
    "--schedule",
    type=PATH_OR_NAME,
    metavar="NAME|JSON",
    help="Noise schedule trained on: linear, scaled_linear:0.00085:0.012, squaredcos_cap_v2, KEY=VALUE,... of a "
    "DDPMScheduler, or a scheduler_config.json.  [default: the preset's]",
)
@option("--num-train-timesteps", type=STEPS, help="Timesteps of it.  [default: 1000, or the preset's]")
@option(
    "--prediction-type",
    type=Choice("epsilon", "v_prediction", "sample"),
    help="epsilon, v_prediction or sample.  [default: epsilon, or the preset's]",
)
@option(
    "--text-encoder", type=PATH_OR_NAME, metavar="PATH_OR_ID[:SUBFOLDER]", help="Text encoder.  [default: the preset's]"
)
@option(
    "--vae",
    type=PATH_OR_NAME,
    metavar="PATH_OR_ID[:SUBFOLDER]",
    help="Autoencoder of the latents; none: pixels.  [default: the preset's]",
)
@option("--download", is_flag=True, help="Fetch these two from the hub where they are not on this machine.")
@option("--objects", type=FOLDER, help="objects.json, names of labels or classes.  [default: i-CLEVR's, of 24]")
@option(
    "--conditioner",
    type=PATH_OR_NAME,
    metavar="FILE[:KEY]",
    help="Weights of the layer on the labels, where OLD lacks it.",
)
@option("--condition-first", is_flag=True, help="Its code concatenates the labels before the image's channels.")
@option(
    "--embed",
    type=Choice("linear", "embedding", "identity"),
    metavar="linear|embedding|identity",
    help="What it is, where weights do not tell.",
)
@option(
    "--null-class",
    type=Whole(0, MAX_WIDTH),
    help="The class id that its training used for no class: guidance needs it.",
)
@option("--unconditional", is_flag=True, help="It has no condition.")
def import_(source: Path, out: Path, **options: Any) -> None:
    """Make a model folder of OLD, a UNet from elsewhere: a diffusers folder, a .safetensors file or a .pt state dict.

    The folder is read back and compared with the source network before it gets its name. Weights that do not match are listed
    key by key.
    """
    from fastgen.models.importing import MismatchError, import_model

    try:
        imported = import_model(source, out, **options)
    except MismatchError as error:
        for line in error.lines():
            say(line)
        raise
    click.echo("\n".join(imported.lines()))
