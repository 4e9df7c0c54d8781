"""Facts of benchmarks/first.py on serving: images that join a running batch on a GPU, and what that costs."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.first_facts import NEEDS_GPU, pipeline, requests
from benchmarks.first_memory import errors_where_it_waits
from benchmarks.part_worker import raised
from benchmarks.parts import Fact, Run
from benchmarks.report import spread

if TYPE_CHECKING:
    from fastgen.generate.pipeline import Pipeline
    from fastgen.generate.run import Run as Generation
    from fastgen.serving.slots import Slots

SOLVERS = ("ddim", 6), ("ddpm", 6), ("unipc", 5), ("dpmpp-2m", 7), ("pndm", 6)
SIZES = (1, 2, 4, 8, 16, 32, 64)
MOST_RELATIVE = 2e-3  # of the largest state: other batch sizes have other kernels
JOIN_SHARE = 0.05  # of a step, that one join may take
ROUNDS = 20


def slots_agree(run: Run, model: str) -> Iterator[Fact]:
    """Images of several solvers that join at random end as each does alone."""
    pipe = pipeline(model, run.device, "fp32", True)
    generations = list(_mixed(pipe, 10))
    slots = _slots(pipe, 6)
    found = _driven(slots, generations)
    worst, same = 0.0, 0
    for generation, state in zip(generations, found, strict=True):
        alone = pipe.engine.numpy(generation.latents(generation.batches(1)[0]))[0]
        worst = max(worst, float(np.abs(state - alone).max() / np.abs(alone).max()))
        same += bool(np.array_equal(state, alone))
    finite = all(np.isfinite(state).all() for state in found)
    passed = finite and worst <= MOST_RELATIVE
    yield {
        "what": "mixed solvers, joins at random",
        "passed": passed,
        "relative": worst,
        "images": len(found),
        "same_bytes": same,
    }


def slots_speed(run: Run, model: str) -> Iterator[Fact]:
    """A step of a full batch against the loop of a job, what a join costs, and whether the host waits."""
    from fastgen.serving.sampling import sample_of

    batch = 64 if run.cuda else 4
    pipe = pipeline(model, run.device, run.low, True)
    settings = pipe.settings(scheduler="ddim", num_inference_steps=10 * ROUNDS)
    samples = [sample_of(_generation(pipe, request, settings)) for request in requests(pipe, batch)]
    slots = _slots(pipe, batch)
    numbers = [slots.add(sample) for sample in samples]
    slots.tick(numbers)  # records
    step = _seconds(pipe, lambda: slots.tick(numbers))
    job = _job_step(pipe, batch, settings)
    figures = {"step_ms": 1e3 * step[0], "job_step_ms": 1e3 * job[0], "ratio": step[0] / job[0], "spread": step[1]}
    yield {"what": f"a step of {batch} images against a job's, {run.low}", **figures, "batch": batch}

    def join() -> None:
        slots.remove(numbers.pop())
        numbers.append(slots.add(samples[-1]))

    seconds = _seconds(pipe, join)[0]
    passed = seconds <= JOIN_SHARE * step[0] if run.cuda else None
    fact: Fact = {"what": "a join", "join_ms": 1e3 * seconds, "share_of_a_step": seconds / step[0]}
    yield fact if passed is None else {**fact, "passed": passed}
    if not run.cuda:
        yield {"what": "steps and joins wait for nothing", "skipped": NEEDS_GPU}
        return
    try:
        with errors_where_it_waits() if run.cuda else nullcontext():
            join()
            slots.tick(numbers)
        yield {"what": "steps and joins wait for nothing", "passed": True}
    except RuntimeError as error:
        yield raised("steps and joins wait for nothing", error)


def _slots(pipe: Pipeline, capacity: int) -> Slots:
    from fastgen.serving.slots import Slots

    return Slots(
        pipe.engine, pipe.spec.scheduler_config, capacity=capacity, sizes=lambda guided: SIZES, graphs=pipe.graphs
    )


def _generation(pipe: Pipeline, request: Any, settings: Any) -> Generation:
    from fastgen.generate.run import Run as Generation

    return Generation(pipe, [request], settings)


def _mixed(pipe: Pipeline, count: int) -> Iterator[Generation]:
    for i, request in enumerate(requests(pipe, count)):
        scheduler, steps = SOLVERS[i % len(SOLVERS)]
        options: dict[str, Any] = {
            "scheduler": scheduler,
            "num_inference_steps": steps,
            "guidance_scale": (1.0, 3.0)[i % 2],
        }
        yield _generation(pipe, request, pipe.settings(**options))


def _driven(slots: Slots, generations: list[Generation]) -> list[np.ndarray]:
    """The final state of each image, which join in turn while others are on their way."""
    from fastgen.serving.sampling import sample_of

    rng, waiting = random.Random(0), list(enumerate(map(sample_of, generations)))
    active: dict[int, int] = {}
    found: dict[int, np.ndarray] = {}
    while waiting or active:
        if waiting and slots.free:
            place, sample = waiting.pop(0)
            active[slots.add(sample)] = place
        for number in slots.tick(rng.sample(sorted(active), rng.randint(1, min(4, len(active))))):
            found[active.pop(number)] = generations[0].pipeline.engine.numpy(slots.states([number]))[0].copy()
            slots.remove(number)
    return [found[i] for i in range(len(generations))]


def _seconds(pipe: Pipeline, call: Any) -> tuple[float, Any]:
    """Median seconds of a call over some rounds of several, and their spread."""
    taken = []
    for _ in range(3):
        pipe.engine.synchronize()
        start = time.perf_counter()
        for _ in range(ROUNDS):
            call()
        pipe.engine.synchronize()
        taken.append((time.perf_counter() - start) / ROUNDS)
    return sorted(taken)[1], spread(taken)


def _job_step(pipe: Pipeline, batch: int, settings: Any) -> tuple[float, Any]:
    """The same of a step of a job's loop."""
    from fastgen.generate.run import Run as Generation

    generation = Generation(pipe, requests(pipe, batch), settings)
    (cut,) = generation.batches(batch)
    steps = generation.steps(cut)
    next(steps)
    next(steps)  # records
    return _seconds(pipe, lambda: next(steps))
