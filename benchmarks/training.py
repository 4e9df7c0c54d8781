"""Training images per second, the usual script against `fastgen train`: `python -m benchmarks.training`.

The usual script decodes PNGs and runs the VAE's encoder and the text encoder in every step; fastgen trains on what they said
once. Both train a preset's UNet in one process by turns, on rendered monsters, with a VAE of Stable Diffusion's and a text
encoder of CLIP ViT-B/32's size (random weights). Beside the speed stands the difference between the losses of one batch, from
the cache and from the files, with the same noise.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from benchmarks.memory import Meter
from benchmarks.models import architecture, build
from benchmarks.report import RESULTS, report, spread, timed
from fastgen.data import Dataset, read_dataset
from fastgen.data.cache import cached_pixels
from fastgen.data.synthetic import write_monsters
from fastgen.models.build import build_text_encoder
from fastgen.models.condition import STATES
from fastgen.models.networks.denoiser import Denoiser
from fastgen.presets import Preset
from fastgen.presets.recipe import Training
from fastgen.training.autocast import Precision, choose
from fastgen.training.bpe import train_tokenizer
from fastgen.training.diffusion import DiffusionTask
from fastgen.training.draws import Draws
from fastgen.training.encode import cached_moments, cached_states, tokenize
from fastgen.training.optimise import optimise
from fastgen.training.processes import Processes
from fastgen.training.sources import POSTERIOR, CaptionSource, LatentSpace
from fastgen.training.state import initial

Step = Callable[[], None]


class Frozen:
    """The VAE, the text encoder and the tokenizer, and a dataset's files read through them."""

    def __init__(self, dataset: Dataset, size: int, device: torch.device) -> None:
        sizes = architecture("medium")
        assert sizes.text_encoder is not None
        texts = [text for example in dataset.examples for text in example.captions]
        self.tokenizer = train_tokenizer(texts, 600, 77)
        self.text_encoder = build_text_encoder(sizes.text_encoder.config, self.tokenizer, 0).to(device).eval()
        self.vae = build(sizes, "vae").to(device)
        self.dataset, self.size, self.device = dataset, size, device

    @torch.no_grad()
    def batch(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Files -> moments (b, 2C, h, w) and text states (b, 77, D)."""
        examples = [self.dataset.examples[row] for row in rows]
        images = [np.asarray(Image.open(e.image).convert("RGB").resize((self.size, self.size))) for e in examples]
        pixels = torch.from_numpy(np.stack(images)).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        ids = torch.from_numpy(tokenize(self.tokenizer, [e.captions[0] for e in examples], 77)).to(self.device)
        moments = self.vae.encode(pixels).latent_dist.parameters
        return moments, self.text_encoder(input_ids=ids).last_hidden_state


def usual_script(frozen: Frozen, unet: Any, preset: Preset, batch_size: int, precision: Precision, whole: bool) -> Step:
    """A step as it is written with diffusers; the frozen networks in fp32, as from_pretrained loads them, or, if `whole`, under
    the same autocast as the UNet."""
    from diffusers import DDPMScheduler

    schedule: Any = DDPMScheduler.from_config(dict(preset.scheduler))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5)
    rng = np.random.default_rng(0)

    def step() -> None:
        rows = rng.integers(0, len(frozen.dataset.examples), batch_size)
        with precision.autocast() if whole else torch.autocast(frozen.device.type, enabled=False):
            moments, states = frozen.batch(rows)
        mean, logvar = moments.float().chunk(2, dim=1)
        latents = (mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)) * frozen.vae.config.scaling_factor
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, schedule.config.num_train_timesteps, (batch_size,), device=latents.device)
        with precision.autocast():
            prediction = unet(schedule.add_noise(latents, noise, timesteps), timesteps, states).sample
        functional.mse_loss(prediction.float(), noise).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def cached_task(frozen: Frozen, unet: Any, preset: Preset, recipe: Training) -> DiffusionTask:
    """What `fastgen train` optimises: moments and text states computed once."""
    dataset, device = frozen.dataset, frozen.device
    images = cached_pixels(dataset, frozen.size, "stretch", False).images
    fields = {"data": dataset.fingerprint, "size": frozen.size, "mode": "stretch"}
    moments = cached_moments(frozen.vae, images, fields, False, device, False)
    texts = ["", *sorted({example.captions[0] for example in dataset.examples})]
    states = cached_states(frozen.text_encoder, tokenize(frozen.tokenizer, texts, 77), device, False)
    choices = [np.array([texts.index(example.captions[0])]) for example in dataset.examples]
    rows = np.arange(len(choices))
    space, conditions = LatentSpace(moments, images, frozen.vae, device), CaptionSource(states, choices, device)
    options: dict[str, Any] = {"dropout": recipe.condition_dropout, "flip": recipe.flip}
    return DiffusionTask(Denoiser(unet, [STATES]), space, conditions, preset.scheduler, (rows, rows), **options)


class Fresh(LatentSpace):
    """The same examples from the files: a Space and Conditions for the comparison of losses."""

    def __init__(self, frozen: Frozen, like: LatentSpace) -> None:
        super().__init__(like.moments, like.pixels, like.vae, like.device)
        self.frozen = frozen

    def clean(self, rows: np.ndarray, draws: Draws, flip: bool = False, jitter: float = 0) -> Tensor:
        mean, logvar = self.frozen.batch(rows)[0].chunk(2, dim=1)
        noise = draws.normal(POSTERIOR, self.shape)
        return (mean + torch.exp(0.5 * logvar) * noise) * self.frozen.vae.config.scaling_factor

    def of(self, rows: np.ndarray, draws: Draws, dropout: float) -> Tensor:
        return self.frozen.batch(rows)[1]


@torch.no_grad()
def loss_difference(frozen: Frozen, task: DiffusionTask, rows: np.ndarray) -> float:
    """Relative difference between the losses of one batch from the cache and from the files, in fp32."""
    draws = Draws(0, 0, np.arange(len(rows)), len(rows), frozen.device)
    ours = float(task.losses(task.module, rows, draws).mean())
    fresh: Any = Fresh(frozen, task.space)  # type: ignore[arg-type]
    kept, task.space, task.conditions = (task.space, task.conditions), fresh, fresh
    theirs = float(task.losses(task.module, rows, draws).mean())
    task.space, task.conditions = kept
    return abs(ours - theirs) / abs(theirs)


def fastgen_steps(task: DiffusionTask, recipe: Training, precision: Precision) -> dict[str, Step]:
    """Eager, and compiled if the recipe says so."""
    state = initial(task.module, recipe, precision, len(task.train_rows))

    def step() -> None:
        float(optimise(task, state, recipe, precision, Processes())[0])
        state.step += 1

    def eager() -> None:
        with torch.compiler.set_stance("force_eager"):
            step()

    if not recipe.compile:
        return {"fastgen": eager}
    task.module.compile()
    return {"fastgen": eager, "fastgen, compiled": step}


def measure(preset: Preset, folder: Path, recipe: Training, precision: Precision, rounds: int) -> dict[str, Any]:
    """Rows of all sides, the median of `rounds` steps each, taken in turn."""
    frozen = Frozen(read_dataset(folder), preset.image_size, precision.device)
    unets = [build(preset, "unet").to(precision.device).train().requires_grad_(True) for _ in range(2)]
    task = cached_task(frozen, unets[1], preset, recipe)
    difference = loss_difference(frozen, task, task.train_rows[:2])
    sides = {
        f"script, frozen networks in {name}": usual_script(
            frozen, unets[0], preset, recipe.batch_size, precision, whole
        )
        for name, whole in (("fp32", False), (f"{precision.name} autocast", True))
    }
    sides |= fastgen_steps(task, recipe, precision)
    meter = Meter(str(precision.device))
    meter.begin()
    first = {side: timed(step) for side, step in sides.items()}  # compilation, the optimisers' state
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, step in sides.items():
            seconds[side].append(timed(step))
    return {"loss_difference": difference, **meter.end(), "rows": _rows(recipe.batch_size, first, seconds)}


def _rows(batch_size: int, first: dict[str, float], seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    base = statistics.median(next(iter(seconds.values())))
    return [
        {
            "side": side,
            "images_per_s": batch_size / statistics.median(values),
            "ratio": base / statistics.median(values),
            "step_s": spread(values),
            "first_step_s": first[side],
        }
        for side, values in seconds.items()
    ]


@click.command()
@click.option("--preset", "name", default="monsters-ddim", show_default=True, help="Text preset whose UNet is trained.")
@click.option("--batch-size", default=8, show_default=True, help="Images of a step.")
@click.option("--rounds", default=3, show_default=True, help="Steps of every side, taken in turn.")
@click.option("--compile/--no-compile", "compiled", default=True, show_default=True, help="Also with torch.compile.")
@click.option("--device", help="cpu or cuda.  [default: the GPU if there is one]")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "training-cpu.json", show_default=True)
def main(name: str, batch_size: int, rounds: int, compiled: bool, device: str | None, out: Path) -> None:
    """Measure and print the table."""
    preset, precision = architecture(name), choose("auto", device)
    recipe = Training(steps=10**6, batch_size=batch_size, learning_rate=1e-5, ema_decay=0, compile=compiled)
    with tempfile.TemporaryDirectory() as work:
        write_monsters(Path(work), count=2, size=preset.image_size, frames=1, test_count=2, workers=1)
        found = measure(preset, Path(work), recipe, precision, rounds)
    settings: dict[str, Sequence[object] | object] = {
        "preset": name,
        "batch_size": batch_size,
        "precision": precision.name,
        "threads": torch.get_num_threads(),
        "device": str(precision.device),
        "loss_difference": f"{found['loss_difference']:.1e}",
        "peak_gib": round(found["peak_mib"] / 1024, 1),
    }
    report(out, settings, found["rows"])


if __name__ == "__main__":
    main()
