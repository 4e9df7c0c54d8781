"""What `benchmarks.scale` measures, a function each: they return rows."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

from benchmarks.report import spread
from benchmarks.scale_job import Cluster, Costs, Digests, Job, Side, Taken, different, on_pool, on_this, take
from benchmarks.scale_table import MOST_PERCENT
from fastgen.engines.machine import usable_cores
from fastgen.errors import FastgenError

FIRST = "first.png"
PROCESSES = Path("/proc")
DRIVER_IMAGES = 320, 1600  # of two jobs, whose difference is what a picture costs this process
LOOK_S = 0.005  # between two looks at the first picture
SIBLINGS = Path("/sys/devices/system/cpu/cpu0/topology/thread_siblings_list")
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
PRODUCTS = """
import sys, time
import numpy as np
a = np.random.default_rng(0).standard_normal((256, 256), np.float32)
end, count = time.perf_counter() + float(sys.argv[1]), 0
while time.perf_counter() < end:
    a @ a
    count += 1
print(count)
"""
Row = dict[str, Any]


def cores(seconds: float, rounds: int = 3) -> Row:
    """What the machine's cores are worth: matrix products of one process a core, all at once, over those of one process alone.
    Near 1, they are threads of one core. `siblings`: what the kernel says of the first core."""

    def products(count: int) -> int:
        command = [sys.executable, "-c", PRODUCTS, str(seconds)]
        environment = os.environ | ONE_THREAD
        processes = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) for _ in range(count)]
        return sum(int(process.communicate()[0]) for process in processes)

    ratios = [products(usable_cores()) / products(1) for _ in range(rounds)]
    siblings = SIBLINGS.read_text().strip() if SIBLINGS.is_file() else None
    return {
        "cores": usable_cores(),
        "all_over_one": statistics.median(ratios),
        "spread": spread(ratios),
        "siblings": siblings,
    }


def overhead(
    cluster: Cluster, levels: Sequence[tuple[float, int]], rounds: int, idle_s: float, scratch: Path
) -> tuple[list[Row], float | None, float]:
    """A row for each level (seconds of a batch, batches): one worker with all CPUs against this process, in turns. How many CPU
    seconds the idle cluster takes in a second, beside both of them; of the mean over `idle_s`, None where /proc is missing. And
    the CPU milliseconds of this process for each picture that a worker makes, see `driver_ms`.

    Raises FastgenError where the two folders differ in more than job.json.
    """
    threads = usable_cores()
    pipeline = cluster.pipeline(threads)
    costs = Costs(pipeline)
    jobs = [costs.job(batch_s, batches) for batch_s, batches in levels]
    with cluster.pool(threads) as pool:
        sides = {"local": on_this(pipeline), "ray": on_pool(pool)}
        rows = [_overhead(target, job, sides, rounds, scratch) for (target, _), job in zip(levels, jobs, strict=True)]
        return rows, idle(idle_s), driver_ms(sides["ray"], jobs[0], scratch)


def driver_ms(side: Side, job: Job, scratch: Path) -> float:
    """CPU milliseconds of this process for one picture more, the median of three: of the difference between a job of
    `DRIVER_IMAGES[1]` images and one of `DRIVER_IMAGES[0]`, as the start and the end of a job are not of each picture."""
    few, many = (job._replace(batch_size=16, steps=1, batches=images // 16) for images in DRIVER_IMAGES)
    found = []
    for _ in range(3):
        less, more = (take(side, one, scratch / "driver").cpu_s for one in (few, many))
        found.append(1000 * max(0.0, more - less) / (many.images - few.images))
    return statistics.median(found)


def idle(seconds: float) -> float | None:
    """CPU seconds per second of this process and those below it, while nothing is asked of them; None without /proc."""
    before = _cpu_s()
    time.sleep(seconds)
    after = _cpu_s()
    return None if not before else sum(after[p] - before[p] for p in before.keys() & after.keys()) / seconds


def _cpu_s() -> dict[int, float]:
    """CPU seconds of this process and all below it, by process."""
    parents, taken = dict[int, int](), dict[int, float]()
    for file in PROCESSES.glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            fields = file.read_text().rpartition(")")[2].split()
            parents[int(file.parent.name)] = int(fields[1])
            taken[int(file.parent.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    family, todo = set[int](), {os.getpid()} & parents.keys()
    while todo:
        family |= todo
        todo = {child for child, parent in parents.items() if parent in todo}
    return {process: taken[process] for process in family}


def _overhead(target_s: float, job: Job, sides: Mapping[str, Side], rounds: int, scratch: Path) -> Row:
    for side in sides.values():
        take(side, job.short(1), scratch / "warm")
    taken: dict[str, list[Taken]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            taken[name].append(take(sides[name], job, scratch / "job"))
    expected = taken["local"][0].digests
    wrong = sum(different(expected, one.digests) for side in taken.values() for one in side)
    if wrong:
        raise FastgenError(f"batches of {target_s:g} s: {wrong} files differ between --ray and this process")
    local, ray = ([one.seconds for one in taken[name]] for name in ("local", "ray"))
    shares = [100 * (r / own - 1) for r, own in zip(ray, local, strict=True)]
    percent = statistics.median(shares)
    return {
        "target_s": target_s,
        "batch_s": statistics.median(local) / job.batches,
        **_facts(job),
        "local_s": statistics.median(local),
        "ray_s": statistics.median(ray),
        "overhead_ms_per_batch": 1000
        * statistics.median(r - own for r, own in zip(ray, local, strict=True))
        / job.batches,
        "overhead_percent": percent,
        "spread_percent": spread(shares),
        "holds": percent <= MOST_PERCENT if target_s >= 1 else None,
        "files": len(expected),
        "different_files": wrong,
    }


def _facts(job: Job) -> Row:
    return {"batch_size": job.batch_size, "steps": job.steps, "batches": job.batches}


def workers(cluster: Cluster, size: tuple[float, int], rounds: int, scratch: Path) -> list[Row]:
    """Images/s of a job of `size` (seconds of a batch, batches) by this process and by workers, with all threads and with one.

    `different_files`: than this process writes with as many threads.
    """
    most = usable_cores()
    counts = sorted({most, 1}, reverse=True)
    pipelines = {threads: cluster.pipeline(threads) for threads in counts}
    job = Costs(pipelines[most]).job(*size)
    taken: dict[tuple[str, int], list[Taken]] = {(where, n): [] for where in ("local", "ray") for n in counts}
    for number in range(rounds):
        for where, threads in list(taken)[:: -1 if number % 2 else 1]:
            opened: AbstractContextManager[Any] = cluster.pool(threads) if where == "ray" else nullcontext()
            with opened as pool:
                side = on_pool(pool) if where == "ray" else on_this(pipelines[threads])
                take(side, job.short(min(most // threads, job.batches)), scratch / "warm")
                taken[where, threads].append(take(side, job, scratch / "job"))
    return [
        _speed(cluster.engine, job, where, threads, most, found, taken["local", threads][0].digests)
        for (where, threads), found in taken.items()
    ]


def _speed(
    engine: str, job: Job, where: str, threads: int, most: int, taken: Sequence[Taken], expected: Digests
) -> Row:
    rates = [job.images / one.seconds for one in taken]
    return {
        "engine": engine,
        "where": where,
        "workers": most // threads if where == "ray" else None,
        "threads": threads,
        **_facts(job),
        "images_per_s": statistics.median(rates),
        "spread": spread(rates),
        "different_files": sum(different(expected, one.digests) for one in taken),
    }


def start(cluster: Cluster, rounds: int, scratch: Path) -> list[Row]:
    """Seconds of whole commands of one image, until the image and until the end; a first round fills the file cache."""
    request = Job(cluster.kind, 1, 1, 1).recipe.requests[0]
    condition = {"prompt": request.prompt} if request.prompt is not None else {"labels": request.labels}
    file = scratch / "one.json"
    file.write_text(json.dumps([{"image_name": FIRST, **condition}]))
    command = [sys.executable, "-m", "fastgen", "generate", str(file), "--model", str(cluster.model)]
    command += ["--engine", cluster.engine]
    rows = []
    ways: dict[str, list[str]] = {"local": [], "ray": ["--ray"]}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, words in ways.items():
            out = scratch / f"{name}-{number}"
            taken[name].append(first_image([*command, "--out", str(out), *words], out / FIRST))
    for name, seconds in taken.items():
        first_s, command_s = zip(*seconds[1:], strict=True)
        rows.append(
            {
                "where": name,
                "first_image_s": statistics.median(first_s),
                "spread_s": spread(first_s),
                "command_s": statistics.median(command_s),
            }
        )
    return rows


def first_image(command: Sequence[str], file: Path) -> tuple[float, float]:
    """Seconds until a command has written `file`, and until it ends. Raises FastgenError where it fails."""
    began, first_s = time.perf_counter(), 0.0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not first_s:
            if file.exists():
                first_s = time.perf_counter() - began
            time.sleep(LOOK_S)
        _, said = process.communicate()
    seconds = time.perf_counter() - began
    if process.returncode or not file.exists():
        raise FastgenError(f"{' '.join(command)}: {said.strip().splitlines()[-1] if said.strip() else 'no picture'}")
    return first_s or seconds, seconds
