"""Pictures of how far a diffusion model is: a row of the validation split's own images above a row of generated ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastgen.config import Sampling
from fastgen.sampling import initial_latents, sample
from fastgen.schedulers import make_scheduler
from fastgen.solver import compile_table
from fastgen.tables import SolverTable
from fastgen.training.diffusion import Preview
from fastgen.training.precision import Precision
from fastgen.training.sources import Conditions, Space, stack_rows

COUNT = 8


def default_table(scheduler_config: Mapping[str, Any], sampling: Sampling) -> SolverTable:
    """The solver that a model generates with unless told otherwise. Raises InputError when there is no such solver."""
    scheduler = make_scheduler(sampling.scheduler, scheduler_config)
    return compile_table(scheduler, sampling.num_inference_steps, name=sampling.scheduler)


def sampled_preview(
    space: Space,
    conditions: Conditions,
    rows: np.ndarray,
    scheduler_config: Mapping[str, Any],
    sampling: Sampling,
    precision: Precision,
) -> Preview:
    """A function that draws the same conditions from the same noise every time, as `generate` would by default."""
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, COUNT).astype(int))]
    table = default_table(scheduler_config, sampling)
    seeds = list(range(len(rows)))

    def preview(module: nn.Module) -> Image.Image:
        def network(x: Tensor, timestep: Any, condition: Tensor) -> Tensor:
            timesteps = torch.as_tensor(timestep, dtype=torch.float32, device=x.device).expand(len(x))
            with precision.autocast():
                return module(x, timesteps, condition).float()

        cond, uncond = conditions.fixed(rows)
        x = initial_latents(table, seeds, space.shape, xp=torch, device=precision.device)
        x = sample(network, table, x, cond, seeds=seeds, guidance_scale=sampling.guidance_scale, uncond=uncond[:1])
        return stack_rows(space.truth(rows), space.images(x))

    return preview
