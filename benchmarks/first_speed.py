"""Facts of benchmarks/first.py on speed: images per second, the job, diffusers beside it, and what compiling brings."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from benchmarks import gpu_sections
from benchmarks.first_facts import COUNT, NEEDS_GPU, compared, images, pipeline
from benchmarks.gpu_targets import is_yardstick, judge
from benchmarks.parts import Fact, Run
from benchmarks.prompts import conditions
from benchmarks.report import spread
from benchmarks.sides import Side
from fastgen.engines.compile.package import check_tools
from fastgen.errors import InputError

if TYPE_CHECKING:
    from fastgen.generate.pipeline import Pipeline

ROUNDS = 3
FIGURES: tuple[str, ...] = (
    "images_per_s",
    "spread",
    "ratio",
    "step_ms",
    "load_s",
    "build_s",
    "job_s",
    "floor_percent",
    "peak_mib",
)
FIGURES += ("psnr_db", "max_abs_255", "batch", "steps", "images", "job", "batches", "note")


def speed(run: Run, model: str) -> Iterator[Fact]:
    """Images per second of a shipped model's own sampling, with and without graphs, one at a time and 64 together."""
    for batch in (1, 64) if run.cuda else (1, 4):
        for graphs in (False, True):
            what = f"{run.low}, batch {batch}, {'graphs' if graphs else 'no graphs'}"
            if graphs and not run.cuda:
                yield {"what": what, "skipped": NEEDS_GPU}
                continue
            yield {"what": what, **images_per_s(pipeline(model, run.device, run.low, graphs), batch)}


def images_per_s(pipe: Pipeline, batch: int) -> dict[str, Any]:
    """Median and spread over a few batches, from conditions to pixels in the host's memory, after one that warms up."""
    given: dict[str, Any] = conditions(pipe.spec.condition.kind, batch)
    found = []
    for _ in range(1 + ROUNDS):
        start = time.perf_counter()
        pipe.generate(**given, seeds=range(batch), batch_size=batch)
        found.append(batch / (time.perf_counter() - start))
    return {"images_per_s": statistics.median(found[1:]), "spread": spread(found[1:]), "first_s": batch / found[0]}


def full_size(run: Run) -> Iterator[Fact]:
    """What the job needs: random weights of full size, their pictures by eager fp32, and the card's rates."""
    model = gpu_sections.text_model(run)
    yield {"what": "model", "model": model.name, "steps": list(gpu_sections.references(run, model))}
    rates = {
        d: {"tflop_per_s": r.flop_per_s / 1e12, "gb_per_s": r.bytes_per_s / 1e9}
        for d, r in gpu_sections.rates(run).items()
    }
    yield {"what": "rates", "rates": rates}
    own = gpu_sections.yardstick(run, model)
    figures = {key: own[key] for key in ("psnr_db", "max_abs_255")}
    yield {"what": f"{run.low}, no graphs: what rounding alone costs", **figures}


def job(run: Run) -> Iterator[Fact]:
    """As much of the job of 1,063 prompts as the limit allows, on random weights of full size."""
    own = gpu_sections.yardstick(run, gpu_sections.text_model(run))
    for fact in gpu_sections.job(run, fit=True):
        yield _judged(fact, [own])


def against_diffusers(run: Run) -> Iterator[Fact]:
    """diffusers and this package in turns, at one image and at larger batches: ratio, time of a step, share of the floor."""
    sides = list(dict.fromkeys([f"diffusers:{run.low}", f"eager:{run.low}", gpu_sections.fast(run)]))
    options: dict[str, Any] = {
        "batches": (1, 2) if run.tiny else (1, 16, 64),
        "images": 1 if run.tiny else 2,
        "rounds": 2,
    }
    rows: list[dict[str, Any]] = []
    for fact in gpu_sections.rows(run, gpu_sections.text_model(run), sides, **options):
        if "row" in fact:
            rows.append(fact["row"])
            yield _judged(fact, rows)


def _judged(fact: Fact, rows: list[dict[str, Any]]) -> Fact:
    """A row of figures as a fact; a check where it is this package's."""
    row = fact["row"]
    found = {key: row[key] for key in FIGURES if row.get(key) is not None}
    if row["images_per_s"] is None:
        return {"what": fact["what"], "skipped": row["note"]}
    if Side.parse(row["side"]).is_peer or (is_yardstick(row) and row["dtype"] != "fp32"):
        return {"what": fact["what"], **found}
    return {"what": fact["what"], "passed": judge(row, rows)["passed"], **found}


def compiled(run: Run, model: str) -> Iterator[Fact]:
    """Engine compile: how long the first pictures take, whether they are eager's, with and without graphs, and its speed."""
    if not run.cuda:
        yield {"what": "compile", "skipped": NEEDS_GPU}
        return
    try:
        check_tools(on_gpu=True)
    except InputError as error:
        yield {"what": "compile", "skipped": str(error)}
        return
    yield from compiled_facts(run, model)


def compiled_facts(run: Run, model: str) -> Iterator[Fact]:
    expected = images(pipeline(model, "cpu", "fp32"))
    start = time.perf_counter()
    pipe = pipeline(model, run.device, run.low, True, "compile")
    found = images(pipe)
    yield {"what": f"compile: the first {COUNT} pictures", "seconds": round(time.perf_counter() - start, 1)}
    yield compared("compile: the CPU's pictures", expected, found, dtype=run.low)
    plain = images(pipeline(model, run.device, run.low, False, "compile"))
    yield compared("compile: without graphs", found, plain, most=1)
    yield {"what": f"compile, {run.low}, batch 64", **images_per_s(pipe, 64 if run.cuda else 4)}
