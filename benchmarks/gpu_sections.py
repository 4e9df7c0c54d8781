"""The sections of benchmarks/gpu.py, which benchmarks/first.py uses too: each yields its rows as facts.

What is the same for all of them is made once and kept in the run's folder: models, the machine's rates, and the first images
of each model by eager fp32. Only the compiled sections compile, at the sizes that a job uses.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from benchmarks import floor
from benchmarks.measure import PARITY_IMAGES, Matrix, Plan, model_spec
from benchmarks.models import random_model
from benchmarks.parts import Fact, Run
from benchmarks.profiler import kernel_profile
from benchmarks.prompts import conditions
from benchmarks.report import parity
from benchmarks.sides import Side
from fastgen.engines.batches import cut
from fastgen.errors import FastgenError
from fastgen.generate.estimate import automatic_batch_size
from fastgen.generate.job import run_job
from fastgen.generate.run import Run as Generation

if TYPE_CHECKING:
    from fastgen.generate.pipeline import Pipeline
    from fastgen.generate.requests import Request
    from fastgen.generate.settings import Settings

TEXT, LABELS = ("monsters-pndm-rag", "iclevr-class-embed"), ("monsters-64", "iclevr-64")
SPARE = 5.0  # seconds of a part's limit that a job which is fitted to it leaves


def text_model(run: Run) -> Path:
    name = LABELS[0] if run.tiny else TEXT[0]
    return random_model(name, run.work / name)


def label_model(run: Run) -> Path:
    name = LABELS[1] if run.tiny else TEXT[1]
    return random_model(name, run.work / name)


def fast(run: Run, engine: str = "eager") -> str:
    """The side that this engine is at its fastest: the lower precision, and graphs on a GPU."""
    return f"{engine}:{run.low}{':graphs' if run.cuda else ''}"


def rates(run: Run) -> dict[str, floor.Rates]:
    """What the device reaches in each precision: measured once in a run."""
    file = run.kept / "rates.json"
    if not file.exists():
        found = {dtype: floor.measure(run.device, dtype) for dtype in dict.fromkeys(("fp32", "bf16", run.low))}
        file.write_text(json.dumps({dtype: asdict(one) for dtype, one in found.items()}))
    return {dtype: floor.Rates(**one) for dtype, one in json.loads(file.read_text()).items()}


def references(run: Run, model: Path) -> dict[int, np.ndarray]:
    """Steps -> the model's first images by eager fp32: made once in a run."""
    file = run.kept / f"reference-{model.name}.npz"
    if not file.exists():
        found = Matrix(_plan(run, model), []).references()
        arrays: dict[str, Any] = {str(steps): images for steps, images in found.items()}
        np.savez(file, **arrays)
    with np.load(file) as kept:
        return {int(steps): kept[steps] for steps in kept}


def yardstick(run: Run, model: Path) -> dict[str, Any]:
    """What rounding alone costs in the lower precision: eager without graphs against eager fp32. Made once in a run."""
    file = run.kept / f"yardstick-{model.name}.json"
    if not file.exists():
        side = f"eager:{run.low}:nographs"
        ((steps, expected),) = references(run, model).items()
        found = parity(expected, generate(run, load(run, model, side), len(expected)))
        row = {"side": side, "dtype": run.low, "batch": len(expected), "steps": steps, **found}
        file.write_text(json.dumps(row))
    return json.loads(file.read_text())


def _plan(run: Run, model: Path, **options: Any) -> Plan:
    requests = run.requests if model_spec(model).condition.kind == "text" else None
    whole: dict[str, Any] = {
        "processes": False,
        "seconds": run.left,
        "strict": True,
        "job": run.images,
        "requests": requests,
        **options,
    }
    return Plan(model, run.work, run.device, **whole)


def rows(run: Run, model: Path, sides: Sequence[str], **options: Any) -> Iterator[Fact]:
    """A row per side and case, then what was set."""
    chosen = [Side.parse(side) for side in dict.fromkeys(sides)]
    matrix = Matrix(_plan(run, model, **options), chosen, references(run, model), rates(run))
    for row in matrix.rows():
        yield {"what": f"{row['side']}, batch {row['batch']}", "row": row}
    yield {"what": "settings", "settings": matrix.settings()}


