"""Facts of benchmarks/first.py on what a GPU's memory and queue are like around a job."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.first_facts import COUNT, NEEDS_GPU, STEPS, compared, images, pipeline, requests
from benchmarks.part_worker import raised
from benchmarks.parts import Fact, Run

if TYPE_CHECKING:
    from fastgen.generate.job import JobReport
    from fastgen.generate.pipeline import Pipeline

MIB = 2**20
SLACK_MIB = 8.0  # that may stay: the allocator counts in blocks of 2
IMAGES = 256, 8  # of the job, in one batch, on a GPU and on a CPU
SHARES = 0.6, 0.35  # of the memory that a job wants


def memory_mib(device: str) -> dict[str, float]:
    """What torch has allocated on a device, and what it has reserved for that."""
    import torch

    found = {"allocated": torch.cuda.memory_allocated(device), "reserved": torch.cuda.memory_reserved(device)}
    return {name: round(value / MIB, 1) for name, value in found.items()}


def memory_comes_back(run: Run, model: str) -> Iterator[Fact]:
    """`free_memory` leaves what it left the time before, whatever ran in between; dropped loops do not pile up. Nothing here
    collects garbage: the package has to let go by itself."""
    if not run.cuda:
        yield {"what": "memory around free_memory", "skipped": NEEDS_GPU}
        return
    pipe = pipeline(model, run.device, run.low, True)
    images(pipe)  # workspaces of libraries, which stay
    pipe.free_memory()
    base = memory_mib(run.device)
    gc.disable()
    try:
        seen = []
        for steps in range(3, 11):
            images(pipe, num_inference_steps=steps)
            seen.append(memory_mib(run.device))
        pipe.free_memory()
        after = memory_mib(run.device)
    finally:
        gc.enable()
    gc.collect()
    collected = memory_mib(run.device)
    figures = {"base": base, "first_table": seen[0], "eighth_table": seen[-1], "freed": after, "collected": collected}
    passed = after["allocated"] <= base["allocated"] + SLACK_MIB
    yield {"what": "memory after free_memory is what it was", "passed": passed, "unit": "MiB", **figures}
    grown = seen[-1]["allocated"] - seen[0]["allocated"]
    yield {
        "what": "memory does not grow with solver tables",
        "passed": grown <= SLACK_MIB,
        "unit": "MiB",
        "grown": grown,
    }


def nothing_waits(run: Run, model: str) -> Iterator[Fact]:
    """A loop that is queued without waiting for the device once, and gives what the pipeline gives."""
    import torch

    from fastgen.generate.run import Run as Generation
    from fastgen.sampling.device_loop import DeviceLoop
    from fastgen.sampling.loop import initial_latents

    pipe = pipeline(model, run.device, "fp32", True)
    settings, given = pipe.settings(scheduler="ddpm", num_inference_steps=STEPS), requests(pipe, COUNT)
    whole = Generation(pipe, given, settings)
    table, conditions = whole.table, whole.conditions
    seeds = pipe.engine.array(np.arange(COUNT, dtype=np.int64))
    x, cond = initial_latents(table, seeds, pipe.spec.space.shape), conditions(given)
    options: dict[str, Any] = {
        "seeds": seeds,
        "guidance_scale": settings.guidance_scale,
        "uncond": conditions.uncond(given),
    }
    loop = DeviceLoop(pipe.engine, table, x.shape, cond, graphs=run.cuda)
    loop.run(x, cond, **options)  # records
    if run.cuda:
        try:
            with errors_where_it_waits():
                loop.run(x, cond, **options)
            yield {"what": "the loop waits for nothing", "passed": True}
        except RuntimeError as error:
            yield raised("the loop waits for nothing", error)
    else:
        yield {"what": "the loop waits for nothing", "skipped": NEEDS_GPU}
    (batch,) = whole.batches(COUNT)
    found = loop.run(x, cond, **options)
    distance = float((found - whole.latents(batch)).abs().max())
    finite = bool(torch.isfinite(found).all())
    yield {"what": "the loop's latents are the pipeline's", "passed": finite and distance <= 1e-3, "max_abs": distance}


@contextmanager
def errors_where_it_waits() -> Iterator[None]:
    """torch raises where the host would wait for the device."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def out_of_memory(run: Run, model: str) -> Iterator[Fact]:
    """A job in less memory than it wants: it goes on in smaller batches, with the same pictures, and leaves things as they
    were. On a CPU memory is not short: the engine is made to refuse large batches instead."""
    count = IMAGES[0] if run.cuda else IMAGES[1]
    pipe = pipeline(model, run.device, run.low, True)
    wanted = _peak_mib(run, pipe, count)
    _, expected = _job(pipe, count)
    pipe.free_memory()
    for share in SHARES:
        yield from _job_in_less(run, pipe, share, wanted, expected)


