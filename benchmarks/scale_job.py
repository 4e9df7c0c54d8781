"""The jobs that `benchmarks.scale` runs: requests in equal batches, by this process or by a pool of workers."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.prompts import conditions
from benchmarks.report import timed
from fastgen.cluster.machines import Slot
from fastgen.cluster.pool import Pool
from fastgen.cluster.work import PoolWork
from fastgen.cluster.worker import WorkerOptions
from fastgen.errors import FastgenError
from fastgen.files.hashes import sha256_file
from fastgen.generate.job import run_job, run_work
from fastgen.generate.pipeline import Pipeline, load
from fastgen.generate.recipe import Recipe
from fastgen.generate.requests import Request
from fastgen.models.bundle import Bundle

SIZES = (16, 8, 4, 2, 1)  # of batches; 16 is the default of `fastgen generate` on a CPU
LEAST_STEPS, MOST_STEPS = 4, 250
TIMED_STEPS = (2, 10)  # of the runs that tell the seconds of a step

Digests = dict[str, str]  # file -> SHA-256


class Job(NamedTuple):
    """`batches` batches of `batch_size` images, each of `steps` steps."""

    kind: str  # of the model's condition
    batch_size: int
    steps: int
    batches: int

    @property
    def images(self) -> int:
        return self.batch_size * self.batches

    @property
    def recipe(self) -> Recipe:
        """Requests with made-up prompts or labels, and their own names."""
        given = conditions(self.kind, self.images)
        requests = [
            Request(
                str(i),
                f"{i}.png",
                prompt=given["prompts"][i] if "prompts" in given else None,
                labels=tuple(given["labels"][i]) if "labels" in given else None,
            )
            for i in range(self.images)
        ]
        return Recipe(requests, {"num_inference_steps": self.steps})

    def short(self, batches: int) -> Job:
        """A part of the job, which warms a side up."""
        return self._replace(batches=batches)


class Taken(NamedTuple):
    """What a job took: seconds, CPU seconds of this process, and the files that it wrote."""

    seconds: float
    cpu_s: float
    digests: Digests


Side = Callable[[Job, Path], Any]  # runs a job into a folder


def on_this(pipeline: Pipeline) -> Side:
    """`run_job` in this process."""
    return lambda job, out: run_job(job.recipe.run(pipeline, None), out, batch_size=job.batch_size, progress=False)


def on_pool(pool: Pool) -> Side:
    """`run_work` on the workers of a pool."""
    return lambda job, out: run_work(PoolWork(pool, job.recipe), out, batch_size=job.batch_size, progress=False)


def take(side: Side, job: Job, out: Path) -> Taken:
    """Run a job into the new folder `out`, read it, and remove it."""
    cpu_s, start = time.process_time(), time.perf_counter()
    side(job, out)
    seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu_s
    digests = digests_of(out)
    shutil.rmtree(out)
    return Taken(seconds, cpu_s, digests)


def digests_of(folder: Path) -> Digests:
    """SHA-256 of all files but job.json, which holds the times."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "job.json"]
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}


def different(one: Digests, other: Digests) -> int:
    """How many files are not the same in both, or are in one only."""
    return sum(one.get(name) != other.get(name) for name in one.keys() | other.keys())


class Cluster:
    """A bundle and an engine, and a local cluster that can run workers with them. `ray`: the module, connected. `kind`: of the
    bundle's condition."""

    def __init__(self, ray: Any, bundle: Bundle, engine: str) -> None:
        self._ray, self.engine = ray, engine
        self.model, self.kind = bundle.folder.absolute(), bundle.spec.condition.kind

    @contextmanager
    def pool(self, threads: int) -> Iterator[Pool]:
        """Workers of so many CPUs and threads, as many as the machine has room for, all ready. Raises FastgenError at the end
        where one has died: its work was done again, so that times are not comparable."""
        options = WorkerOptions(self.model, self.engine, {"device": "cpu", "threads": threads})
        with Pool(self._ray, Slot(threads, gpu=False), options) as pool:
            pool.wait()
            yield pool
            if pool.deaths:
                raise FastgenError(f"{pool.deaths} workers died while they were timed; measure again")

    def pipeline(self, threads: int) -> Pipeline:
        """The same model in this process."""
        return load(self.model, self.engine, device="cpu", threads=threads)


class Costs:
    """Seconds of a batch of a pipeline, by batch size and steps."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline, self.kind = pipeline, pipeline.spec.condition.kind
        self._of: dict[int, tuple[float, float]] = {}

    def job(self, batch_s: float, batches: int) -> Job:
        """A job whose batches take about `batch_s` seconds here: the largest batch size with at least LEAST_STEPS steps."""
        allowed = self._pipeline.buckets(self._pipeline.settings())
        sizes = [size for size in SIZES if allowed is None or size in allowed] or list(allowed or ())[:1]
        for size in sizes:
            rest, step = self._batch(size)
            steps = round((batch_s - rest) / step)
            if steps >= LEAST_STEPS:
                break
        return Job(self.kind, size, min(max(steps, 1), MOST_STEPS), batches)

    def _batch(self, size: int) -> tuple[float, float]:
        """(seconds of all but the steps, seconds of a step)."""
        if size not in self._of:
            few, many = (self._seconds(Job(self.kind, size, steps, 1)) for steps in TIMED_STEPS)
            step = max(1e-6, (many - few) / (TIMED_STEPS[1] - TIMED_STEPS[0]))
            self._of[size] = max(0.0, few - TIMED_STEPS[0] * step), step
        return self._of[size]

    def _seconds(self, job: Job) -> float:
        """The best of two runs behind a first one, for which engines compile."""
        run = job.recipe.run(self._pipeline, None)
        (batch,) = run.batches(job.batch_size)
        return min([timed(lambda: run.begin(batch)()) for _ in range(3)][1:])