def reference(run: Run) -> Iterator[Fact]:
    """What the others are held against: models, rates, and the pictures of eager fp32."""
    for model in (text_model(run), label_model(run)):
        yield {"what": f"{model.name} by eager fp32", "steps": list(references(run, model))}
    found = {d: {"tflop_per_s": r.flop_per_s / 1e12, "gb_per_s": r.bytes_per_s / 1e9} for d, r in rates(run).items()}
    yield {"what": "rates", "rates": found}


def load(run: Run, model: Path, side: str) -> Pipeline:
    """A side's pipeline."""
    import fastgen

    parsed = Side.parse(side)
    options = {} if parsed.graphs is None else {"graphs": parsed.graphs}
    return fastgen.load(model, parsed.name, device=run.device, dtype=parsed.dtype, **options)


def job_requests(run: Run) -> list[Request]:
    """The job: the first `run.images` of the given requests, or made-up prompts. Image i comes from seed i, as in all rows."""
    from fastgen.generate.requests import Request, read_requests

    if run.requests is not None:
        return [replace(r, seed=i) for i, r in enumerate(read_requests(run.requests)[: run.images])]
    prompts = conditions("text", run.images)["prompts"]
    return [Request(str(i), f"{i}.png", prompt=prompt, seed=i) for i, prompt in enumerate(prompts)]


def job_sizes(pipeline: Pipeline, settings: Settings, count: int) -> list[int]:
    """The batch sizes of a job of `count` images on this pipeline, as `run_job` chooses them, the largest first."""
    limit = automatic_batch_size(pipeline, settings)
    return sorted({batch.bucket for batch in cut(count, limit, pipeline.buckets(settings))}, reverse=True)


def job(run: Run, engine: str = "eager", fit: bool = False) -> Iterator[Fact]:
    """The whole job from requests to PNGs, at its own batch size, on a pipeline that has run a batch of each size: what is
    compiled or recorded then is `build_s`, not part of `job_s`. With `fit`, as many whole batches of it as the part's limit
    allows, and `job_s` is extrapolated. Parity is that of the job's first images."""
    side, model = fast(run, engine), text_model(run)
    expected, reached = references(run, model), rates(run)[run.low]
    start = time.perf_counter()
    pipeline = load(run, model, side)
    load_s, requests, settings = time.perf_counter() - start, job_requests(run), pipeline.settings()
    sizes = job_sizes(pipeline, settings, len(requests))
    build_s = sum(_run_job(pipeline, requests[:size], settings, size)[0] for size in sizes)
    count = len(requests)
    if fit:
        batch_s, _ = _run_job(pipeline, requests[: sizes[0]], settings, sizes[0])
        count = min(count, sizes[0] * max(1, int((run.left - SPARE - batch_s) / batch_s)))
    seconds, images = _run_job(pipeline, requests[:count], settings, sizes[0])
    evaluations = len(pipeline.source.table(settings.solver))
    shape: dict[str, Any] = {"images": count, "batch": sizes[0], "evaluations": evaluations}
    least = floor.floor_s(floor.count(model), reached, run.low, guided=settings.guided, **shape)
    row = {"side": side, "dtype": pipeline.engine.dtype, "batch": sizes[0], "batches": sizes, "solver": settings.solver}
    row |= {"steps": settings.num_inference_steps, "images": count, "job": len(requests), "load_s": load_s}
    row |= {"build_s": build_s, "job_s": seconds * len(requests) / count, "images_per_s": count / seconds}
    row |= {"floor_percent": 100 * least / seconds}
    row |= parity(expected[settings.num_inference_steps][: len(images)], images)
    yield {"what": f"{side}, {count} images", "row": row}


