"""The parts of benchmarks/gpu.py: each takes the Bench, prints what it found, and returns it for the JSON."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_targets import judge
from benchmarks.matrix import line
from benchmarks.measure import Matrix, Plan
from benchmarks.models import random_model
from benchmarks.profiler import kernel_profile
from benchmarks.prompts import conditions
from benchmarks.report import parity, table
from benchmarks.rows import UNITS
from benchmarks.sides import Side
from fastgen.buckets import cut
from fastgen.errors import FastgenError
from fastgen.jobs.job import run_job
from fastgen.jobs.plan import automatic_batch_size

TEXT, LABELS = ("monsters-pndm-rag", "iclevr-class-embed"), ("monsters-64", "iclevr-64")
Row = dict[str, Any]


@dataclass
class Bench:
    """What all sections share; `results` becomes gpu.json."""

    out: Path
    work: Path
    device: str
    deadline: float
    requests: Path | None
    images: int
    tiny: bool
    engine: str | None = None
    results: dict[str, Any] = field(default_factory=lambda: {"notes": {}, "seconds": {}, "columns": UNITS})
    expected: dict[Path, dict[int, np.ndarray]] = field(default_factory=dict)

    @property
    def text(self) -> Path:
        name = LABELS[0] if self.tiny else TEXT[0]
        return random_model(name, self.work / name)

    @property
    def label(self) -> Path:
        name = LABELS[1] if self.tiny else TEXT[1]
        return random_model(name, self.work / name)

    @property
    def low(self) -> str:
        """The lower precision of this device."""
        return "fp16" if self.device.startswith("cuda") else "bf16"

    @property
    def graphs(self) -> str:
        return ":graphs" if self.device.startswith("cuda") else ""

    @property
    def left(self) -> float:
        return self.deadline - time.perf_counter()

    def save(self) -> None:
        (self.out / "gpu.json").write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")

    def matrix(self, name: str, model: Path, sides: Sequence[str], **plan: Any) -> list[Row]:
        """Rows of these sides in this process, saved after each as results[name]."""
        requests = self.requests if model == self.text else None
        whole = Plan(model, self.work, self.device, processes=False, seconds=self.left, requests=requests, **plan)
        matrix = Matrix(whole, [Side.parse(side) for side in sides])
        matrix.expected = self.expected.setdefault(model, {})
        rows = self.results[name] = []
        for row in matrix.rows():
            print(line(row), flush=True)
            rows.append(row)
            self.save()
        self.results.setdefault("settings", matrix.settings())
        self.results["settings"]["rates"] |= matrix.settings()["rates"]
        return rows


def correctness(bench: Bench) -> list[Row]:
    """Paths that need no long compilation against eager fp32 from the same noise, graphs on against off, and that the loop
    never waits for the device. Later sections' rows are judged by the same rule in the end."""
    low, graphs = bench.low, bench.graphs
    sides = list(dict.fromkeys(["eager:fp32", "eager:bf16", f"eager:{low}", f"eager:{low}{graphs}"]))
    others = [f"ort:{low}", f"trt:{low}"] if graphs else []
    settings = {"batches": (4,), "steps": (3 if bench.tiny else 10,), "images": 4, "rounds": 1, "together": 2}
    bench.matrix("correctness-text", bench.text, [*sides, *others], **settings)
    bench.matrix("correctness-labels", bench.label, sides, **settings)
    return [*_graphs_change_nothing(bench), *_no_waiting(bench)]


def _graphs_change_nothing(bench: Bench) -> list[Row]:
    if not bench.graphs:
        return []
    found = []
    for model in (bench.text, bench.label):
        images = [_generate(_load(bench, model, f"eager:{bench.low}:{g}"), 3, 10) for g in ("graphs", "nographs")]
        difference = parity(*images)["max_abs_255"]
        found.append(
            {"what": f"graphs on and off, {model.name}", "found": f"{difference}/255", "passed": difference <= 1}
        )
    return found


