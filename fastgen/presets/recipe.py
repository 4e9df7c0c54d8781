"""How one network is trained: the `train` table of a preset, checked when it is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fastgen.errors import InputError, unknown

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
OPTIMIZERS = ("adamw", "adam", "muon")
LR_SCHEDULES = ("constant", "cosine", "plateau", "warmup-stable-decay")
FINALS = ("last", "best-validation", "best-loss")
COUNTS = ("batch_size", "accumulation", "checkpoint_every", "validate_every", "validation_limit", "plateau_patience")
NOT_NEGATIVE = (
    "steps",
    "epochs",
    "warmup_steps",
    "weight_decay",
    "seed",
    "ema_from_epoch",
    "checkpoint_limit",
    "checkpoint_every_epochs",
    "validate_every_epochs",
    "preview_every",
    "preview_every_epochs",
    "min_snr_gamma",
    "color_jitter",
)


def check(ok: bool, field_name: str, value: object, expected: str) -> None:
    if not ok:
        raise InputError(f"{field_name} = {value!r}: expected {expected}")


def choice(field_name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise unknown(field_name, value, choices)


@dataclass(frozen=True)
class Training:
    """How one network is trained. Steps are optimiser steps; `batch_size` is the batch of one such step, over all processes.

    Either `steps` or `epochs` says how long. Checkpoints and previews come at the intervals in steps and at those in epochs;
    validations at the interval in epochs alone, where there is one.
    """

    steps: int = 0
    epochs: float = 0
    batch_size: int = 32
    accumulation: int = 1  # the batch is run in this many micro-batches
    optimizer: str = "adamw"
    learning_rate: float = 1e-4
    lr_schedule: str = "constant"  # plateau: times `plateau_factor` after `plateau_patience` validations without a gain
    decay_fraction: float = 0.2  # warmup-stable-decay: the share of all steps in which the rate falls to 0
    plateau_factor: float = 0.1
    plateau_patience: int = 10
    warmup_steps: int = 0
    warmup_fraction: float = 0  # of all steps, where warmup_steps is 0
    weight_decay: float = 0.01
    adam_betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999  # 0: no average, the weights themselves
    further_ema_decays: tuple[float, ...] = ()  # kept in the checkpoints beside it
    ema_from_epoch: float = 0
    precision: str = "auto"  # auto: bf16 where the hardware has it, else fp32
    compile: bool | str = False  # torch.compile; auto: in runs that are long enough, where a compiler is installed
    condition_dropout: float = 0.1  # share of examples trained with the empty prompt or all-zero labels
    flip: bool = False
    color_jitter: float = 0  # largest relative change of brightness, contrast and saturation
    timestep_shift: float = 1  # more than 1: more of the noisy timesteps (Esser et al., 2024, eq. 23); 1: all alike
    min_snr_gamma: float = 0  # 0: every timestep weighs the same
    checkpoint_every: int = 500
    checkpoint_every_epochs: float = 0
    checkpoint_limit: int = 2  # 0: keep all
    validate_every: int = 500
    validate_every_epochs: float = 0
    validation_fraction: float = 0.1
    validation_limit: int = 512  # examples of one validation, always the same ones
    preview_every: int = 0  # 0: only at the end
    preview_every_epochs: float = 0
    final: str = "last"  # what becomes the model: the last averaged weights, or those with the lowest loss
    seed: int = 0
    loss: Mapping[str, float] = field(default_factory=dict)  # weights of the loss terms, where a task has several
    loss_from_epoch: Mapping[str, float] = field(default_factory=dict)  # when a term sets in

    def __post_init__(self) -> None:
        both = (self.steps, self.epochs)
        check((self.steps > 0) != (self.epochs > 0), "train.steps, train.epochs", both, "one of them, more than 0")
        for name in COUNTS:
            check(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "at least 1")
        for name in NOT_NEGATIVE:
            check(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "0 or more")
        divides, divisor = self.batch_size % self.accumulation == 0, f"a divisor of batch_size = {self.batch_size}"
        check(divides, "train.accumulation", self.accumulation, divisor)
        for name in ("timestep_shift", "learning_rate", "max_grad_norm"):
            check(getattr(self, name) > 0, f"train.{name}", getattr(self, name), "more than 0")
        for decay in (self.ema_decay, *self.further_ema_decays):
            check(0 <= decay < 1, "train.ema_decay", decay, "0 <= decay < 1")
        for name in ("condition_dropout", "warmup_fraction"):
            check(0 <= getattr(self, name) <= 1, f"train.{name}", getattr(self, name), "a share in [0, 1]")
        for name in ("validation_fraction", "plateau_factor", "decay_fraction"):
            check(0 < getattr(self, name) < 1, f"train.{name}", getattr(self, name), "a share in (0, 1)")
        betas = len(self.adam_betas) == 2 and all(0 <= beta < 1 for beta in self.adam_betas)
        check(betas, "train.adam_betas", list(self.adam_betas), "two numbers, 0 <= beta < 1")
        check(self.compile in (True, False, "auto"), "train.compile", self.compile, "true, false or 'auto'")
        choice("train.precision", self.precision, PRECISIONS)
        choice("train.optimizer", self.optimizer, OPTIMIZERS)
        choice("train.lr_schedule", self.lr_schedule, LR_SCHEDULES)
        choice("train.final", self.final, FINALS)

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
