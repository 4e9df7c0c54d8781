"""torch.compile for training, whose gradients are compared with those of the network itself before the first step."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastgen.errors import FastgenError, first_line
from fastgen.presets.recipe import Training
from fastgen.training.autocast import Precision
from fastgen.training.logs import say
from fastgen.training.optimise import gradients
from fastgen.training.processes import Processes
from fastgen.training.state import State
from fastgen.training.tasks import Task

OPTIONS = {"fallback_random": True}  # dropout draws what it draws without compilation
# With this optimisation torch 2.13 compiles a UNet in bf16 on a CPU wrongly: the gradient is 0 below an upsampling layer.
CPU_OPTIONS = {"layout_optimization": False}
AUTO_STEPS = 500  # fewer are over before compilation, a minute or more, has paid
LARGEST_ERROR = 0.3  # of a parameter's gradient, relative; larger ones are held against fp32
ROUNDING = 3.0  # times the error that the network itself has against fp32: what rounding may do
LEAST_SHARE = 1e-3  # of the norm of all gradients: smaller differences do not count
REMEDY = "; train with compile = false"
SHOWN = 3  # parameters that an error names


def prepare(task: Task, state: State, recipe: Training, precision: Precision, processes: Processes) -> None:
    """Compile the module in place where the recipe says so. With "auto" that is where at least AUTO_STEPS steps are left; where
    it fails then, a line says why, and training goes on without it."""
    left = recipe.steps - state.step
    if recipe.compile is True and left:
        compile_checked(task, state, recipe, precision, processes)
    elif recipe.compile == "auto" and left >= AUTO_STEPS:
        try:
            compile_checked(task, state, recipe, precision, processes)
        except FastgenError as error:
            state.module._compiled_call_impl = None  # what nn.Module.compile sets
            state.optimizer.zero_grad(set_to_none=True)
            say(f"note: {str(error).removesuffix(REMEDY)}; training goes on without it")


def compile_checked(task: Task, state: State, recipe: Training, precision: Precision, processes: Processes) -> None:
    """Compile the module in place, and run the next batch through it twice, compiled and not.

    Meanwhile weights that are all 0 have random values: a last layer of zeros would hide every gradient before it. Afterwards
    the weights are what they were. Raises FastgenError when it cannot be compiled, as without a C++ compiler, and when the
    gradients differ by more than rounding: training would go on, with a wrong result.
    """
    state.module.compile(options=OPTIONS | (CPU_OPTIONS if precision.device.type == "cpu" else {}))
    zeros = [p for p in state.module.parameters() if not p.any()]
    generator = torch.Generator().manual_seed(recipe.seed)
    try:
        for parameter in zeros:
            parameter.detach().copy_(0.02 * torch.randn(parameter.shape, generator=generator))
        try:
            compiled = _gradients(task, state, recipe, precision, processes)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = first_line(getattr(error, "inner_exception", error))
            raise FastgenError(f"{task.name}: torch.compile does not work here: {reason}{REMEDY}") from None
        with torch.compiler.set_stance("force_eager"):
            expected = _gradients(task, state, recipe, precision, processes)
            wrong = _far(compiled, expected)
            if wrong and precision.name != "fp32":
                exact = _gradients(task, state, recipe, replace(precision, name="fp32"), processes)
                wrong = {n: e for n, e in wrong.items() if not _is_rounding(compiled[n], expected[n], exact[n])}
    finally:
        for parameter in zeros:
            parameter.detach().zero_()
    task.parts(lambda sums: sums)  # forgets the losses of these batches
    if wrong:
        shown = ", ".join(f"{name} by {error:.0%}" for name, error in list(wrong.items())[:SHOWN])
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise FastgenError(
            f"{task.name}: torch.compile (torch {torch.__version__}) computes other gradients than the network itself: {shown}"
            f"{more}{REMEDY}"
        )


def _gradients(
    task: Task, state: State, recipe: Training, precision: Precision, processes: Processes
) -> dict[str, Tensor]:
    """The gradients of the next batch, by the parameters' names, 0 where there is none; the module keeps none."""
    state.optimizer.zero_grad(set_to_none=True)
    gradients(task, state, recipe, precision, processes)
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.float() for n, p in state.module.named_parameters()}
    state.optimizer.zero_grad(set_to_none=True)
    return found


def _far(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """The relative errors of the gradients that are far from the expected ones, by the parameters' names."""
    whole = float(torch.stack([gradient.norm() for gradient in expected.values()]).norm())
    errors = {name: _error(found[name], gradient) for name, gradient in expected.items()}
    norms = {name: float(gradient.norm()) for name, gradient in expected.items()}
    far = {n: e for n, e in errors.items() if e > LARGEST_ERROR * norms[n] and e > LEAST_SHARE * whole}
    return {name: error / norms[name] if norms[name] else float("inf") for name, error in far.items()}


def _is_rounding(compiled: Tensor, expected: Tensor, exact: Tensor) -> bool:
    """Whether the compiled gradient is about as near to the one in fp32 as the network's own. In a trained network the sums
    over many examples nearly cancel, and bf16 leaves little of the small gradients."""
    return _error(compiled, exact) <= ROUNDING * _error(expected, exact)


def _error(gradient: Tensor, expected: Tensor) -> float:
    return float((gradient - expected).norm())
