"""Every published preset at full size for a few optimiser steps and evaluations: `python -m benchmarks.full_size`.

Batch 1, random weights, latents and conditions; the steps are the trainer's own. Each preset has a process of its own.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np
from msgspec.structs import replace

from benchmarks.memory import Meter
from benchmarks.models import ARCHITECTURES, architecture
from benchmarks.report import RESULTS, report, save, timed
from fastgen.presets import Preset, Training

EXAMPLES = 4
PRESETS = (*(name for name in ARCHITECTURES if name != "medium"), "iclevr-small", "iclevr-broadcast")


def full_size(name: str, *, device: str, threads: int, steps: int) -> dict[str, Any]:
    """One row: parameters, output shape, seconds and peak memory of an optimiser step and of a sampling evaluation, which
    has two rows where the preset guides. The first of `steps` warms up where there are several."""
    import torch

    from fastgen.training.autocast import choose

    torch.set_num_threads(threads)
    meter = Meter(device)
    preset = architecture(name)
    assert preset.unet is not None
    assert preset.unet.train is not None
    precision = choose(preset.unet.train.precision, device)
    task = _task(preset, precision.device)
    meter.begin()
    training, loss = _train(task, preset.unet.train, precision, steps)
    trained = meter.end()["peak_mib"]

    task.module.eval().requires_grad_(False)
    gc.collect()
    evaluate, output = _evaluation(task, precision, guided=preset.sampling.guidance_scale != 1)
    meter.begin()
    sampling = [timed(evaluate) for _ in range(steps)]
    return {
        "preset": name,
        "parameters": sum(parameter.numel() for parameter in task.module.parameters()),
        "output": "x".join(map(str, output)),
        "precision": precision.name,
        "step_s": statistics.median(training[1:] or training),
        "step_peak_mib": trained,
        "evaluation_s": statistics.median(sampling[1:] or sampling),
        "evaluation_peak_mib": meter.end()["peak_mib"],
        "loss": loss,
        "load_average": os.getloadavg()[0],
    }


def _train(task: Any, recipe: Training, precision: Any, steps: int) -> tuple[list[float], float]:
    """(seconds of each optimiser step, the last one's loss)."""
    from fastgen.training.optimise import optimise
    from fastgen.training.processes import Processes
    from fastgen.training.state import initial

    recipe = replace(recipe, batch_size=1, accumulation=1).for_examples(EXAMPLES)
    state = initial(task.module, recipe, precision, EXAMPLES)
    losses: list[float] = []

    def step() -> None:
        losses.append(float(optimise(task, state, recipe, precision, Processes())[0]))  # waits for the device
        state.step += 1

    return [timed(step) for _ in range(steps)], losses[-1]


def _task(preset: Preset, device: Any) -> Any:
    """The preset's UNet as training begins with it, on random data of the right shape."""
    from diffusers import UNet2DConditionModel

    from fastgen.files.names import ICLEVR_OBJECTS
    from fastgen.models.build import build_module
    from fastgen.models.condition import CLASS, STATES
    from fastgen.models.networks.denoiser import Denoiser
    from fastgen.models.networks.labels import conditioner_for, unet_class
    from fastgen.training.diffusion import DiffusionTask
    from fastgen.training.sources import CaptionSource, LabelSource, PixelSpace

    rng, examples = np.random.default_rng(0), np.arange(EXAMPLES)
    assert preset.unet is not None
    assert preset.unet.train is not None
    config, recipe = preset.unet.config, preset.unet.train
    space: Any
    conditions: Any
    if preset.conditioner is None:
        module: Any = Denoiser(build_module(UNet2DConditionModel, config, "unet", recipe.seed), [STATES])
        space = _random_latents((config["in_channels"], config["sample_size"], config["sample_size"]), device)
        states = rng.standard_normal((EXAMPLES, 77, config["cross_attention_dim"])).astype(np.float16)
        conditions = CaptionSource(states, list(examples[:, None]), device)
    else:
        unet = build_module(unet_class(preset.conditioner["kind"], config), config, "unet", recipe.seed)
        conditioner = conditioner_for(preset.conditioner, unet.config, ICLEVR_OBJECTS, len(ICLEVR_OBJECTS))
        module = Denoiser(unet, [CLASS], conditioner)
        images = rng.integers(0, 256, (EXAMPLES, preset.image_size, preset.image_size, 3), np.uint8)
        space = PixelSpace(images, device)
        conditions = LabelSource(np.eye(EXAMPLES, len(ICLEVR_OBJECTS), dtype=np.float32), device)
    rows, dropout = (examples, examples), recipe.condition_dropout
    return DiffusionTask(module, space, conditions, preset.scheduler, rows, dropout=dropout, flip=recipe.flip)


def _random_latents(shape: tuple[int, int, int], device: Any) -> Any:
    """A space of Gaussian samples, which no autoencoder has to encode."""
    from fastgen.training.sources import POSTERIOR, LatentSpace

    class RandomLatents(LatentSpace):
        def __init__(self) -> None:
            self.shape, self.device, self.vae = shape, device, None

        def clean(self, rows: Any, draws: Any, *changes: Any) -> Any:
            return draws.normal(POSTERIOR, self.shape)

    return RandomLatents()


def _evaluation(task: Any, precision: Any, *, guided: bool) -> tuple[Callable[[], Any], tuple[int, ...]]:
    """(one evaluation of the network for one image, the shape of its prediction)."""
    import torch

    rows = np.arange(2 if guided else 1)
    x = torch.randn(len(rows), *task.space.shape, device=precision.device)
    timesteps = torch.full((len(rows),), 500.0, device=precision.device)
    condition = task.conditions.pair(rows)[0]

    def predict() -> Any:
        with torch.inference_mode(), precision.autocast():
            return task.module(x, timesteps, *condition)

    return lambda: predict().cpu(), tuple(predict().shape[1:])


@click.command()
@click.option("--preset", "presets", multiple=True, default=PRESETS, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--steps", type=click.IntRange(1), default=3, show_default=True, help="Of each kind; the first warms up.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="JSON file.  [default: benchmarks/results/full_size-DEVICE.json]",
)
def main(presets: Sequence[str], device: str, threads: int, steps: int, out: Path | None) -> None:
    """Seconds and memory of one optimiser step and one sampling evaluation of full-size presets."""
    target = out or RESULTS / f"full_size-{device.partition(':')[0]}.json"
    settings = {"device": device, "threads": threads, "steps": steps, "batch": 1}
    rows: list[dict[str, Any]] = []
    for name in presets:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            rows.append(fresh.submit(full_size, name, device=device, threads=threads, steps=steps).result())
        save(target, settings, rows)
    report(target, settings, rows)


if __name__ == "__main__":
    main()
