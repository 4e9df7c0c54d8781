"""The clean sample that a network's prediction implies, for pictures on the way. NumPy only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastgen.sampling.tables import SolverTable

FLOW = "FlowMatch"  # part of the class names of schedulers that move along x = (1 - s) * x0 + s * noise


def clean_coefficients(table: SolverTable, scheduler_config: Mapping[str, Any]) -> np.ndarray | None:
    """(R, 2) float64: row i predicts the clean sample x0 = u * input + w * prediction, with (u, w) = result[i] and the
    network's input `scale * x`.

    The input is alpha * x0 + sigma * noise, with alpha^2 = alphas_cumprod at the row's timestep (in between, interpolated), and
    the prediction is the noise, the sample or v = alpha * noise - sigma * x0 (Salimans and Ho 2022, appendix D). None for a
    scheduler in other terms, or one that gives the network a function of sigma in place of training's timesteps.
    """
    if FLOW in str(scheduler_config.get("_class_name")):
        sigmas = table.timesteps / float(scheduler_config.get("num_train_timesteps", 1000))
        return np.stack([np.ones_like(sigmas), -sigmas], axis=1)
    levels = alphas_cumprod(scheduler_config)
    times = table.timesteps
    if levels is None or times.min() < 0 or times.max() > len(levels) - 1 or (len(times) > 2 and times.max() < 2):
        return None
    values = np.clip(np.interp(times, np.arange(len(levels)), levels), 1e-8, 1.0)
    alpha, sigma = np.sqrt(values), np.sqrt(1 - values)
    of_type = {
        "epsilon": (1 / alpha, -sigma / alpha),
        "sample": (np.zeros_like(alpha), np.ones_like(alpha)),
        "v_prediction": (alpha, -sigma),
    }
    pair = of_type.get(table.prediction_type)
    return None if pair is None else np.stack(pair, axis=1)


def alphas_cumprod(config: Mapping[str, Any]) -> np.ndarray | None:
    """(T,) float64 of a diffusers scheduler's config: the product of 1 - beta up to each timestep. None for another one."""
    steps = int(config.get("num_train_timesteps", 1000))
    low, high = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    if config.get("trained_betas") is not None:
        betas = np.asarray(config["trained_betas"], np.float64)
    else:
        match config.get("beta_schedule", "linear"):
            case "linear":
                betas = np.linspace(low, high, steps)
            case "scaled_linear":
                betas = np.linspace(low**0.5, high**0.5, steps) ** 2
            case "squaredcos_cap_v2":  # Nichol and Dhariwal 2021, equation 17
                bar = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
                betas = np.minimum(1 - np.divide(bar[1:], bar[:-1]), 0.999)
            case "sigmoid":
                betas = 1 / (1 + np.exp(-np.linspace(-6, 6, steps))) * (high - low) + low
            case _:
                return None
    values = np.cumprod(1 - betas)
    return _zero_terminal_snr(values) if config.get("rescale_betas_zero_snr") else values


def _zero_terminal_snr(values: np.ndarray) -> np.ndarray:
    """Shifted and scaled so that the last timestep is noise alone (Lin et al. 2023, algorithm 1)."""
    roots = np.sqrt(values)
    return ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
