"""How long a large job takes on many GPUs, and what it costs: arithmetic on the hardware floor. Nothing here is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.floor import Rates, count, floor_s
from fastgen.errors import InputError
from fastgen.generate.pipeline import load
from fastgen.models.find import find_model

H200 = Rates(flop_per_s=989e12, bytes_per_s=4.8e12)  # NVIDIA's data sheet: fp16 tensor cores without sparsity; memory
GPU, DTYPE = "NVIDIA H200", "fp16"
BATCH = 64
SHARES = (1.0, 0.1)  # of the floor's speed: all of it, and a guess
Row = dict[str, Any]


def hours(images: int, seconds_per_image_per_gpu: float, gpus: int) -> float:
    """Hours of a job that all GPUs share equally, without start-up. Raises InputError for numbers below 0, and no GPU."""
    if images < 0 or seconds_per_image_per_gpu < 0 or gpus < 1:
        raise InputError(
            f"found {images} images, {seconds_per_image_per_gpu} s per image, {gpus} GPUs; expected 0 or more, and a GPU"
        )
    return images * seconds_per_image_per_gpu / gpus / 3600


def cost(images: int, seconds_per_image_per_gpu: float, gpus: int, price_per_gpu_hour: float) -> float:
    """What these hours cost, in the currency of the price."""
    return gpus * hours(images, seconds_per_image_per_gpu, gpus) * price_per_gpu_hour


def arithmetic(
    models: Sequence[str], *, images: int, gpus: int, price: float | None, driver_ms: float | None
) -> dict[str, Any]:
    """A job of `images` by each model, with its own default sampling, on H200s: {inputs, "rows", "driver_hours"}.

    `price`: of a GPU-hour; None: no cost. `driver_ms`: CPU milliseconds per image of the one process that takes the pictures
    and writes the files, measured on the machine of the benchmark; None where that was left out.
    """
    rows = [row for model in models for row in _rows(model, images, gpus, price)]
    return {
        **inputs(images, gpus, price),
        "driver_cpu_ms_per_image": driver_ms,
        "driver_hours": None if driver_ms is None else hours(images, driver_ms / 1000, 1),
        "rows": rows,
    }


def inputs(images: int, gpus: int, price: float | None) -> Row:
    """What the arithmetic starts from."""
    return {
        "images": images,
        "gpus": gpus,
        "gpu": GPU,
        "dtype": DTYPE,
        "batch": BATCH,
        "rates": asdict(H200),
        "price_per_gpu_hour": price,
    }


def _rows(model: str, images: int, gpus: int, price: float | None) -> list[Row]:
    """A row for each share of the floor's speed."""
    folder = find_model(model).folder
    pipeline = load(folder, "eager", device="cpu")
    settings = pipeline.settings()
    evaluations, guided = len(pipeline.source.table(settings.solver)), pipeline.guided(settings)
    work = count(folder)
    floor = floor_s(work, H200, DTYPE, images=BATCH, batch=BATCH, evaluations=evaluations, guided=guided) / BATCH
    gflop = (evaluations * (1 + guided) * work.unet_flop + work.vae_flop) / 1e9
    return [
        {
            "model": model,
            "evaluations": evaluations,
            "guided": guided,
            "gflop_per_image": gflop,
            "share_of_floor": share,
            "us_per_image": 1e6 * floor / share,
            "hours": hours(images, floor / share, gpus),
            "cost": None if price is None else cost(images, floor / share, gpus, price),
        }
        for share in SHARES
    ]
