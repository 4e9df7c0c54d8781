"""Everything that changes during training, and its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from msgspec import Struct
from torch import Tensor, nn

from fastgen.errors import InputError
from fastgen.files.jsonfiles import brief
from fastgen.files.records import Count, Record, builtins, to_record
from fastgen.models import checkpoints
from fastgen.models.checkpoints import Checkpoint
from fastgen.models.weights import load_state
from fastgen.presets.recipe import Training
from fastgen.training.attention import attend_on_cpu
from fastgen.training.autocast import Precision
from fastgen.training.ema import Ema
from fastgen.training.optimizers import build_optimizer

GAIN = 1e-4  # the plateau schedule ignores relative gains below this, as torch's ReduceLROnPlateau does


class TrainingProgress(Struct, forbid_unknown_fields=True):
    """Losses so far: they decide which weights are the best, and when the plateau schedule lowers the learning rate."""

    best: float | None = None  # lowest loss, see Training.final
    best_step: Count = 0
    loss_sum: float = 0.0  # of the training losses since the last validation
    loss_count: Count = 0
    rate_scale: float = 1.0  # lr_schedule plateau
    plateau_best: float | None = None
    plateau_bad: Count = 0

    def improved(self, loss: float, step: int) -> bool:
        """Record a loss; returns whether it is the lowest so far."""
        if self.best is not None and loss >= self.best:
            return False
        self.best, self.best_step = loss, step
        return True

    def adapt_rate(self, loss: float, recipe: Training) -> None:
        """ReduceLROnPlateau: lowers the learning rate after Training.plateau_patience validations without a gain."""
        if recipe.lr_schedule != "plateau":
            return
        if self.plateau_best is None or loss < self.plateau_best * (1 - GAIN):
            self.plateau_best, self.plateau_bad = loss, 0
        else:
            self.plateau_bad += 1
        if self.plateau_bad > recipe.plateau_patience:
            self.rate_scale *= recipe.plateau_factor
            self.plateau_bad = 0


class Extra(Record, frozen=True):
    """What a checkpoint's state.json has of training."""

    job: str
    scaler: dict[str, float]
    progress: TrainingProgress


@dataclass
class State:
    """`emas`: the averages by the name of their file in a checkpoint, "ema" the first of them."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    emas: dict[str, Ema]
    micro_batch: int  # examples that a process runs at a time; halved where memory is short
    step: int = 0  # optimiser steps done
    progress: TrainingProgress = field(default_factory=TrainingProgress)
    pending: list[Tensor] = field(
        default_factory=list
    )  # (loss, gradient norm) of the steps since the last row of the log

    @property
    def ema(self) -> Ema:
        return self.emas["ema"]


def initial(module: nn.Module, recipe: Training, precision: Precision, examples: int) -> State:
    """The state before the first step. `examples`: the number of training examples."""
    layout = torch.channels_last if precision.device.type == "cuda" else torch.contiguous_format
    module = module.to(device=precision.device, memory_format=layout).train()  # type: ignore[call-overload]
    if precision.device.type == "cpu":
        attend_on_cpu(module)
    begin = round(recipe.ema_from_epoch * examples / recipe.batch_size)
    emas = {"ema": Ema(module, recipe.ema_decay, begin)}
    emas |= {f"ema-{decay}": Ema(module, decay, begin) for decay in recipe.further_ema_decays}
    return State(
        module,
        build_optimizer(module, recipe, precision.dtype),
        torch.amp.GradScaler(precision.device.type, enabled=precision.name == "fp16"),
        emas,
        recipe.batch_size // recipe.accumulation,
    )


def load(state: State, checkpoint: Checkpoint) -> None:
    """Continue where the checkpoint was written. Raises InputError when it is another network's."""
    kind = f"this {type(state.module).__name__}: another architecture"
    load_state(state.module, checkpoint.load("model"), checkpoint.folder, kind)
    for name, ema in state.emas.items():
        part = name if name in checkpoint.parts else "model"
        try:
            ema.load(checkpoint.load(part))
        except ValueError as error:
            raise InputError(f"{checkpoint.folder / f'{part}.safetensors'}: {error}: another architecture") from None
    _load_optimizer(state.optimizer, checkpoint.load("optimizer"), checkpoint.folder)
    extra = to_record(dict(checkpoint.extra), Extra, checkpoint.folder / checkpoints.STATE, "extra")
    if state.scaler.is_enabled():
        state.scaler.load_state_dict({**state.scaler.state_dict(), **extra.scaler})
    state.progress = extra.progress
    state.step = checkpoint.step


def save(state: State, folder: Path, job: str, limit: int) -> None:
    """Write a checkpoint; an average with decay 0 is the weights themselves and gets no file."""
    optimizer = {
        f"{index}.{name}": value
        for index, values in state.optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }
    averages = {name: ema.weights for name, ema in state.emas.items() if ema.decay}
    parts = {"model": state.module.state_dict(), **averages, "optimizer": optimizer}
    extra = {"job": job, "scaler": state.scaler.state_dict(), "progress": builtins(state.progress)}
    checkpoints.save(folder, state.step, parts, extra, limit)


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], folder: Path) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        number = int(index) if index.isdecimal() and name else len(parameters)
        if number >= len(parameters) or value.shape not in ((), (1,), parameters[number].shape):
            problem = f"{brief(key)} of shape {list(value.shape)} belongs to no parameter of this network"
            raise InputError(f"{folder / 'optimizer.safetensors'}: {problem}")
        state.setdefault(number, {})[name] = value
    settings: dict[str, Any] = optimizer.state_dict()
    optimizer.load_state_dict({"state": state, "param_groups": settings["param_groups"]})
