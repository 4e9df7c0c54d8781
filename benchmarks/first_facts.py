"""Facts of benchmarks/first.py on pictures: who agrees with whom, on the two models that come with fastgen."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.gpu_targets import GREY_LEVELS, PSNR_DB
from benchmarks.machine import environment
from benchmarks.part_worker import raised
from benchmarks.parts import Fact, Run
from benchmarks.prompts import conditions
from benchmarks.report import parity
from fastgen.engines.machine import cpu, has_half

if TYPE_CHECKING:
    from fastgen.generate.pipeline import Pipeline
    from fastgen.generate.requests import Request
    from fastgen.generate.settings import Settings

MODELS = "iclevr-64", "monsters-64"
COUNT, STEPS = 4, 8  # images, and solver steps, of every comparison
KINDS: dict[str, dict[str, Any]] = {
    "guided": {"guidance_scale": 3.0},
    "unguided": {"guidance_scale": 1.0},
    "interval": {"guidance_scale": 3.0, "guidance_interval": (2, 6)},
    "ddpm": {"scheduler": "ddpm"},
    "sde": {"scheduler": "dpmpp-2m-sde"},
}
SIZES, FEW_SIZES = (7, 5, 7, 5, 3), (3, 2, 3)  # of batches that overlap
TABLES = range(2, 26)  # steps of 24 solver tables
NEEDS_GPU = "needs a GPU"
NEEDS_BF16 = "this CPU does not compute in bf16"


@functools.cache
def pipeline(model: str, device: str, dtype: str, graphs: bool | None = None, engine: str = "eager") -> Pipeline:
    """A shipped model on an engine, loaded once per process. `graphs` stays the engine's own choice on a CPU."""
    import fastgen

    return fastgen.load(model, engine, device=device, dtype=dtype, graphs=graphs if device.startswith("cuda") else None)


def images(pipe: Pipeline, count: int = COUNT, **settings: Any) -> np.ndarray:
    """(count, H, W, 3) uint8 of made-up conditions, image i from seed i, in one batch."""
    given: dict[str, Any] = conditions(pipe.spec.condition.kind, count)
    options = {"num_inference_steps": STEPS, **settings}
    return np.stack([np.asarray(i) for i in pipe.generate(**given, seeds=range(count), batch_size=count, **options)])


def requests(pipe: Pipeline, count: int) -> list[Request]:
    """The same as requests."""
    from fastgen.generate.requests import Request

    given = conditions(pipe.spec.condition.kind, count)
    if "prompts" in given:
        return [Request(str(i), f"{i}.png", prompt=p, seed=i) for i, p in enumerate(given["prompts"])]
    return [Request(str(i), f"{i}.png", labels=tuple(names), seed=i) for i, names in enumerate(given["labels"])]


def compared(
    what: str, expected: np.ndarray, found: np.ndarray, *, dtype: str = "fp32", most: int | None = None
) -> Fact:
    """Whether pictures agree: `most` grey levels apart where that is given, else as far as the precision may be."""
    figures = parity(expected, found)
    psnr, levels = figures["psnr_db"], figures["max_abs_255"]
    if most is not None or dtype == "fp32":
        allowed = GREY_LEVELS if most is None else most
        return {"what": what, "passed": bool(levels <= allowed), **figures, "allowed": f"{allowed}/255"}
    return {"what": what, "passed": psnr is None or bool(psnr >= PSNR_DB), **figures, "allowed": f"{PSNR_DB:.0f} dB"}


def about(run: Run) -> Iterator[Fact]:
    """Card, driver, versions, commit, and what torch does with fp32 by default."""
    import torch

    cudnn, matmul = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    yield {"what": "environment", "device": run.device, **environment(), "cudnn_tf32": cudnn, "matmul_tf32": matmul}
    if run.cuda:
        x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        there = x.to(run.device)
        error = float(((there @ there).cpu() - x @ x).abs().max())
        yield {"what": "the device multiplies", "passed": error < 1e-9, "max_abs": error}


def agreement(run: Run, model: str) -> Iterator[Fact]:
    """Graphs = no graphs = the CPU in fp32, for every kind of loop; and a second run the same bytes."""
    reference = pipeline(model, "cpu", "fp32")
    for kind, options in KINDS.items():
        try:
            expected = images(reference, **options)
        except Exception as error:
            yield raised(f"{kind}, reference", error)
            continue
        for dtype in dict.fromkeys(("fp32", run.low)):
            yield from _loops_agree(run, model, f"{kind}, {dtype}", dtype, expected, options)


