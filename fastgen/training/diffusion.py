"""The denoising objective, whatever the condition and the space."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from fastgen.errors import InputError, first_line
from fastgen.training.draws import VALIDATION, Draws
from fastgen.training.losses import Denoised, Objective, evaluate
from fastgen.training.sources import NOISE, TIMESTEP, ConditionSource, Space
from fastgen.training.tasks import Task

Preview = Callable[[nn.Module], Image.Image]


class DiffusionTask(Task):
    """Predict the noise, the clean sample or the velocity from a noisy sample (Ho et al., Denoising Diffusion Probabilistic
    Models, 2020, eq. 14); the schedule's `prediction_type` says which.

    Training optimises the objective's terms of the current epoch, step * batch_size / number of training rows.
    Validation always takes the plain squared error of the prediction. So its losses can be compared between runs with
    different objectives, and over a run in which further terms start at later epochs.
    """

    name = "unet"

    def __init__(
        self,
        module: nn.Module,
        space: Space,
        conditions: ConditionSource,
        scheduler_config: Mapping[str, Any],
        rows: tuple[np.ndarray, np.ndarray],
        *,
        dropout: float,
        flip: bool,
        jitter: float = 0,
        timestep_shift: float = 1,
        objective: Objective | None = None,
        preview: Preview | None = None,
    ) -> None:
        super().__init__(module, rows)
        self.space, self.conditions = space, conditions
        self.dropout, self.flip, self.jitter, self._preview = dropout, flip, jitter, preview
        self.objective = objective or Objective()
        self.timestep_shift = timestep_shift
        if self.objective.lpips is not None:
            self.objective.lpips.to(space.device)
        self.schedule = NoiseSchedule(scheduler_config)
        self._sums: dict[str, Tensor] = {}  # of each term since `parts` was called: (2,) losses and examples

    def losses(self, module: nn.Module, rows: np.ndarray, draws: Draws) -> Tensor:
        changes = (self.flip, self.jitter) if module.training else (False, 0.0)
        shift = 1 if draws.step == VALIDATION else self.timestep_shift
        x0 = self.space.clean(rows, draws, *changes)  # (b, C, h, w)
        condition = self.conditions.of(rows, draws, self.dropout if module.training else 0.0)
        noise = draws.normal(NOISE, self.space.shape)
        timesteps = draws.timesteps(TIMESTEP, self.schedule.count, shift)  # (b,)
        noisy, target = self.schedule.example(x0, noise, timesteps)
        prediction = module(noisy, timesteps.float(), *condition).float()  # (b, C, h, w)
        if draws.step == VALIDATION:
            return functional.mse_loss(prediction, target, reduction="none").mean(dim=(1, 2, 3))
        batch = Denoised(
            prediction,
            target,
            x0,
            self.schedule.alphas_cumprod(timesteps),
            self.schedule.prediction_type,
            implied_x0=partial(self.schedule.x0, noisy, prediction, timesteps),
            images=partial(self.space.pictures, rows, draws, *changes),
            space=self.space,
        )
        epoch = draws.step * draws.batch_size / len(self.train_rows)
        total, terms = evaluate(self.objective, self.objective.active(epoch), batch)
        for name, values in terms.items():
            loss = values.detach().double().sum()
            pair = torch.stack([loss, torch.full_like(loss, len(values))])
            self._sums[name] = self._sums.get(name, 0) + pair
        return total

    def parts(self, total: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, float]:
        """{"loss_lpips": mean of the unweighted term per example, ...} since the last call; empty for a single term.

        `total` adds up a tensor over the processes. Waits for the device once.
        """
        names = list(self.objective.active(math.inf))
        if len(names) == 1:
            return {}
        zero = torch.zeros(2, dtype=torch.float64, device=self.space.device)
        sums = torch.stack([self._sums.get(name, zero) for name in names])  # (n, 2): of the losses, of the examples
        self._sums = {}
        rows = zip(names, total(sums).tolist(), strict=True)
        return {f"loss_{name}": loss / count for name, (loss, count) in rows if count}

    def preview(self, module: nn.Module) -> Image.Image | None:
        return self._preview(module) if self._preview else None


class NoiseSchedule:
    """The forward process of a diffusers scheduler config with variance-preserving noise."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        from diffusers import DDPMScheduler

        try:
            self._scheduler: Any = DDPMScheduler.from_config(dict(config))
        except (ValueError, TypeError, RuntimeError, NotImplementedError, IndexError) as error:
            raise InputError(f"scheduler: DDPMScheduler refuses it: {first_line(error)}") from None
        self.count = int(self._scheduler.config.num_train_timesteps)
        if self.count < 1:
            raise InputError(f"scheduler: num_train_timesteps = {self.count}: expected at least 1")
        self.prediction_type = str(self._scheduler.config.prediction_type)
        if self.prediction_type not in ("epsilon", "sample", "v_prediction"):
            expected = "epsilon, sample or v_prediction"
            raise InputError(f"scheduler.prediction_type = {self.prediction_type!r}: expected {expected}")
        if self.prediction_type == "epsilon" and float(self._scheduler.alphas_cumprod[-1]) <= 0:
            # Lin et al., Common Diffusion Noise Schedules and Sample Steps are Flawed, 2024, section 3.2
            reason = "the last timestep is nothing but noise, from which noise says nothing of the image"
            flag = "scheduler.rescale_betas_zero_snr (zero terminal SNR)"
            raise InputError(f"{flag} with prediction_type 'epsilon': {reason}; use prediction_type = \"v_prediction\"")

    def example(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """(noisy samples, target of the prediction), both (b, C, h, w)."""
        noisy = self._scheduler.add_noise(x0, noise, timesteps)
        if self.prediction_type == "v_prediction":  # Salimans & Ho, Progressive Distillation, 2022, appendix D
            return noisy, self._scheduler.get_velocity(x0, noise, timesteps)
        return noisy, noise if self.prediction_type == "epsilon" else x0

    def alphas_cumprod(self, timesteps: Tensor) -> Tensor:
        """(b,) float32: the share of the clean sample's variance in the noisy one."""
        return self._scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()

    def x0(self, noisy: Tensor, prediction: Tensor, timesteps: Tensor) -> Tensor:
        """The clean samples (b, C, h, w) that a prediction implies (DDPM, eq. 15; Salimans & Ho, appendix D)."""
        if self.prediction_type == "sample":
            return prediction
        a = self.alphas_cumprod(timesteps)[:, None, None, None]  # (b, 1, 1, 1)
        if self.prediction_type == "v_prediction":
            return torch.sqrt(a) * noisy - torch.sqrt(1 - a) * prediction
        return (noisy - torch.sqrt(1 - a) * prediction) / torch.sqrt(a)
