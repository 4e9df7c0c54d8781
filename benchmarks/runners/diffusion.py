"""diffusers as its users write it: the pipeline, the pipeline with torch.compile, and loops by hand."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgen.models.precision import TORCH_DTYPES
from fastgen.sampling.schedulers import default_name, make_scheduler


class _Runner:
    build_s = 0.0
    note: str | None = None

    def __init__(self, opening: Mapping[str, Any]) -> None:
        if opening["threads"]:
            torch.set_num_threads(opening["threads"])
        self.dtype = opening["dtype"] or "fp32"
        self._type = TORCH_DTYPES[self.dtype]
        self._device = opening["device"]
        self._folder = Path(opening["model"])
        self.versions: dict[str, str] = {}

    @torch.inference_mode()
    def generate(self, job: Mapping[str, Any], latents: np.ndarray) -> np.ndarray:
        """(count, H, W, 3) uint8, in batches of job["batch"]."""
        parts = []
        for start in range(0, job["count"], job["batch"]):
            rows = slice(start, min(start + job["batch"], job["count"]))
            noise = torch.from_numpy(latents[rows]).to(self._device, self._type)
            given = job.get("prompts") or job["labels"]
            parts.append(self._batch(list(given[rows]), noise, job["steps"]))
        return np.concatenate(parts)

    def _batch(self, given: list[Any], noise: torch.Tensor, steps: int) -> np.ndarray:
        raise NotImplementedError

    def _with_solver(self, pipeline: Any, name: str) -> Any:
        """diffusers' own pipeline with the solver of this name, where the folder's is another one."""
        config = json.loads((self._folder / "scheduler" / "scheduler_config.json").read_text())
        if default_name(config) != name:
            pipeline.scheduler = make_scheduler(name, config)
        return pipeline


class Pipeline(_Runner):
    """StableDiffusionPipeline; with UNet and VAE in channels_last, and torch.compile on the UNet, where the side says so: both
    are what its documentation advises."""

    def __init__(self, opening: Mapping[str, Any]) -> None:
        from diffusers import StableDiffusionPipeline

        super().__init__(opening)
        pipeline = StableDiffusionPipeline.from_pretrained(self._folder, torch_dtype=self._type, safety_checker=None)
        pipeline = self._with_solver(pipeline.to(self._device), opening["scheduler"])
        pipeline.set_progress_bar_config(disable=True)
        if _is_channels_last(opening):
            pipeline.unet.to(memory_format=torch.channels_last)
            pipeline.vae.to(memory_format=torch.channels_last)
        if opening["name"] == "diffusers-compile":
            mode = "reduce-overhead" if self._device.startswith("cuda") else "default"
            pipeline.unet = torch.compile(pipeline.unet, mode=mode, fullgraph=True)
        self._pipeline, self._guidance = pipeline, opening["guidance_scale"]

    def _batch(self, given: list[Any], noise: torch.Tensor, steps: int) -> np.ndarray:
        images = self._pipeline(
            given, num_inference_steps=steps, guidance_scale=self._guidance, latents=noise, output_type="pil"
        ).images
        return np.stack([np.asarray(image) for image in images])


class TwoCalls(_Runner):
    """A text-to-image loop by hand: the UNet is called once with the prompt and once without it."""

    def __init__(self, opening: Mapping[str, Any]) -> None:
        from diffusers import StableDiffusionPipeline

        super().__init__(opening)
        parts = StableDiffusionPipeline.from_pretrained(self._folder, torch_dtype=self._type, safety_checker=None)
        self._parts = self._with_solver(parts.to(self._device), opening["scheduler"])
        self._guidance = opening["guidance_scale"]

    def _batch(self, given: list[Any], noise: torch.Tensor, steps: int) -> np.ndarray:
        parts = self._parts
        cond, uncond = self._encode(given), self._encode([""] * len(given))
        parts.scheduler.set_timesteps(steps, device=self._device)
        x = noise * parts.scheduler.init_noise_sigma
        for t in parts.scheduler.timesteps:
            scaled = parts.scheduler.scale_model_input(x, t)
            unconditional = parts.unet(scaled, t, uncond).sample
            conditional = parts.unet(scaled, t, cond).sample
            prediction = unconditional + self._guidance * (conditional - unconditional)
            x = parts.scheduler.step(prediction, t, x).prev_sample
        return _uint8(parts.vae.decode(x / parts.vae.config.scaling_factor).sample)

    def _encode(self, prompts: list[str]) -> torch.Tensor:
        tokenizer = self._parts.tokenizer
        ids = tokenizer(
            prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        ).input_ids
        return self._parts.text_encoder(ids.to(self._device))[0]


class Labels(_Runner):
    """The loop of a label-conditional model, in pixels or in latents, which has no pipeline in diffusers. A stochastic solver
    draws its own noise here: such images are others than ours."""

    def __init__(self, opening: Mapping[str, Any]) -> None:
        from fastgen.models.folder import load_model

        super().__init__(opening)
        model = load_model(self._folder)
        networks = model.networks()
        unet = networks["unet"].to(self._device, self._type)
        self._decoder = networks["vae_decoder"].to(self._device, self._type) if "vae_decoder" in networks else None
        if _is_channels_last(opening):
            unet = unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            if self._decoder is not None:
                self._decoder = self._decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if opening["name"] == "diffusers-compile":
            mode = "reduce-overhead" if self._device.startswith("cuda") else "default"
            unet = torch.compile(unet, mode=mode)  # type: ignore[assignment]
        self._space = model.space
        self._unet, self._objects, self._guidance = unet, dict(model.names or {}), opening["guidance_scale"]
        self._scheduler = make_scheduler(opening["scheduler"], model.scheduler_config)

    def _batch(self, given: list[Any], noise: torch.Tensor, steps: int) -> np.ndarray:
        labels = torch.zeros(len(given), len(self._objects))
        for row, names in zip(labels, given, strict=True):
            row[[self._objects[name] for name in names]] = 1
        x = noise * self._scheduler.init_noise_sigma
        labels = labels.to(noise)
        generator = torch.Generator(self._device).manual_seed(0)
        for t in self._timesteps(steps):
            prediction = self._predict(self._scheduler.scale_model_input(x, t), t.expand(len(x)), labels)
            x = self._scheduler.step(prediction, t, x, **self._noise(generator)).prev_sample
        if self._decoder is None:
            return _uint8(x)
        return _uint8(self._decoder(self._space.to_vae(x, lambda values: torch.from_numpy(values).to(x))))

    def _timesteps(self, steps: int) -> Iterator[torch.Tensor]:
        self._scheduler.set_timesteps(steps, device=self._device)
        yield from self._scheduler.timesteps

    def _noise(self, generator: torch.Generator) -> dict[str, Any]:
        return {"generator": generator} if "generator" in inspect.signature(self._scheduler.step).parameters else {}

    def _predict(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self._guidance == 1.0:
            return self._unet(x, t, labels)
        both = self._unet(torch.cat([x, x]), torch.cat([t, t]), torch.cat([torch.zeros_like(labels), labels]))
        uncond, cond = both.chunk(2)
        return uncond + self._guidance * (cond - uncond)


def _uint8(images: torch.Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8, as diffusers' image processor does it."""
    pixels = (images / 2 + 0.5).clamp(0, 1).float().permute(0, 2, 3, 1).cpu().numpy()
    return (pixels * 255).round().astype(np.uint8)


def _is_channels_last(opening: Mapping[str, Any]) -> bool:
    return opening["channels_last"] or opening["name"] == "diffusers-compile"


def open_runner(opening: Mapping[str, Any]) -> _Runner:
    if not (Path(opening["model"]) / "text_encoder").is_dir():
        if opening["name"] == "two-calls":
            raise ValueError("the loop by hand is for text models; `diffusers` is one for label models")
        return Labels(opening)
    return TwoCalls(opening) if opening["name"] == "two-calls" else Pipeline(opening)
