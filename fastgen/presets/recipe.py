"""How one network is trained: the `train` table of a preset, checked when it is made."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, field
from msgspec.structs import replace

from fastgen.errors import InputError
from fastgen.files.jsonfiles import brief
from fastgen.files.records import Name, Record, Seed

Steps = Annotated[int, Meta(ge=0, le=1_000_000_000)]
Interval = Annotated[int, Meta(ge=1, le=1_000_000_000)]
Epochs = Annotated[float, Meta(ge=0, le=1_000_000)]
Batch = Annotated[int, Meta(ge=1, le=1_048_576)]
Share = Annotated[float, Meta(ge=0, le=1)]
Within = Annotated[float, Meta(gt=0, lt=1)]  # a share that is neither none nor all
Decay = Annotated[float, Meta(ge=0, lt=1)]
Positive = Annotated[float, Meta(gt=0, le=1_000_000)]
Weight = Annotated[float, Meta(ge=0, le=1_000_000)]
Terms = Annotated[dict[Name, Weight], Meta(max_length=64)]


class PresetError(InputError, ValueError):
    """Values that do not fit each other. As a ValueError, it gets the name of the table that it is about."""


def check(ok: bool, field_name: str, value: object, expected: str) -> None:
    """Raises PresetError, `field: found ..., expected ...`, unless `ok`."""
    if not ok:
        raise PresetError(f"{field_name}: found {brief(value)}, expected {expected}")


class Training(Record, frozen=True):
    """How one network is trained. Steps are optimiser steps; `batch_size` is the batch of one such step, over all processes.

    Either `steps` or `epochs` says how long. Checkpoints and previews come at the intervals in steps and at those in epochs;
    validations at the interval in epochs alone, where there is one.
    """

    steps: Steps = 0
    epochs: Epochs = 0
    batch_size: Batch = 32
    accumulation: Batch = 1  # the batch is run in this many micro-batches
    optimizer: Literal["adamw", "adam", "muon"] = "adamw"
    learning_rate: Positive = 1e-4
    # plateau: times `plateau_factor` after `plateau_patience` validations without a gain
    lr_schedule: Literal["constant", "cosine", "plateau", "warmup-stable-decay"] = "constant"
    decay_fraction: Within = 0.2  # warmup-stable-decay: the share of all steps in which the rate falls to 0
    plateau_factor: Within = 0.1
    plateau_patience: Interval = 10
    warmup_steps: Steps = 0
    warmup_fraction: Share = 0  # of all steps, where warmup_steps is 0
    weight_decay: Weight = 0.01
    adam_betas: tuple[Decay, Decay] = (0.9, 0.999)
    max_grad_norm: Positive = 1.0
    ema_decay: Decay = 0.999  # 0: no average, the weights themselves
    further_ema_decays: Annotated[tuple[Decay, ...], Meta(max_length=16)] = ()  # kept in the checkpoints beside it
    ema_from_epoch: Epochs = 0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 where the hardware has it, else fp32
    compile: bool | Literal["auto"] = (
        False  # torch.compile; auto: in runs that are long enough, where a compiler is installed
    )
    condition_dropout: Share = 0.1  # share of examples trained with the empty prompt or all-zero labels
    flip: bool = False
    color_jitter: Weight = 0  # largest relative change of brightness, contrast and saturation
    timestep_shift: Positive = 1  # more than 1: more of the noisy timesteps (Esser et al., 2024, eq. 23); 1: all alike
    min_snr_gamma: Weight = 0  # 0: every timestep weighs the same
    checkpoint_every: Interval = 500
    checkpoint_every_epochs: Epochs = 0
    checkpoint_limit: Steps = 2  # 0: keep all
    validate_every: Interval = 500
    validate_every_epochs: Epochs = 0
    validation_fraction: Within = 0.1
    validation_limit: Interval = 512  # examples of one validation, always the same ones
    preview_every: Steps = 0  # 0: only at the end
    preview_every_epochs: Epochs = 0
    # what becomes the model: the last averaged weights, or those with the lowest loss
    final: Literal["last", "best-validation", "best-loss"] = "last"
    seed: Seed = 0
    pretrained: Name | None = None  # a model folder, or a shipped model's name, with whose weights training begins
    loss: Terms = field(default_factory=dict)  # weights of the loss terms, where a task has several
    loss_from_epoch: Terms = field(default_factory=dict)  # when a term sets in

    def __post_init__(self) -> None:
        both = (self.steps, self.epochs)
        check((self.steps > 0) != (self.epochs > 0), "steps, epochs", both, "one of them, more than 0")
        divides = self.batch_size % self.accumulation == 0
        check(divides, "accumulation", self.accumulation, f"a divisor of batch_size = {self.batch_size}")

    def for_examples(self, count: int) -> Training:
        """The recipe for `count` training examples, with `steps`, `warmup_steps` and `validate_every` computed from their
        shares and epochs."""
        per_epoch, by_epoch = count / self.batch_size, self.validate_every_epochs > 0
        steps = self.steps or max(1, round(self.epochs * per_epoch))
        return replace(
            self,
            steps=steps,
            epochs=0,
            warmup_steps=self.warmup_steps or round(self.warmup_fraction * steps),
            warmup_fraction=0,
            validate_every=max(1, round(self.validate_every_epochs * per_epoch)) if by_epoch else self.validate_every,
            validate_every_epochs=0,
        )
