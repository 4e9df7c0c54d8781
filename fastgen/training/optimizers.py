"""AdamW, Adam, and Muon: orthogonalised momentum, which needs about half as many steps for convolutional networks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.presets import Training

BATCH = 2**24  # entries of the matrices that Muon computes together


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
    Scalable for LLM Training, 2025, eq. 4). Matrices of one size are computed together: a network has a few sizes and
    hundreds of matrices.
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
            trained = [p for p in group["params"] if p.grad is not None]
            update, batches = (self._muon, _alike(trained)) if group["muon"] else (self._adam, [trained])
            for parameters in filter(None, batches):
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, update(parameters, group), alpha=-group["lr"])

    def _muon(self, parameters: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        (momenta,) = self._states(parameters, "momentum")
        gradients = _gradients(parameters)
        torch._foreach_lerp_(momenta, gradients, 1 - self.momentum)
        directions = torch.stack(
            [_wide(d) for d in torch._foreach_lerp(gradients, momenta, self.momentum)]
        )  # (B, m, n)
        updates = orthogonal(directions, self.dtype) * (0.2 * max(directions.shape[1:]) ** 0.5)
        return [(u.T if _is_tall(p) else u).reshape(p.shape) for u, p in zip(updates, parameters, strict=True)]

    def _adam(self, parameters: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        means, squares = self._states(parameters, "exp_avg", "exp_avg_sq")
        steps = [self.state[p].setdefault("step", torch.zeros(())) for p in parameters]
        gradients, (beta1, beta2) = _gradients(parameters), group["betas"]
        torch._foreach_add_(steps, 1)
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)
        counts = [float(step) for step in steps]  # on the CPU
        scales = torch._foreach_sqrt(torch._foreach_div(squares, [1 - beta2**n for n in counts]))
        torch._foreach_add_(scales, 1e-8)
        return list(torch._foreach_div(torch._foreach_div(means, [1 - beta1**n for n in counts]), scales))

    def _states(self, parameters: list[Tensor], *names: str) -> list[list[Tensor]]:
        """For each name the parameters' states of this name, zeros at first."""
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter].update({name: torch.zeros_like(parameter) for name in names})
        return [[self.state[p][name] for p in parameters] for name in names]


def _gradients(parameters: list[Tensor]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _alike(parameters: list[Tensor]) -> list[list[Tensor]]:
    """The parameters in batches of matrices with the same sizes, whichever is the longer side, of at most BATCH entries."""
    batches: dict[Any, list[list[Tensor]]] = {}
    for parameter in parameters:
        sizes = parameter.device, parameter.dtype, *sorted((len(parameter), parameter[0].numel()))
        same = batches.setdefault(sizes, [[]])
        if (len(same[-1]) + 1) * parameter.numel() > BATCH and same[-1]:
            same.append([])
        same[-1].append(parameter)
    return [batch for same in batches.values() for batch in same]


def _is_tall(parameter: Tensor) -> bool:
    return len(parameter) > parameter[0].numel()


def _wide(parameter: Tensor) -> Tensor:
    """(m, n) with m <= n, of (out, ...)."""
    matrix = parameter.flatten(1)
    return matrix.T if _is_tall(parameter) else matrix


def orthogonal(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Matrices (B, m, n), m <= n, with singular values near 1, within [0.7, 1.2], by five Newton-Schulz iterations."""
    a, b, c = 3.4445, -4.7750, 2.0315
    norms = torch.linalg.matrix_norm(matrices, keepdim=True)
    x = (matrices / (norms + 1e-7)).to(dtype)
    for _ in range(5):
        gram = x @ x.mT  # (B, m, m)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(matrices.dtype)
