"""Which of a run's weights are meant by `--checkpoint best | last | ema | STEP`."""

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
OUTLINE = "model"  # in a run's checkpoints: the model folder without the UNet's weights, until training is finished


@dataclass(frozen=True)
class Chosen:
    """The UNet's weights (in the label family the conditioner's too) in a checkpoint of a run.

    `label` names them for good: best@115, last@230, ema@230.
    """

    label: str
    checkpoint: Checkpoint
    part: str

    @property
    def sha256(self) -> str:
        return self.checkpoint.sha256[self.part]

    def weights(self, network: str) -> dict[str, Any]:
        """The state dict of "unet" or "conditioner"."""
        found: Mapping[str, Any] = self.checkpoint.load(self.part)
        return {k.removeprefix(f"{network}."): v for k, v in found.items() if k.startswith(f"{network}.")}


def choose_checkpoint(run: Path, name: str) -> Chosen:
    """`name`: best (lowest loss, by the recipe's measure), last (the weights themselves at the newest checkpoint), ema (their
    average there; the weights where the recipe keeps none), ema-DECAY (another average), or a step (ema of that checkpoint).

    Raises InputError, listing what there is, when the run has no such checkpoint, or it is damaged.
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
        return Chosen(f"best@{best.step}", best, "ema")
    average = re.fullmatch(r"ema(-0\.\d+)?", name)
    if not (name == "last" or average or (name.isascii() and name.isdigit())):
        raise InputError(f"checkpoint is {name!r}, expected {CHOICES}")
    step = int(name) if name.isdigit() else steps[-1]
    if step not in steps:
        raise InputError(f"{parent}: no checkpoint of step {step}; there are {_listed(steps)}")
    found = checkpoints.read(parent / f"step-{step:06d}")
    part = "model" if name == "last" else name if average else "ema"
    if part == "ema" and part not in found.parts:
        part = "model"
    if part not in found.parts:
        kept = ", ".join(sorted(p for p in found.parts if p.startswith("ema"))) or "none"
        raise InputError(f"{found.folder}: holds no average {part!r}; there are: {kept}")
    return Chosen(f"{'last' if part == 'model' else part}@{step}", found, part)


def model_parts(folder: Path, checkpoint: str | None) -> Path:
    """Where a model's configs and frozen networks lie: the folder, or what an unfinished run has of it; the latter only to go
    with a checkpoint. Raises InputError for an unfinished run without one."""
    outline = folder / "checkpoints" / OUTLINE
    if (folder / "model_index.json").is_file() or not (outline / "model_index.json").is_file():
        return folder
    if checkpoint is None:
        raise InputError(f"{folder}: its training is not finished; choose weights with --checkpoint ({CHOICES})")
    return outline


def check_bundle_of(bundle: Path, label: str | None, wanted: str | None) -> None:
    """InputError when a bundle's weights, `label`, are not those that are asked for."""
    if wanted is None or is_called(label, wanted):
        return
    found = f"checkpoint {label}" if label else "the model folder's own weights"
    command = f"fastgen export RUN --checkpoint {wanted} --out BUNDLE"
    raise InputError(f"{bundle}: was exported from {found}, not from checkpoint {wanted}; `{command}` makes that one")


def check_made_from(label: str | None, wanted: str, images: Sequence[Path]) -> None:
    """InputError when images' metadata name other weights than those that are asked for."""
    if not is_called(label, wanted):
        found = f"made from checkpoint {label}" if label else "not from a checkpoint, by their metadata"
        raise InputError(f"{', '.join(map(str, images))}: images are {found}, expected checkpoint {wanted}")


def is_called(label: str | None, name: str) -> bool:
    """Whether weights with this label, such as ema@500, may be called so: ema, ema@500, 500. Only "best" calls best@500."""
    part, _, step = (label or "").partition("@")
    return name in (part, label) or (name == step and part != "best")


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps))
