"""What the optimisation loop needs to know of a network and its objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import numpy as np
from PIL.Image import Image
from torch import Tensor, nn

from fastgen.errors import InputError, unknown
from fastgen.training.draws import Draws


class Task(ABC):
    """A network, its data and its loss. Everything random comes from `draws`, so that a run can be repeated.

    Augmentation and condition dropout happen while `module.training`. The methods get `module` as an argument because the
    loop may wrap it.
    """

    name: str  # "unet", "vae", "text_encoder", "evaluator"
    splits_batches = True  # whether an example's loss is independent of its batch, so that micro-batches may be used
    module: nn.Module  # everything that is optimised

    def __init__(self, module: nn.Module, rows: tuple[np.ndarray, np.ndarray]) -> None:
        """`rows`: the indices (N,) of the training examples and (V,) of the validation examples."""
        self.module = module
        self.train_rows, self.validation_rows = rows

    @abstractmethod
    def losses(self, module: nn.Module, rows: np.ndarray, draws: Draws) -> Tensor:
        """The loss of each example of `rows` (b,): (b,) float32; computed under autocast."""

    def parts(self, total: Callable[[Tensor], Tensor]) -> Mapping[str, float]:
        """Further figures of the training since the last call; `total` adds up a tensor over the processes."""
        return {}

    def figures(self, module: nn.Module) -> Mapping[str, float]:
        """Further figures of a validation, for the log."""
        return {}

    def preview(self, module: nn.Module) -> Image | None:
        """A picture that shows how far training is."""
        return None


def check_accumulation(task: Task, accumulation: int) -> None:
    """Raises InputError where `task` cannot split its batches."""
    if accumulation > 1 and not task.splits_batches:
        reason = "its loss compares the examples of a batch with each other"
        raise InputError(f"{task.name}.train.accumulation = {accumulation}: expected 1, because {reason}")


def loss_weights(weights: Mapping[str, float], defaults: Mapping[str, float]) -> dict[str, float]:
    """`weights`, and the defaults of the other terms. Raises InputError for a term that has no default."""
    for name in weights:
        if name not in defaults:
            raise unknown("loss term", name, defaults)
    return {**defaults, **weights}
