"""The choice of a run's weights: `--checkpoint best | last | ema | STEP`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgen.errors import InputError

if TYPE_CHECKING:
    from fastgen.models.checkpoints import Checkpoint

CHOICES = "best, last, ema, ema-DECAY or a step such as 500"
OUTLINE = "model"  # in an unfinished run's checkpoints: the model folder without the UNet's weights


@dataclass(frozen=True)
class RunWeights:
    """The UNet's weights (and its conditioner's, where it has one) in a checkpoint of a run.

    `label` is their lasting name: best@115, last@230, ema@230. `part`: the checkpoint's file, "model", "ema" or "ema-DECAY".
    """

    label: str
    checkpoint: Checkpoint
    part: str

    @property
    def sha256(self) -> str:
        return self.checkpoint.sha256[self.part]

    def weights(self, network: str) -> dict[str, Any]:
        """The state dict of "unet" or "conditioner"."""
        state: Mapping[str, Any] = self.checkpoint.load(self.part)
        return {k.removeprefix(f"{network}."): v for k, v in state.items() if k.startswith(f"{network}.")}


def choose_checkpoint(run: Path, name: str) -> RunWeights:
    """The weights of a run that `name` stands for.

    best: with the lowest loss, by the recipe's measure. last: the newest checkpoint's weights. ema: their average there, or
    the weights where the recipe keeps no average. ema-DECAY: another average. A step: ema of that checkpoint. Raises
    InputError, which lists the checkpoints, when the run does not have this one, or it is damaged.
    """
    from fastgen.models import checkpoints

    parent = run / "checkpoints" / "unet"
    steps = sorted(int(f.name.removeprefix("step-")) for f in parent.glob("step-*") if f.name[5:].isdigit())
    if not steps:
        raise InputError(f"{run}: holds no checkpoints/unet, so there is no checkpoint {name!r} to choose")
    if name == checkpoints.BEST:
        if not (parent / name).is_dir():
            raise InputError(
                f"{parent}: no validation yet, so no checkpoint {name!r}; there are steps {_listed(steps)}"
            )
        best = checkpoints.read(parent / name)
        return RunWeights(f"best@{best.step}", best, "ema")
    average = re.fullmatch(r"ema(-0\.\d+)?", name)
    if not (name == "last" or average or (name.isascii() and name.isdigit())):
        raise InputError(f"checkpoint is {name!r}, expected {CHOICES}")
    step = int(name) if name.isdigit() else steps[-1]
    if step not in steps:
        raise InputError(f"{parent}: no checkpoint of step {step}; there are {_listed(steps)}")
    checkpoint = checkpoints.read(parent / f"step-{step:06d}")
    part = "model" if name == "last" else name if average else "ema"
    if part == "ema" and part not in checkpoint.parts:
        part = "model"
    if part not in checkpoint.parts:
        averages = ", ".join(sorted(p for p in checkpoint.parts if p.startswith("ema"))) or "none"
        raise InputError(f"{checkpoint.folder}: holds no average {part!r}; there are: {averages}")
    return RunWeights(f"{'last' if part == 'model' else part}@{step}", checkpoint, part)


def choose_weights(run: Path, name: str | None, label: str | None) -> RunWeights | None:
    """The weights of a run's checkpoint; None without a `name`, and where a folder of its own has the averaged weights
    (`label`). Raises InputError as `choose_checkpoint` does."""
    return None if name is None or label is not None else choose_checkpoint(run, name)


def model_parts(folder: Path, checkpoint: str | None) -> Path:
    """The folder of a model's configs and frozen networks: `folder`, or the outline in an unfinished run's checkpoints.

    Raises InputError for an unfinished run without a checkpoint.
    """
    outline = folder / "checkpoints" / OUTLINE
    if (folder / "model_index.json").is_file() or not (outline / "model_index.json").is_file():
        return folder
    if checkpoint is None:
        raise InputError(f"{folder}: its training is not finished; choose weights with --checkpoint ({CHOICES})")
    return outline


def check_bundle_of(bundle: Path, label: str | None, name: str | None) -> None:
    """InputError when a bundle's weights, `label`, are not those that `name` stands for."""
    if name is None or is_called(label, name):
        return
    source = f"checkpoint {label}" if label else "the model folder's own weights"
    command = f"fastgen export RUN --checkpoint {name} --out BUNDLE"
    raise InputError(f"{bundle}: was exported from {source}, not from checkpoint {name}; `{command}` makes that one")


def check_made_from(label: str | None, name: str, images: Sequence[Path]) -> None:
    """InputError when images' metadata name other weights, `label`, than those that `name` stands for."""
    if not is_called(label, name):
        source = f"made from checkpoint {label}" if label else "not from a checkpoint, by their metadata"
        raise InputError(f"{', '.join(map(str, images))}: images are {source}, expected checkpoint {name}")


def is_called(label: str | None, name: str) -> bool:
    """Whether `name` stands for weights with this label: ema, ema@500 and 500 for ema@500, but not 500 for best@500."""
    part, _, step = (label or "").partition("@")
    return name in (part, label) or (name == step and part != "best")


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps))
