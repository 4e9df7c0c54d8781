"""AdamW, Adam, and Muon: orthogonalised momentum, which needs about half as many steps for convolutional networks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.presets import Training


def build_optimizer(module: nn.Module, recipe: Training, dtype: torch.dtype) -> torch.optim.Optimizer:
    """The recipe's optimiser. `dtype`: of the matrix products in Muon."""
    options = {"lr": recipe.learning_rate, "betas": recipe.adam_betas, "weight_decay": recipe.weight_decay}
    if recipe.optimizer in ("adamw", "adam"):
        kind = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam
        return kind(module.parameters(), fused=True, **options)  # type: ignore[arg-type]
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    matrices = [p for p in module.parameters() if p.ndim >= 2 and id(p) not in embeddings]
    others = [p for p in module.parameters() if p.ndim < 2 or id(p) in embeddings]
    return Muon(matrices, others, dtype, **options)  # type: ignore[arg-type]


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, its singular values set to about 1 (Jordan et al., Muon, 2024), for weights flattened to matrices
    (out, rest); AdamW for all other parameters.

    The update is scaled to AdamW's usual size, 0.2 per entry, so that both share one learning rate (Liu et al., Muon is
    Scalable for LLM Training, 2025, eq. 4).
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        dtype: torch.dtype = torch.float32,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
        momentum: float = 0.95,
    ) -> None:
        self.dtype, self.momentum = dtype, momentum
        groups = [{"params": list(matrices), "muon": True}, {"params": list(others), "muon": False}]
        super().__init__([g for g in groups if g["params"]], {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            update = self._muon if group["muon"] else self._adam
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update(parameter, parameter.grad, group), alpha=-group["lr"])

    def _muon(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(gradient, 1 - self.momentum)
        direction = gradient.lerp(state["momentum"], self.momentum).flatten(1)  # (out, rest)
        return orthogonal(direction, self.dtype).view_as(parameter) * (0.2 * max(direction.shape) ** 0.5)

    def _adam(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            state["step"] = torch.zeros(())
        beta1, beta2 = group["betas"]
        state["step"] += 1
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        step = float(state["step"])
        mean, square = state["exp_avg"] / (1 - beta1**step), state["exp_avg_sq"] / (1 - beta2**step)
        return mean / (square.sqrt() + 1e-8)


def orthogonal(matrix: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix (m, n) with singular values near 1, within [0.7, 1.2], by five Newton-Schulz iterations."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.to(dtype) / (matrix.norm().to(dtype) + 1e-7)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    for _ in range(5):
        gram = x @ x.T  # (m, m)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).to(matrix.dtype)
