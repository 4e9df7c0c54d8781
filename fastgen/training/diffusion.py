"""The denoising objective of both families."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from fastgen.errors import InputError
from fastgen.training.draws import Draws
from fastgen.training.sources import NOISE, TIMESTEP, Conditions, Space

Preview = Callable[[nn.Module], Image.Image]


class DiffusionTask:
    """Predict what noise did to clean samples (Ho et al., Denoising Diffusion Probabilistic Models, 2020, eq. 14), as
    noise, clean sample or velocity, whichever the schedule's `prediction_type` names."""

    name = "unet"
    splits_batches = True

    def __init__(
        self,
        module: nn.Module,
        space: Space,
        conditions: Conditions,
        scheduler_config: Mapping[str, Any],
        rows: tuple[np.ndarray, np.ndarray],
        *,
        dropout: float,
        flip: bool,
        preview: Preview | None = None,
    ) -> None:
        self.module, self.space, self.conditions = module, space, conditions
        self.train_rows, self.validation_rows = rows
        self.dropout, self.flip, self._preview = dropout, flip, preview
        self.schedule = NoiseSchedule(scheduler_config)

    def losses(self, module: nn.Module, rows: np.ndarray, draws: Draws) -> Tensor:
        x0 = self.space.clean(rows, draws, self.flip and module.training)  # (b, C, h, w)
        condition = self.conditions.of(rows, draws, self.dropout if module.training else 0.0)
        noise = draws.normal(NOISE, self.space.shape)
        timesteps = draws.timesteps(TIMESTEP, self.schedule.count)  # (b,)
        noisy, target = self.schedule.example(x0, noise, timesteps)
        prediction = module(noisy, timesteps.float(), condition)  # (b, C, h, w)
        return functional.mse_loss(prediction.float(), target, reduction="none").mean(dim=(1, 2, 3))

    def figures(self, module: nn.Module) -> dict[str, float]:
        return {}

    def preview(self, module: nn.Module) -> Image.Image | None:
        return self._preview(module) if self._preview else None


class NoiseSchedule:
    """The forward process of a diffusers scheduler config with variance-preserving noise."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        from diffusers import DDPMScheduler

        self._scheduler: Any = DDPMScheduler.from_config(dict(config))
        self.count = int(self._scheduler.config.num_train_timesteps)
        self.prediction_type = str(self._scheduler.config.prediction_type)
        if self.prediction_type not in ("epsilon", "sample", "v_prediction"):
            expected = "epsilon, sample or v_prediction"
            raise InputError(f"scheduler.prediction_type = {self.prediction_type!r}: expected {expected}")

    def example(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """(noisy samples, what the network should say), both (b, C, h, w)."""
        noisy = self._scheduler.add_noise(x0, noise, timesteps)
        if self.prediction_type == "v_prediction":  # Salimans & Ho, Progressive Distillation, 2022, appendix D
            return noisy, self._scheduler.get_velocity(x0, noise, timesteps)
        return noisy, noise if self.prediction_type == "epsilon" else x0