def _loops_agree(
    run: Run, model: str, what: str, dtype: str, expected: np.ndarray, options: dict[str, Any]
) -> Iterator[Fact]:
    try:
        plain = images(pipeline(model, run.device, dtype, False), **options)
    except Exception as error:
        yield raised(f"{what}, no graphs", error)
        return
    yield compared(f"{what}, no graphs: the CPU's pictures", expected, plain, dtype=dtype)
    if not run.cuda:
        again = images(pipeline(model, run.device, dtype, False), **options)
        yield compared(f"{what}, no graphs: a second run", plain, again, most=0)
        yield {"what": f"{what}, graphs", "skipped": NEEDS_GPU}
        return
    try:
        graphs, again = (images(pipeline(model, run.device, dtype, True), **options) for _ in range(2))
    except Exception as error:
        yield raised(f"{what}, graphs", error)
        return
    yield compared(f"{what}, graphs: the CPU's pictures", expected, graphs, dtype=dtype)
    yield compared(f"{what}, graphs: those without", plain, graphs, most=1)
    yield compared(f"{what}, graphs: a second run", graphs, again, most=0)


def full_precision(run: Run, model: str) -> Iterator[Fact]:
    """fp32 is fp32 whatever the process allows: with TF32 on and off the same pictures, within fp32's tolerance, and the
    process's own flags (of cuDNN's convolutions, of matrix products) as they were."""
    import torch

    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    own = cudnn.allow_tf32, matmul.allow_tf32
    expected, found = images(pipeline(model, "cpu", "fp32")), {}
    for allowed in (True, False):
        what = f"fp32 where the process has TF32 {'on' if allowed else 'off'}"
        pipeline.cache_clear()  # graphs and algorithms are chosen under the flags
        try:
            cudnn.allow_tf32 = matmul.allow_tf32 = allowed
            found[allowed] = images(pipeline(model, run.device, "fp32", True))
            after = [cudnn.allow_tf32, matmul.allow_tf32]
        except Exception as error:
            yield raised(what, error)
            continue
        finally:
            cudnn.allow_tf32, matmul.allow_tf32 = own
        yield compared(f"{what}: the CPU's pictures", expected, found[allowed])
        same = after == [allowed, allowed]
        yield {"what": f"{what}: the flags afterwards", "passed": same, "before": [allowed, allowed], "after": after}
    if len(found) == 2:
        yield compared("fp32: the flags change nothing", found[False], found[True], most=0)


def half_precision(run: Run, model: str) -> Iterator[Fact]:
    """bf16 against the CPU in fp32."""
    if not run.cuda and not has_half(cpu(), "bf16"):
        yield {"what": "bf16", "skipped": NEEDS_BF16}
        return
    found = images(pipeline(model, run.device, "bf16", True))
    yield compared("bf16: the CPU's pictures", images(pipeline(model, "cpu", "fp32")), found, dtype="bf16")


def overlap(run: Run, model: str) -> Iterator[Fact]:
    """Batches of alternating sizes that overlap are the sequential ones; again when many loops have come and gone, when
    streams and memory pools that rotate would have come round."""
    pipe = pipeline(model, run.device, run.low, True)
    settings = pipe.settings(scheduler="ddpm", num_inference_steps=12)
    sizes, tables = (SIZES, TABLES) if run.cuda else (FEW_SIZES, TABLES[:2])
    expected = batches(pipe, settings, sizes, queued=1)
    yield compared("overlapped batches", expected, batches(pipe, settings, sizes, queued=2), most=0)
    for steps in tables:
        images(pipe, num_inference_steps=steps)
    found = batches(pipe, settings, sizes, queued=2)
    yield compared(f"overlapped batches after {len(tables)} tables", expected, found, most=0)


def batches(pipe: Pipeline, settings: Settings, sizes: Sequence[int], queued: int) -> np.ndarray:
    """Pictures of one batch per size, with so many of them queued at a time."""
    from fastgen.engines.batches import Batch
    from fastgen.generate.run import Run as Generation

    whole = Generation(pipe, requests(pipe, sum(sizes)), settings)
    found, waiting, start = [], [], 0
    for size in sizes:
        waiting.append(whole.begin(Batch(start, start + size, size)))
        start += size
        if len(waiting) == queued:
            found.append(waiting.pop(0)().pixels.copy())
    return np.concatenate([*found, *(wait().pixels.copy() for wait in waiting)])