def _no_waiting(bench: Bench) -> list[Row]:
    """Synchronisations that torch reports, at two numbers of steps: a loop that never waits has as many at either."""
    if not bench.graphs:
        return []
    pipeline = _load(bench, bench.text, f"eager:{bench.low}:graphs")
    counts = [_synchronisations(pipeline, steps) for steps in (10, 20)]
    what = "synchronisations of a batch at 10 and at 20 steps"
    return [{"what": what, "found": counts, "passed": counts[0] == counts[1]}]


def _synchronisations(pipeline: Any, steps: int) -> int:
    import torch

    _generate(pipeline, 3, steps)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            _generate(pipeline, 3, steps)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def _load(bench: Bench, model: Path, side: str) -> Any:
    import fastgen

    parsed = Side.parse(side)
    return fastgen.load(model, parsed.name, device=bench.device, dtype=parsed.dtype, graphs=parsed.graphs)


def _generate(pipeline: Any, count: int, steps: int | None = None) -> np.ndarray:
    given = conditions(pipeline.spec.family, count)
    images = pipeline.generate(**given, seeds=range(count), batch_size=count, num_inference_steps=steps)
    return np.stack([np.asarray(image) for image in images])


def fastest(bench: Bench) -> str:
    """The side to use from here on: the fastest at the largest batch among those that were correct."""
    if bench.engine is None:
        candidates = [f"eager:{bench.low}{bench.graphs}", f"compile:{bench.low}{bench.graphs}"]
        batch, steps = (4, 3) if bench.tiny else (128, 15)
        plan = {"batches": (batch,), "steps": (steps,), "images": batch, "rounds": 1}
        rows = bench.matrix("choice", bench.text, candidates, **plan)
        good = [row for row in rows if row["images_per_s"] is not None and judge(row, rows)["passed"]]
        if not good:
            raise FastgenError("no engine is correct at the largest batch, see `choice` in the JSON")
        bench.engine = max(good, key=lambda row: row["images_per_s"])["side"]
        print(f"from here on: {bench.engine}", flush=True)
    return bench.engine


def job(bench: Bench) -> Row:
    """The whole job from requests to PNGs on a pipeline that has run a batch of each size: what is compiled or recorded then
    is `build_s`, not part of `job_s`."""
    from fastgen.requests import Request, read_requests

    side = fastest(bench)
    start = time.perf_counter()
    pipeline = _load(bench, bench.text, side)
    load_s = time.perf_counter() - start
    prompts = conditions("text", bench.images)["prompts"]
    requests = [Request(str(i), f"{i}.png", prompt=prompt) for i, prompt in enumerate(prompts)]
    if bench.requests is not None:
        requests = read_requests(bench.requests)[: bench.images]
    settings = pipeline.settings()
    limit = automatic_batch_size(pipeline, settings)
    sizes = {batch.bucket for batch in cut(len(requests), limit, pipeline.buckets(settings))}
    build_s = sum(_job_s(pipeline, requests[:size], settings, size) for size in sorted(sizes, reverse=True))
    job_s = _job_s(pipeline, requests, settings, limit)
    count = len(requests)
    row = {"side": side, "images": count, "solver": settings.solver, "batches": sorted(sizes), "load_s": load_s}
    row |= {"build_s": build_s, "job_s": job_s, "images_per_s": count / job_s}
    print(table([row]), flush=True)
    return row


def _job_s(pipeline: Any, requests: Sequence[Any], settings: Any, batch_size: int) -> float:
    """Seconds of a job; FastgenError where an image failed."""
    with tempfile.TemporaryDirectory() as folder:
        report = run_job(
            pipeline, requests, Path(folder) / "out", settings, batch_size=batch_size, progress=False, say=print
        )
    if report.errors:
        raise FastgenError(
            f"{len(report.errors)} of {len(requests)} images failed: {next(iter(report.errors.values()))}"
        )
    return report.seconds