def _run_job(
    pipeline: Pipeline, requests: Sequence[Request], settings: Settings, batch_size: int
) -> tuple[float, np.ndarray]:
    """Seconds of a job, and its first images, as many as the reference has; FastgenError where an image failed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        whole = Generation(pipeline, requests, settings)
        report = run_job(whole, out, batch_size=batch_size, progress=False, say=print)
        if report.errors:
            first = next(iter(report.errors.values()))
            raise FastgenError(f"{len(report.errors)} of {len(requests)} images failed: {first}")
        files = [out / request.image_name for request in requests[:PARITY_IMAGES]]
        return report.seconds, np.stack([np.asarray(Image.open(file)) for file in files])


def generate(run: Run, pipeline: Pipeline, count: int, steps: int | None = None) -> np.ndarray:
    """(count, H, W, 3) uint8 of the first conditions, image i from seed i, in one batch."""
    given: dict[str, Any] = conditions(
        pipeline.spec.condition.kind, count, run.requests if pipeline.spec.condition.kind == "text" else None
    )
    images = pipeline.generate(**given, seeds=range(count), batch_size=count, num_inference_steps=steps)
    return np.stack([np.asarray(image) for image in images])


def peers(run: Run, batches: Sequence[int] = (1, 16, 64, 128)) -> Iterator[Fact]:
    """diffusers as people use it, at batch 1 and at larger ones, from 4 prompts or a batch."""
    images = 2 if run.tiny else 4
    yield from rows(run, text_model(run), [f"diffusers:{run.low}"], batches=tuple(batches), images=images, rounds=1)


def one(run: Run) -> Iterator[Fact]:
    """Batch 1: graphs on and off, and diffusers."""
    sides = [f"diffusers:{run.low}", f"eager:{run.low}"]
    sides += [fast(run), fast(run).replace(run.low, "bf16")] if run.cuda else []
    yield from rows(run, text_model(run), sides, batches=(1,), images=1 if run.tiny else 3, rounds=2)


def labels(run: Run) -> Iterator[Fact]:
    """The label model: 32 images with its own sampling, DDPM 1000."""
    plan = {"batches": (2 if run.tiny else 32,), "rounds": 1, "job": 32}
    yield from rows(run, label_model(run), [fast(run), f"diffusers:{run.low}"], **plan)


def growth(run: Run) -> Iterator[Fact]:
    """Time per image and memory from batch 1 to 128."""
    batches = (1, 2) if run.tiny else (1, 2, 4, 8, 16, 32, 64, 128)
    yield from rows(run, text_model(run), [fast(run)], batches=batches, rounds=2)


def bundles(run: Run) -> Iterator[Fact]:
    """The engines that run bundles, where they are installed: exported first."""
    sides = [f"ort:{run.low}", f"trt:{run.low}"] if run.cuda else ["ort:fp32"]
    yield from rows(run, text_model(run), sides, batches=(PARITY_IMAGES,), images=PARITY_IMAGES, rounds=1)


def slow(run: Run) -> Iterator[Fact]:
    """A loop by hand in fp32, a prompt at a time, and diffusers in fp32, from 4 prompts."""
    sides, images = ["two-calls:fp32@1", "diffusers:fp32@1"], 2 if run.tiny else 4
    yield from rows(run, text_model(run), sides, batches=(1,), images=images, rounds=1, together=1)


def profile(run: Run) -> Iterator[Fact]:
    """Where the time goes: a batch at a few steps."""
    batch, steps = (2, 2) if run.tiny else (64, 5)
    pipeline = load(run, text_model(run), fast(run))
    found = kernel_profile(lambda: generate(run, pipeline, batch, steps))
    yield {"what": fast(run), "result": {"side": fast(run), "batch": batch, "steps": steps, **found}}


def compiled_one(run: Run) -> Iterator[Fact]:
    """Batch 1, compiled."""
    sides, images = [fast(run, "compile")], 1 if run.tiny else 3
    yield from rows(run, text_model(run), sides, batches=(1,), images=images, rounds=2)


def compiled_labels(run: Run) -> Iterator[Fact]:
    """The label model's 32 images, compiled."""
    plan = {"batches": (2 if run.tiny else 32,), "rounds": 1, "job": 32}
    yield from rows(run, label_model(run), [fast(run, "compile")], **plan)


def compiled_peer(run: Run) -> Iterator[Fact]:
    """diffusers with torch.compile."""
    batch = 2 if run.tiny else 16
    sides = [f"diffusers:{run.low}", f"diffusers-compile:{run.low}"]
    yield from rows(run, text_model(run), sides, batches=(batch,), images=batch, rounds=1)