def _job_in_less(run: Run, pipe: Pipeline, share: float, wanted: float, expected: np.ndarray) -> Iterator[Fact]:
    what = f"a job in {100 * share:.0f}% of its memory"
    said: list[str] = []
    _tidy(run, pipe)
    before = memory_mib(run.device) if run.cuda else {}
    try:
        with little_memory(run, pipe, share, wanted, len(expected)):
            report, found = _job(pipe, len(expected), said)
    except Exception as error:
        yield {**raised(what, error), "said": said}
    else:
        ran_out = any("out of memory" in line for line in said)
        figures = {"said": said, "errors": len(report.errors), "seconds": round(report.seconds, 2)}
        yield {"what": f"{what}: it ran short and went on", "passed": ran_out and not report.errors, **figures}
        yield compared(f"{what}: the pictures", expected, found, dtype=run.low)
    if not run.cuda:
        yield {"what": f"{what}: stream and memory afterwards", "skipped": NEEDS_GPU}
        return
    import torch

    stream = torch.cuda.current_stream(run.device)
    default = stream == torch.cuda.default_stream(run.device)
    yield {"what": f"{what}: the default stream is current afterwards", "passed": default, "stream": str(stream)}
    pipe.free_memory()
    after = memory_mib(run.device)
    passed = after["allocated"] <= before["allocated"] + SLACK_MIB
    yield {"what": f"{what}: memory afterwards", "passed": passed, "unit": "MiB", "before": before, "after": after}


def _job(pipe: Pipeline, count: int, said: list[str] | None = None) -> tuple[JobReport, np.ndarray]:
    """A job in one batch, as long as memory allows that, and its pictures (count, H, W, 3) uint8."""
    from PIL import Image

    from fastgen.generate.job import run_job
    from fastgen.generate.run import Run as Generation

    given = requests(pipe, count)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        say = (lambda line: None) if said is None else said.append
        report = run_job(Generation(pipe, given, pipe.settings()), out, batch_size=count, progress=False, say=say)
        return report, np.stack([np.asarray(Image.open(out / r.image_name)) for r in given])


def _peak_mib(run: Run, pipe: Pipeline, count: int) -> float:
    """What a job in one batch reserves beyond what is reserved before it, after one that chose its algorithms."""
    if not run.cuda:
        return float("nan")
    import torch

    _job(pipe, count)
    _tidy(run, pipe)
    before = torch.cuda.memory_reserved(run.device)
    torch.cuda.reset_peak_memory_stats(run.device)
    _job(pipe, count)
    return (torch.cuda.max_memory_reserved(run.device) - before) / MIB


def _tidy(run: Run, pipe: Pipeline) -> None:
    pipe.free_memory()
    gc.collect()
    if run.cuda:
        import torch

        torch.cuda.empty_cache()


@contextmanager
def little_memory(run: Run, pipe: Pipeline, share: float, wanted: float, count: int) -> Iterator[None]:
    """`share` of `wanted` MiB beyond what is reserved already; on a CPU, that share of the rows of `count` images."""
    if run.cuda:
        import torch

        index = torch.device(run.device).index  # the name alone is refused; None is the current device
        allowed = torch.cuda.memory_reserved(run.device) + share * wanted * MIB
        torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / torch.cuda.mem_get_info(run.device)[1]), index)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, index)
        return
    engine: Any = pipe.engine
    whole, most = engine.run, share * count * (2 if pipe.settings().guided else 1)

    def refusing(network: str, *values: Any) -> Any:
        if network == "unet" and len(values[0]) > most:
            raise MemoryError(f"{len(values[0])} rows")
        return whole(network, *values)

    engine.run = refusing
    try:
        yield
    finally:
        engine.run = whole
