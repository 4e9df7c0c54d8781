"""Whether a solver's steps are fit for a noise schedule: what they make of the one problem whose answer is known."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastgen.errors import InputError
from fastgen.sampling.schedulers import DIFFUSION, noise_process
from fastgen.sampling.tables import SolverTable

# The most growth, by the number of steps. `iclevr-64`, whose score is .97, has .97 with Heun in 100 steps, at a growth of 1.04,
# .93 in 75 (1.09), .72 in 60 (1.19), .15 in 25 (3.4). In few steps inputs grow with every schedule, and pictures are rough.
STEPS, MOST = (10, 25), (4.0, 1.06)  # between them on a line


def refuse_unstable(table: SolverTable, scheduler: Any) -> None:
    """Raises InputError where steps of a solver are too coarse for the noise schedule of `scheduler`, of diffusers.

    For data from N(0, 1) the best prediction is a known multiple of the network's input, and every input has unit variance.
    Most solvers keep it there at any number of steps. A second-order solver that corrects each step by the trapezium rule in
    sigma (Heun, KDPM2) does not where sigma falls by a large factor in one step: its inputs grow by up to a thousand. No
    network has seen such inputs, so pictures would be blurs, or noise. Schedules other than `DIFFUSION` are not looked at.
    """
    growth = input_growth(table, scheduler)
    if growth > np.interp(table.num_inference_steps, STEPS, MOST):
        raise InputError(
            "its steps are too coarse for this noise schedule: even with perfect predictions the network's inputs would become "
            f"{growth:.3g} times too large; take more steps, or a solver without this limit, such as unipc, dpmpp-2m or euler"
        )


def input_growth(table: SolverTable, scheduler: Any) -> float:
    """The largest standard deviation of the network's inputs, and of the result, on data from N(0, 1) with perfect
    predictions; 1 for a solver that is exact there, and for a schedule that is not of `DIFFUSION`. Clipping is left out."""
    optimal = _optimal_predictions(table, scheduler)
    if optimal is None:
        return 1.0
    # rows of coefficients of (clean sample, initial noise, noise of every step), which are independent
    x = np.zeros(2 + len(table))
    x[:2] = table.init_alpha, table.init_sigma
    history = np.zeros((table.depth, len(x)))
    deviations = []
    for i, factor in enumerate(optimal):
        deviations.append(table.scale[i] * np.linalg.norm(x))
        net = factor * table.scale[i] * x
        x0 = table.x0_p[i] * x + table.x0_q[i] * net
        history = np.roll(history, 1, axis=0)
        history[0] = table.p[i] * x + table.q[i] * net + table.r[i] * x0
        x = table.a[i] * x + table.b[i] @ history + table.d[i] * x0
        x[2 + i] += table.c[i]
    return float(max(*deviations, np.linalg.norm(x)))


def _optimal_predictions(table: SolverTable, scheduler: Any) -> np.ndarray | None:
    """(R,): the best prediction at each row as a multiple of the network's input, for data from N(0, 1)."""
    config = scheduler.config
    levels = getattr(scheduler, "alphas_cumprod", None)
    if levels is None or noise_process(type(scheduler), config) != DIFFUSION:
        return None
    alphas_cumprod = np.interp(table.timesteps, np.arange(len(levels)), np.asarray(levels, np.float64))
    factors = {
        "epsilon": np.sqrt(1 - alphas_cumprod),
        "sample": np.sqrt(alphas_cumprod),
        "v_prediction": np.zeros(len(table)),
    }
    return factors.get(table.prediction_type)
