"""Exponential moving average of a network's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Average of a module's parameters and floating-point buffers, float32, begun with its initial weights.

    The decay rises as (1 + n) / (10 + n) towards `decay`, so that a short run's average forgets its random beginning.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """After optimiser step `step`, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, values = [], []
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                averages.append(self.weights[name])
                values.append(value)
            else:
                self.weights[name].copy_(value)
        torch._foreach_lerp_(averages, values, 1 - decay)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        for name, value in weights.items():
            self.weights[name].copy_(value)

    @contextmanager
    def swapped_in(self, module: nn.Module) -> Iterator[None]:
        """The module has the averaged weights, and is in eval mode, inside the block."""
        training, own = module.training, {k: v.detach().clone() for k, v in module.state_dict().items()}
        module.load_state_dict(self.weights)
        module.eval()
        try:
            yield
        finally:
            module.load_state_dict(own)
            module.train(training)
