"""What a job will take, and the batch size that fits: measured on a few rows before the job begins."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastgen.buckets import Batch, waste
from fastgen.sampling import guided_rows
from fastgen.tables import SolverTable

if TYPE_CHECKING:
    from fastgen.engines.base import Engine
    from fastgen.pipeline import Pipeline
    from fastgen.settings import Settings

CPU_BATCH = 16
MAX_BATCH = 128  # images; beyond it GPUs gain nothing, and a job's last batches grow
USABLE = 0.8  # of free memory: graphs, workspaces and fragmentation take the rest
PROBED_ROWS = 2, 8
GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """What a job takes. `memory` in bytes: on a GPU what is in use there with the largest batch, else the process's peak."""

    images: int
    batches: Sequence[Batch]
    evaluations: int  # of the UNet per batch
    seconds: float
    memory: int
    where: str

    def __str__(self) -> str:
        sizes = ", ".join(
            f"{sum(b.bucket == size for b in self.batches)} of {size}"
            for size in sorted({b.bucket for b in self.batches}, reverse=True)
        )
        return (
            f"{self.images} images in {len(self.batches)} batches ({sizes}; padding {100 * waste(self.batches):.1f}%), "
            f"{self.evaluations} evaluations each: about {_duration(self.seconds)}, {self.memory / GIB:.1f} GiB {self.where}"
        )


def automatic_batch_size(pipeline: Pipeline, settings: Settings) -> int:
    """How many images run together by default: 16 on a CPU; on a GPU what fits into its free memory, at most 128, measured on
    a few rows, or the largest size that the engine was compiled for. Sets the VAE decoder's own batch size too."""
    engine, sizes = pipeline.engine, pipeline.buckets(settings)
    if sizes is not None:
        return max([size for size in sizes if size <= MAX_BATCH] or [min(sizes)])
    if not pipeline.on_gpu:
        return CPU_BATCH
    if pipeline.spec.family == "text":
        at_once = max(1, engine.decode_pixels // pipeline.spec.image_size**2)
        pipeline.decoder.limit = min(at_once, _rows_that_fit(engine, "vae_decoder"))
    rows = _rows_that_fit(engine, "unet")
    return max(1, min(MAX_BATCH, rows // 2 if settings.guided else rows))


def _rows_that_fit(engine: Engine, network: str) -> int:
    """Rows of a network that the GPU's free memory holds, extrapolated from two measurements."""
    import torch

    used = []
    for rows in PROBED_ROWS:
        engine.release_memory()
        before = torch.cuda.mem_get_info(engine.device)[0]
        engine.probe(network, rows)
        torch.cuda.synchronize(engine.device)
        used.append(before - torch.cuda.mem_get_info(engine.device)[0])  # allocators keep what they had at their peak
    engine.release_memory()
    (few, many), (less, more) = PROBED_ROWS, used
    per_row = max((more - less) / (many - few), more / many / 4, 1.0)
    fixed = max(0.0, less - few * per_row)
    return max(1, int((USABLE * torch.cuda.mem_get_info(engine.device)[0] - fixed) / per_row))


def estimate(
    pipeline: Pipeline, table: SolverTable, settings: Settings, batches: Sequence[Batch], prompts: int
) -> Estimate:
    """Time one row of each kind at the largest batch size, and multiply. Engines that compile do so here."""
    engine, spec = pipeline.engine, pipeline.spec
    largest = max(batch.bucket for batch in batches)
    first, last = guided_rows(table, settings.guidance_scale, True, settings.guidance_interval)
    guided, plain = last - first, len(table) - (last - first)
    inputs = [
        engine.array(x) for x in spec.signatures["unet"].sample_inputs(largest, np.random.default_rng(0)).values()
    ]
    seconds = 0.0
    if guided:
        both = engine.xp.concatenate([inputs[2], inputs[2]])
        seconds += guided * _seconds(engine, lambda: engine.run_guided(inputs[0], inputs[1], both))
    if plain:
        seconds += plain * _seconds(engine, lambda: engine.run("unet", *inputs))
    seconds += _seconds(engine, lambda: pipeline.decoder.decode(inputs[0]))
    seconds *= sum(batch.bucket for batch in batches) / largest
    if spec.family == "text":
        seconds += prompts * _seconds(engine, lambda: engine.probe("text_encoder", 16)) / 16
    images = sum(len(batch) for batch in batches)
    return Estimate(images, batches, len(table), seconds, *_memory(engine))


def _seconds(engine: Engine, call: Callable[[], Any]) -> float:
    """Of the second call, with whatever the first one queued, compiled or allocated behind it."""
    call()
    engine.synchronize()
    start = time.perf_counter()
    call()
    engine.synchronize()
    return time.perf_counter() - start


def _memory(engine: Engine) -> tuple[int, str]:
    if engine.device.startswith("cuda"):
        import torch

        free, total = torch.cuda.mem_get_info(engine.device)
        return total - free, f"in use on {engine.device} of {total / GIB:.1f}"
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024), "of memory"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 2 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
