"""The reference: diffusers' own denoising loop, as its pipelines write it, with the noise of fastgen.sampling.noise."""

from __future__ import annotations

import contextlib
import inspect
import json
import sys
from unittest import mock

import torch
from diffusers import DDPMScheduler

from fastgen.sampling.noise import normal


def config(cls=DDPMScheduler, **options) -> dict:
    """The scheduler config that a model folder would hold."""
    return json.loads(cls(**options).to_json_string())


def run_diffusers(scheduler, timesteps, network, x, *, seeds, begin=0, first_stream=1, trail=None, **step_options):
    """scale_model_input, network, step for every timestep; row i draws the noise of stream first_stream + i.

    `begin`: the schedule index of timesteps[0], as image-to-image pipelines set it. `trail`: a list for the states.
    """
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    for row, timestep in enumerate(timesteps):
        with _noise_of_stream(type(scheduler), seeds, first_stream + row):
            network_input = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
            prediction = network(network_input, timestep)
            if "prev_timestep" in inspect.signature(scheduler.step).parameters:  # as unCLIP's pipeline passes it
                step_options["prev_timestep"] = timesteps[row + 1] if row + 1 < len(timesteps) else None
            x = scheduler.step(prediction, timestep, x, return_dict=False, **step_options)[0]
        if trail is not None:
            trail.append(x)
    return x


@contextlib.contextmanager
def _noise_of_stream(scheduler_class, seeds, stream):
    def draw(shape, *, dtype=None, **_):
        return torch.from_numpy(normal(seeds, stream, tuple(shape)[1:])).to(dtype)

    module = sys.modules[scheduler_class.__module__]
    if not hasattr(module, "randn_tensor"):
        yield
        return
    with mock.patch.object(module, "randn_tensor", draw):
        yield


class Denoiser:
    """A small fixed nonlinear network that behaves like a trained one: it guesses a bounded clean sample (B, C, H, W)
    from the noised one, and says it as epsilon, v or sample. Scalar or (B,) timesteps."""

    def __init__(
        self, alphas_cumprod, prediction_type: str = "epsilon", channels: int = 3, dtype=torch.float32
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.kernel = torch.randn(channels, channels, 3, 3, generator=generator).to(dtype) / 3
        self.alphas_cumprod = torch.as_tensor(alphas_cumprod).to(torch.float64)
        self.prediction_type = prediction_type
        self.calls: list[int] = []

    def __call__(self, sample, timestep, cond=None):
        self.calls.append(sample.shape[0])
        time = torch.as_tensor(timestep, dtype=torch.float64).reshape(-1, 1, 1, 1)
        level = torch.clamp(time, 0, len(self.alphas_cumprod) - 1)
        low, high = self.alphas_cumprod[level.floor().long()], self.alphas_cumprod[level.ceil().long()]
        alpha_squared = low + (high - low) * (level - level.floor())
        alpha, sigma = alpha_squared.sqrt().to(sample.dtype), (1 - alpha_squared).sqrt().to(sample.dtype)
        clean = torch.nn.functional.conv2d(sample, self.kernel, padding=1) + torch.sin(time / 100).to(sample.dtype)
        if cond is not None:
            clean = clean + cond.reshape(-1, 1, 1, 1)
        clean = 1.5 * torch.tanh(clean)
        if self.prediction_type == "sample":
            return clean
        if self.prediction_type == "v_prediction":
            return (alpha * sample - clean) / sigma
        return (sample - alpha * clean) / sigma
