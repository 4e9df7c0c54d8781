"""The time and memory of a job, and the batch size that fits: measured on a few rows before the job begins."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from fastgen.engines import memory as engines_memory
from fastgen.engines.batches import Batch, waste

if TYPE_CHECKING:
    from fastgen.engines.base import Engine
    from fastgen.generate.run import Run
    from fastgen.generate.runner import ModelRunner
    from fastgen.generate.settings import Settings

CPU_BATCH = 16
MAX_BATCH = 128  # images; beyond it GPUs gain nothing, and a job's last batches grow
USABLE = 0.8  # of free memory: graphs, workspaces and fragmentation take the rest
DECODER_SHARE = 0.25  # of free memory, for the VAE decoder
GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """What a job takes. `memory` in bytes, described by `where`: on a GPU all that is in use with the largest batch, on a CPU
    the peak of this process."""

    images: int
    batches: Sequence[Batch]
    evaluations: int  # of the UNet per batch
    seconds: float
    memory: int
    where: str

    def __str__(self) -> str:
        counts = Counter(batch.bucket for batch in self.batches)
        sizes = ", ".join(f"{count} of {size}" for size, count in sorted(counts.items(), reverse=True))
        return (
            f"{self.images} images in {len(self.batches)} batches ({sizes}; padding {100 * waste(self.batches):.1f}%), "
            f"{self.evaluations} evaluations each: about {_duration(self.seconds)}, {self.memory / GIB:.1f} GiB {self.where}"
        )


def automatic_batch_size(pipeline: ModelRunner, settings: Settings) -> int:
    """Images per batch by default. An engine with sizes of its own: the largest up to 128. Others: 16 on a CPU, on a GPU what
    fits into the free memory beside the VAE decoder, at most 128; that is measured on a few rows."""
    engine, sizes = pipeline.engine, pipeline.buckets(settings)
    if sizes is not None:
        return max([size for size in sizes if size <= MAX_BATCH] or [min(sizes)])
    if not pipeline.on_gpu:
        return CPU_BATCH
    beside = 0.0  # bytes of the VAE decoder, which decodes one batch while the next one is sampled
    if pipeline.spec.space.latent:
        decoder = _memory_of(pipeline, "vae_decoder")
        beside = decoder.fixed + decoder.row * _decoded_at_once(pipeline)
    unet = _memory_of(pipeline, "unet")
    rows = unet.rows_in(USABLE * engines_memory.free_memory(engine) - beside)
    return max(1, min(MAX_BATCH, rows // 2 if pipeline.guided(settings) else rows))


def decode_batch_size(pipeline: ModelRunner) -> int | None:
    """Images per forward of the VAE decoder: `Decoder.most`, on a GPU at most what fits into a quarter of its free memory. None
    for a model in pixels."""
    if not pipeline.spec.space.latent:
        return None
    if not pipeline.on_gpu or pipeline.engine.batch_sizes("vae_decoder") is not None:
        return pipeline.decoder.most
    return _decoded_at_once(pipeline)


def _decoded_at_once(pipeline: ModelRunner) -> int:
    room = DECODER_SHARE * engines_memory.free_memory(pipeline.engine)
    return min(pipeline.decoder.most, _memory_of(pipeline, "vae_decoder").rows_in(room))


def _memory_of(pipeline: ModelRunner, network: str) -> engines_memory.Memory:
    """Memory of a network, measured once per pipeline."""
    if network not in pipeline.memory:
        pipeline.memory[network] = engines_memory.measure_memory(pipeline.engine, network)
    return pipeline.memory[network]


def estimate(run: Run, batches: Sequence[Batch], decode: int | None = None) -> Estimate:
    """Time one row of the table of each kind, by network and guidance, at the largest batch size, and multiply. Engines that
    compile networks do it here. `decode`: images per forward of the VAE decoder."""
    engine = run.pipeline.engine
    largest = max(batch.bucket for batch in batches)
    first, last = run.guided
    seconds = 0.0
    for (network, guided), rows in Counter((n, first <= i < last) for i, n in enumerate(run.networks)).items():
        inputs = engine.samples(network, largest)
        if guided:
            both = [engine.xp.concatenate([x, x]) for x in inputs[2:]]
            forward = partial(engine.run_halves, network, *inputs[:2], *both)
        else:
            forward = partial(engine.run, network, *inputs)
        seconds += rows * _seconds(engine, forward)
    latents = engine.samples("unet", largest)[0]
    seconds += _seconds(engine, lambda: run.pipeline.decoder.decode(latents, decode))
    seconds *= sum(batch.bucket for batch in batches) / largest
    texts = len(run.conditions.texts) + (len(run.start.texts) if run.start else 0)
    if texts:
        seconds += texts * _seconds(engine, lambda: engine.probe("text_encoder", 16)) / 16
    images = sum(len(batch) for batch in batches)
    return Estimate(images, batches, len(run.table), seconds, *_memory(engine))


def _seconds(engine: Engine, call: Callable[[], Any]) -> float:
    """Seconds of the second call; the first warms up."""
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
