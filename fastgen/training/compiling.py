"""torch.compile for training, whose gradients are compared with those of the network itself before the first step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgen.errors import FastgenError
from fastgen.presets.recipe import Training
from fastgen.training.autocast import Precision
from fastgen.training.optimise import gradients
from fastgen.training.processes import Processes
from fastgen.training.state import State
from fastgen.training.tasks import Task

# With its choice of layouts, torch 2.13 compiles UNets in bf16 for a CPU to code whose gradient is 0 below an upsampling layer.
CPU_OPTIONS = {"layout_optimization": False}
LARGEST_ERROR = 0.3  # of a parameter's gradient, relative; in bf16 rounding alone gives up to about 0.1
LEAST_SHARE = 1e-3  # of the norm of all gradients: smaller differences do not count
SHOWN = 3  # parameters that an error names


def compile_checked(task: Task, state: State, recipe: Training, precision: Precision, processes: Processes) -> None:
    """Compile the module in place, and run one batch through it both ways. Weights that are all 0 are random meanwhile: a last
    layer of zeros would hide every gradient before it.

    Raises FastgenError when the compiled module's gradients are others: it would train, but another network.
    """
    options = dict(CPU_OPTIONS) if precision.device.type == "cpu" else {}
    if any(isinstance(m, nn.Dropout) and m.p > 0 for m in state.module.modules()):
        options["fallback_random"] = True  # the same units are dropped
    state.module.compile(options=options)
    zeros = [p for p in state.module.parameters() if not p.any()]
    generator = torch.Generator().manual_seed(recipe.seed)
    try:
        for parameter in zeros:
            _set(parameter, 0.02 * torch.randn(parameter.shape, generator=generator))
        compiled = _gradients(task, state, recipe, precision, processes)
        with torch.compiler.set_stance("force_eager"):
            expected = _gradients(task, state, recipe, precision, processes)
    finally:
        for parameter in zeros:
            _set(parameter, torch.zeros(parameter.shape))
    task.parts(lambda sums: sums)  # forgets the losses of these batches
    _compare(task, expected, compiled)


@torch.no_grad()
def _set(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value)


def _gradients(
    task: Task, state: State, recipe: Training, precision: Precision, processes: Processes
) -> dict[str, Tensor]:
    """The gradients of the next batch, by the parameters' names; the module keeps none."""
    state.optimizer.zero_grad(set_to_none=True)
    gradients(task, state, recipe, precision, processes)
    found = {n: p.grad.float() for n, p in state.module.named_parameters() if p.grad is not None}
    state.optimizer.zero_grad(set_to_none=True)
    return found


def _compare(task: Task, expected: dict[str, Tensor], compiled: dict[str, Tensor]) -> None:
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    wrong = {}
    for name, gradient in expected.items():
        norm, error = gradient.norm(), (gradient - compiled.get(name, torch.zeros_like(gradient))).norm()
        if error > LARGEST_ERROR * norm and error > LEAST_SHARE * whole:
            wrong[name] = float(error / norm)
    if wrong:
        shown = ", ".join(f"{name} by {error:.0%}" for name, error in list(wrong.items())[:SHOWN])
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise FastgenError(
            f"{task.name}: torch.compile (torch {torch.__version__}) computes other gradients than the network itself: {shown}"
            f"{more}; train with compile = false"
        )
