"""torch.compile for training, whose gradients are compared with those of the network itself before the first step."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.errors import FastgenError
from fastgen.presets.recipe import Training
from fastgen.training.autocast import Precision
from fastgen.training.optimise import gradients
from fastgen.training.processes import Processes
from fastgen.training.state import State
from fastgen.training.tasks import Task

OPTIONS = {"fallback_random": True}  # dropout draws what it draws without compilation
# With this optimisation torch 2.13 compiles a UNet in bf16 on a CPU wrongly: the gradient is 0 below an upsampling layer.
CPU_OPTIONS = {"layout_optimization": False}
LARGEST_ERROR = 0.3  # of a parameter's gradient, relative; in bf16 rounding alone gives up to about 0.1
LEAST_SHARE = 1e-3  # of the norm of all gradients: smaller differences do not count
SHOWN = 3  # parameters that an error names


def compile_checked(task: Task, state: State, recipe: Training, precision: Precision, processes: Processes) -> None:
    """Compile the module in place, and run the next batch through it twice, compiled and not.

    Meanwhile weights that are all 0 have random values: a last layer of zeros would hide every gradient before it. Afterwards
    the weights are what they were. Raises FastgenError when the gradients differ: training would go on, with a wrong result.
    """
    state.module.compile(options=OPTIONS | (CPU_OPTIONS if precision.device.type == "cpu" else {}))
    zeros = [p for p in state.module.parameters() if not p.any()]
    generator = torch.Generator().manual_seed(recipe.seed)
    try:
        for parameter in zeros:
            parameter.detach().copy_(0.02 * torch.randn(parameter.shape, generator=generator))
        compiled = _gradients(task, state, recipe, precision, processes)
        with torch.compiler.set_stance("force_eager"):
            expected = _gradients(task, state, recipe, precision, processes)
    finally:
        for parameter in zeros:
            parameter.detach().zero_()
    task.parts(lambda sums: sums)  # forgets the losses of these batches
    _compare(task, expected, compiled)


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
    """Raises FastgenError when a parameter's compiled gradient is far from the expected one."""
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
