"""Previews of a diffusion model in training. Top: validation images; below: generated images for the same conditions, then
for the conditions in the preset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastgen.errors import InputError
from fastgen.files.jsonfiles import brief, located
from fastgen.files.names import check_known, check_labels, check_text
from fastgen.files.png import in_rows, sheet
from fastgen.presets import Preset
from fastgen.sampling.compile import TableCompiler
from fastgen.sampling.defaults import Sampling
from fastgen.sampling.loop import initial_latents, sample
from fastgen.sampling.tables import SolverTable, format_key
from fastgen.training.autocast import Precision
from fastgen.training.diffusion import Preview
from fastgen.training.sources import ConditionSource, Space

COUNT = 8  # images side by side, and generated at a time
MAX_FIXED = 64  # conditions in a preset
CELL = 96  # px, at least, so that captions can be read


@dataclass(frozen=True)
class PresetConditions:
    """The conditions, tensors (n, ...), of a preset's own previews, and their n captions."""

    condition: tuple[Tensor, ...]
    captions: tuple[str, ...]


def default_table(scheduler_config: Mapping[str, Any], sampling: Sampling) -> SolverTable:
    """The solver table that `generate` uses for this model by default. Raises InputError when there is no such solver."""
    return TableCompiler(scheduler_config).table(format_key(sampling.scheduler, sampling.num_inference_steps))


def fixed_prompts(preset: Preset) -> tuple[str, ...]:
    """`preview.prompts` of a preset. Raises InputError for what is no list of texts."""
    return tuple(check_text(text, f"preview.prompts: entry {i}") for i, text in _entries(preset, "prompts"))


def fixed_labels(preset: Preset, objects: Mapping[str, int]) -> tuple[tuple[str, ...], ...]:
    """`preview.labels` of a preset. Raises InputError for what is no list of label lists, and for a label that is not
    among the data's objects, with the nearest one."""
    lists = []
    for i, labels in _entries(preset, "labels"):
        with located(f"preview.labels: entry {i}"):
            lists.append(check_labels(labels))
            check_known(lists[-1], objects)
    return tuple(lists)


def preview_rows(rows: np.ndarray) -> np.ndarray:
    """Up to COUNT of the examples, evenly spaced."""
    return rows[np.unique(np.linspace(0, len(rows) - 1, COUNT).astype(int))]


def sampled_preview(
    space: Space,
    conditions: ConditionSource,
    rows: np.ndarray,
    captions: Sequence[str],
    scheduler_config: Mapping[str, Any],
    sampling: Sampling,
    precision: Precision,
    extra: PresetConditions | None = None,
) -> Preview:
    """A function that draws the conditions of the examples `rows`, with their `captions`, and then the `extra` ones: from the
    same noise every time, as `generate` would by default."""
    table = default_table(scheduler_config, sampling)

    def preview(module: nn.Module) -> Image.Image:
        def network(x: Tensor, timestep: Any, *condition: Tensor) -> Tensor:
            timesteps = torch.as_tensor(timestep, dtype=torch.float32, device=x.device).expand(len(x))
            with precision.autocast():
                return module(x, timesteps, *condition).float()

        def generate(condition: tuple[Tensor, ...], count: int, first_seed: int) -> list[np.ndarray]:
            images: list[np.ndarray] = []
            for start in range(0, count, COUNT):
                part = tuple(tensor[start : start + COUNT] for tensor in condition)
                seeds = list(range(first_seed + start, first_seed + min(start + COUNT, count)))
                x = initial_latents(table, seeds, space.shape, xp=torch, device=precision.device)
                scale = sampling.guidance_scale if condition else 1.0
                none = tuple(tensor[:1] for tensor in uncond)
                x = sample(network, table, x, part, seeds=seeds, guidance_scale=scale, uncond=none)
                images += list(space.images(x))
            return images

        cond, uncond = conditions.pair(rows)
        images: list[Any] = [space.pixels[rows], generate(cond, len(rows), 0)]
        texts: list[Sequence[str]] = [[f"real: {text}" for text in captions], captions]
        if extra is not None:
            images += in_rows(generate(extra.condition, len(extra.captions), len(rows)), COUNT)
            texts += in_rows(extra.captions, COUNT)
        cells = [[Image.fromarray(image) for image in row] for row in images]
        return sheet(cells, texts, cell=max(CELL, cells[0][0].width))

    return preview


def _entries(preset: Preset, key: str) -> list[tuple[int, Any]]:
    values = preset.preview.get(key, [])
    if not isinstance(values, list) or len(values) > MAX_FIXED:
        raise InputError(f"preview.{key}: found {brief(values)}, expected a list of up to {MAX_FIXED}")
    return list(enumerate(values, start=1))
