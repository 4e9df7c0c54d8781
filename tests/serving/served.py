"""A service over small models in the tests' own process, and workers with faults."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

from fastgen.generate.job_input import default_name
from fastgen.generate.pipeline import load
from fastgen.generate.requests import Request
from fastgen.generate.run import Run
from fastgen.generate.single import write_image
from fastgen.serving.jobs import GenerationRequest, Job
from fastgen.serving.messages import ImageTask
from fastgen.serving.service import Service
from fastgen.serving.worker import WorkerOptions, run_worker

POISON = 666_000  # seeds from here on bring a fault about
RAISES, DIES, NOT_FINITE = POISON, POISON + 1, POISON + 2


def faulty_worker(connection: Any, options: WorkerOptions) -> None:
    """A worker whose engine fails for the images of some seeds: see RAISES, DIES and NOT_FINITE."""
    from fastgen.serving import batch
    from fastgen.serving.slots import Slots

    original = Slots._run

    def run(self: Slots, numbers: list[int], guided: bool) -> None:
        seeds = {self._slots[n].sample.seed for n in numbers if n in self._slots}
        if DIES in seeds:
            os.kill(os.getpid(), 9)
        if RAISES in seeds:
            raise RuntimeError("the engine does not like this one")
        original(self, numbers, guided)
        for n in numbers:
            if n in self._slots and self._slots[n].sample.seed == NOT_FINITE:
                self._arrays.x[n] = float("nan")

    Slots._run = run  # type: ignore[method-assign]
    assert batch.Slots is Slots
    run_worker(connection, options)


def slow_worker(connection: Any, options: WorkerOptions) -> None:
    """A worker whose steps take 50 ms longer."""
    from fastgen.serving.slots import Slots

    original = Slots._run

    def run(self: Slots, numbers: list[int], guided: bool) -> None:
        time.sleep(0.05)
        original(self, numbers, guided)

    Slots._run = run  # type: ignore[method-assign]
    run_worker(connection, options)


def expected_files(bundle: Path, engine: str, tasks: Iterable[ImageTask], folder: Path, **options: Any) -> list[bytes]:
    """What `fastgen generate` writes for each task alone."""
    pipeline, files = load(bundle, engine, **options), []
    for task in tasks:
        settings = pipeline.settings(
            scheduler=task.scheduler, num_inference_steps=task.num_inference_steps, guidance_scale=task.guidance_scale,
            guidance_interval=task.guidance_interval, seed=task.seed, normalize=task.normalize,
        )  # fmt: skip
        text = task.prompt if task.prompt is not None else ", ".join(task.labels or ())
        name = f"{default_name(text, task.seed)}.png"
        file = folder / str(len(files)) / name
        write_image(Run(pipeline, [Request("0", name, task.prompt, task.labels, task.seed)], settings), file)
        files.append(file.read_bytes())
    return files


@contextlib.asynccontextmanager
async def serving(
    *models: tuple[str, Path], target: Callable[..., None] = run_worker, **options: Any
) -> AsyncIterator[Service]:
    """A started service; it is stopped at the end."""
    lines: list[str] = []
    service = Service([WorkerOptions(path, name, **options) for name, path in models], target=target, say=lines.append)
    service.lines = lines  # type: ignore[attr-defined]
    try:
        await service.start()
        yield service
    finally:
        await service.stop()


def asks(model: str, n: int = 1, **fields: Any) -> GenerationRequest:
    """A request for labels; fields of the task, and of the request."""
    own = {name: fields.pop(name) for name in ("key", "deadline_s", "detached") if name in fields}
    task = {"seed": 0, "labels": ("red cube",), **fields}
    return GenerationRequest(model, ImageTask(**task), n=n, **own)


async def ended(job: Job, seconds: float = 60.0) -> Job:
    """The job, when all its images have ended."""

    async def follow() -> None:
        version = job.version
        while not job.ended:
            version = await job.changed(version)

    await asyncio.wait_for(follow(), seconds)
    return job


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        await asyncio.sleep(0.01)


def without_torch(connection: Any, options: WorkerOptions) -> None:
    """A worker where the training stack is not installed."""
    from importlib.machinery import PathFinder

    blocked, find_spec = os.environ["BLOCKED_IMPORTS"].split(), PathFinder.find_spec

    def unless_blocked(name: str, *given: Any, **options: Any) -> Any:
        return None if name.partition(".")[0] in blocked else find_spec(name, *given, **options)

    PathFinder.find_spec = unless_blocked  # type: ignore[method-assign,assignment]
    run_worker(connection, options)
