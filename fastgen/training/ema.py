"""Exponential moving averages of a network's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Average of a module's parameters and floating-point buffers, float32; it starts with the weights of step `begin`.

    The decay rises as (1 + n) / (10 + n) towards `decay`, so that the initial random weights have little effect in a short
    run. With decay 0 there is no average: `weights` are the module's tensors, not a copy.
    """

    def __init__(self, module: nn.Module, decay: float, begin: int = 0) -> None:
        self.decay, self.begin = decay, begin
        state = module.state_dict()
        self.weights = {name: v.detach().clone() if decay else v.detach() for name, v in state.items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """After optimiser step `step`, counted from 0."""
        if not self.decay:
            return
        count = step - self.begin
        decay = min(self.decay, (1 + count) / (10 + count)) if count >= 0 else 0.0
        averages, values = [], []
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                averages.append(self.weights[name])
                values.append(value)
            else:
                self.weights[name].copy_(value)
        torch._foreach_lerp_(averages, values, 1 - decay)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take the averages of a checkpoint. Raises ValueError for those of another network."""
        for name in self.weights.keys() | weights.keys():
            if name not in weights or name not in self.weights or weights[name].shape != self.weights[name].shape:
                raise ValueError(f"{name} is missing, unexpected, or of another shape")
        for name, value in weights.items():
            self.weights[name].copy_(value)

    @contextmanager
    def swapped_in(self, module: nn.Module) -> Iterator[None]:
        """Inside the block the module has the averaged weights and is in eval mode."""
        training = module.training
        weights = {k: v.detach().clone() for k, v in module.state_dict().items()} if self.decay else None
        if weights is not None:
            module.load_state_dict(self.weights)
        module.eval()
        try:
            yield
        finally:
            if weights is not None:
                module.load_state_dict(weights)
            module.train(training)
