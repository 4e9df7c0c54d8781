"""The least time the hardware allows: operations counted on the meta device, rates of the machine measured now."""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}


@dataclass(frozen=True)
class Work:
    """One forward of one sample: floating-point operations (2 x multiply-adds) and weights, of the UNet and the decoder."""

    unet_flop: float
    unet_params: int
    vae_flop: float = 0.0
    vae_params: int = 0


@dataclass(frozen=True)
class Rates:
    """What the device reaches in a precision: dense matrix products and copies (bytes read plus bytes written)."""

    flop_per_s: float
    bytes_per_s: float


@functools.cache
def count(model: Path) -> Work:
    """The work of a model folder or bundle, from its configs alone."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from fastgen.models.networks.labels import denoiser_class

    config = json.loads((model / "unet" / "config.json").read_text())
    vae = model / "vae" if (model / "vae").is_dir() else model / "vae_decoder"
    size = config["sample_size"]
    with torch.device("meta"):
        sample, timestep = torch.empty(1, config["in_channels"], size, size), torch.empty(1)
        if not (vae / "config.json").is_file():
            unet: Any = denoiser_class(config["_class_name"]).from_config(config)
            identity = config.get("class_embed_type") == "identity"
            width = 4 * config["block_out_channels"][0] if identity else config.get("label_dim")
            labels = None if width is None else torch.empty(1, width)
            return Work(*_counted(unet, lambda: unet(sample, timestep, class_labels=labels)))
        unet = UNet2DConditionModel.from_config(config)
        states = torch.empty(1, 77, config["cross_attention_dim"])
        decoder: Any = AutoencoderKL.from_config(json.loads((vae / "config.json").read_text()))
        return Work(
            *_counted(unet, lambda: unet(sample, timestep, states)),
            *_counted(decoder.decoder, lambda: decoder.decode(sample)),
        )


def _counted(module: Any, forward: Callable[[], Any]) -> tuple[float, int]:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward()
    return float(counter.get_total_flops()), sum(p.numel() for p in module.parameters())


def floor_s(work: Work, rates: Rates, dtype: str, *, images: int, batch: int, evaluations: int, guided: bool) -> float:
    """Seconds that `images` in batches of `batch` cannot beat: each forward takes its operations, or reading its weights."""

    def forward(flop: float, params: int, rows: int) -> float:
        return max(rows * flop / rates.flop_per_s, params * BYTES[dtype] / rates.bytes_per_s)

    unet = evaluations * forward(work.unet_flop, work.unet_params, batch * (2 if guided else 1))
    return math.ceil(images / batch) * (unet + forward(work.vae_flop, work.vae_params, batch))


def measure(device: str, dtype: str, *, threads: int | None = None, seconds: float = 0.7) -> Rates:
    """The best of repeated matrix products and copies of random data; sizes that fill the device.

    They are torch's own: another library may be faster, as onnxruntime is in fp32 on AMD's CPUs. On a CPU without instructions
    for 16 bits, products in fp32 stand for those in fp16 and bf16.
    """
    import torch

    from fastgen.engines.machine import HALF, cpu, has_half

    if threads:
        torch.set_num_threads(threads)
    cuda = device.startswith("cuda")
    size, elements = (8192, 2**30) if cuda else (2048, 2**25)
    detour = not cuda and dtype in HALF and not has_half(cpu(), dtype)
    flop_per_s = 2 * size**3 / _best(_product(device, "fp32" if detour else dtype, size), device, seconds)
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    bytes_per_s = 2 * source.nbytes / _best(lambda: target.copy_(source), device, seconds)
    return Rates(flop_per_s, bytes_per_s)


def _product(device: str, dtype: str, size: int) -> Callable[[], Any]:
    """A matrix product of random data; of int8 with sums in int32."""
    import torch

    from fastgen.models.precision import TORCH_DTYPES

    if dtype == "int8":
        x, y = (torch.randint(-128, 128, (size, size), dtype=torch.int8, device=device) for _ in range(2))
        sums = torch.empty(size, size, dtype=torch.int32, device=device)
        return lambda: torch._int_mm(x, y, out=sums)
    a, b = (torch.randn(size, size, device=device).to(TORCH_DTYPES[dtype]) for _ in range(2))
    product = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=product)


def best(one: Rates, other: Rates) -> Rates:
    """The higher of two measurements of the same device."""
    return Rates(max(one.flop_per_s, other.flop_per_s), max(one.bytes_per_s, other.bytes_per_s))


def _best(call: Callable[[], Any], device: str, seconds: float) -> float:
    import torch

    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    times: list[float] = []
    end = time.perf_counter() + seconds
    call()
    while len(times) < 3 or (time.perf_counter() < end and len(times) < 50):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        times.append(time.perf_counter() - start)
    return min(times)
