"""The sides of a comparison: this package's engines, and diffusers' own pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.matrix import Opened, Side
from fastgen.pipeline import load

LABELS = (["gray cube"], ["red cube", "blue sphere"], ["green cylinder"], ["yellow cube", "cyan sphere", "brown cube"])
PROMPTS = (
    "A red dragon with wings and horns. The monster is attacking.",
    "A small blue slime with one big eye. The monster is idling.",
    "Green robot with a sword and a shield.",
    "Purple insect with many legs and big teeth. The monster is moving.",
)


def conditions(family: str, count: int) -> dict[str, list[Any]]:
    """`count` prompts or label lists, as keywords of Pipeline.generate."""
    values: Sequence[Any] = PROMPTS if family == "text" else LABELS
    return {"prompts" if family == "text" else "labels": [values[i % len(values)] for i in range(count)]}


def engine(name: str, folder: Path, *, batch_size: int, threads: int | None, steps: int | None) -> Side:
    """An engine of this package generating one batch, image i from seed i, with the model's own sampling but for the steps."""

    def open_side() -> Opened:
        pipeline = load(folder, name, threads=threads)
        given = conditions(pipeline.spec.family, batch_size)

        def generate() -> np.ndarray:
            images = pipeline.generate(
                **given, seeds=range(batch_size), batch_size=batch_size, num_inference_steps=steps
            )
            return np.stack([np.asarray(image) for image in images])

        return Opened(generate, pipeline.engine.dtype)

    return Side(name, open_side)


def diffusers_pipeline(folder: Path, latents: np.ndarray, *, threads: int, steps: int, guidance_scale: float) -> Side:
    """StableDiffusionPipeline as its users call it, from the given initial latents (B, C, h, w)."""

    def open_side() -> Opened:
        import torch
        from diffusers import StableDiffusionPipeline

        torch.set_num_threads(threads)
        pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        pipeline.set_progress_bar_config(disable=True)
        prompts = conditions("text", len(latents))["prompts"]

        def generate() -> np.ndarray:
            images = pipeline(
                prompts,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                latents=torch.from_numpy(latents),
                output_type="pil",
            ).images
            return np.stack([np.asarray(image) for image in images])

        return Opened(generate, "fp32")

    return Side("diffusers", open_side)