def peers(bench: Bench) -> list[Row]:
    """diffusers as people use it, at batch 1 and at larger ones, from 16 prompts or a batch."""
    batches, images = ((1, 2), 2) if bench.tiny else ((1, 16, 64, 128), 16)
    return bench.matrix("peers", bench.text, [f"diffusers:{bench.low}"], batches=batches, images=images, rounds=1)


def one(bench: Bench) -> list[Row]:
    """Batch 1: graphs on and off, and diffusers."""
    sides = [f"diffusers:{bench.low}", f"eager:{bench.low}", f"eager:{bench.low}{bench.graphs}", fastest(bench)]
    images = 1 if bench.tiny else 3
    return bench.matrix("one", bench.text, list(dict.fromkeys(sides)), batches=(1,), images=images, rounds=2)


def labels(bench: Bench) -> list[Row]:
    """The label model: 32 images, DDPM 1000."""
    sides = [f"eager:{bench.low}{bench.graphs}", fastest(bench), f"diffusers:{bench.low}"]
    plan = {"batches": (2,), "steps": (10,)} if bench.tiny else {"batches": (32,), "rounds": 1}
    return bench.matrix("labels", bench.label, list(dict.fromkeys(sides)), **{"rounds": 1, "job": 32, **plan})


def growth(bench: Bench) -> list[Row]:
    """Batch 128, for its share of the floor, then from 1 up: time per image and memory."""
    side = fastest(bench)
    compiles = side.startswith("compile")  # for every batch size anew
    others = (1, 2) if bench.tiny else (1, 8, 32) if compiles else (1, 2, 4, 8, 16, 32, 64)
    largest = 4 if bench.tiny else 128
    rows = bench.matrix("growth", bench.text, [side], batches=(largest,), rounds=2)
    rows += bench.matrix("growth", bench.text, [side], batches=others, rounds=2)
    bench.results["growth"] = rows
    value = {"settings": bench.results["settings"], "environment": bench.results["environment"], "rows": rows}
    (bench.out / "growth.json").write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    return rows


def slow(bench: Bench) -> list[Row]:
    """A loop by hand in fp32, a prompt at a time, and diffusers in fp32, from 16 prompts."""
    sides = ["two-calls:fp32@1", "diffusers:fp32@1"]
    images = 2 if bench.tiny else 16
    return bench.matrix("slow", bench.text, sides, batches=(1,), images=images, rounds=1, together=1)


def compiled_peer(bench: Bench) -> list[Row]:
    """diffusers with torch.compile."""
    batch = 2 if bench.tiny else 16
    sides = [f"diffusers:{bench.low}", f"diffusers-compile:{bench.low}"]
    return bench.matrix("compiled-peer", bench.text, sides, batches=(batch,), images=batch, rounds=1)


def profile(bench: Bench) -> dict[str, Any]:
    """Where the time of the job's engine goes: a batch at a few steps."""
    batch, steps = (2, 2) if bench.tiny else (64, 5)
    pipeline = _load(bench, bench.text, fastest(bench))
    found = kernel_profile(lambda: _generate(pipeline, batch, steps))
    print(f"{found['wall_ms']:.0f} ms, device busy {found['busy_percent']:.0f}%\n{table(found['kinds'])}")
    print(table(found["kernels"]), flush=True)
    return {"side": bench.engine, "batch": batch, "steps": steps, **found}


def tests(bench: Bench) -> dict[str, Any]:
    """The package's own tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-x" if bench.tiny else "-q", "tests"]
    limit = max(10.0, bench.left)
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit, cwd=Path(__file__).parents[1])
    tail = done.stdout.strip().splitlines()[-15:]
    print("\n".join(tail), flush=True)
    ok = done.returncode in (0, 5)  # 5: none was selected
    return {"what": "pytest -m gpu", "found": tail[-1] if tail else "", "passed": ok, "output": tail}
