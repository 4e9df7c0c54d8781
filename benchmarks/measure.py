"""Measuring a matrix of sides x batch sizes x steps. Every side runs in a process of its own, and sides that are compared
take turns, so that a busy machine slows all of them."""

from __future__ import annotations

import functools
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import floor
from benchmarks.environments import interpreter
from benchmarks.models import bundled, export_seconds
from benchmarks.prompts import conditions
from benchmarks.rows import NO_STEP, Case, Taken, shorter
from benchmarks.sides import FOREIGN, REFERENCE, Side, informed, missing
from benchmarks.worker import Local, Process
from fastgen.errors import FastgenError, first_line
from fastgen.models.spec import Spec
from fastgen.sampling.compile import TableCompiler
from fastgen.sampling.noise import normal
from fastgen.sampling.schedulers import default_name

PARITY_IMAGES = 4
LATE = "not measured: the time was used up"


@dataclass(frozen=True)
class Plan:
    """What is measured, and how carefully."""

    model: Path
    work: Path  # exports are kept here
    device: str = "cpu"
    batches: tuple[int, ...] = (1,)
    steps: tuple[int, ...] = ()  # empty: the model's own
    images: int = 1  # per timed round, at least a batch
    job: int = 1063  # images of the job that end-to-end times are for
    rounds: int = 3
    seconds: float = float(
        "inf"
    )  # no further round, batch size or number of steps begins later; each side is measured once
    strict: bool = False  # this process is ended after `seconds`: not even a side's first batch begins later
    threads: int | None = None
    together: int = 5  # sides that are in memory at the same time, the first and the informed user's among them
    processes: bool = True
    requests: Path | None = None
    bundle: Path | None = None  # [default: exported from the model]


@dataclass
class Opened:
    """A side that is loaded (or the reason why not), and what it said then."""

    side: Side
    worker: Local | Process | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


@functools.cache
def model_spec(folder: Path) -> Spec:
    from fastgen.models.folder import load_model

    return load_model(folder).spec


class Matrix:
    """`rows()` measures a plan's sides.

    `expected`: steps -> the first images by eager fp32, the reference of parity, and `rates` by precision, where they are known
    already: nothing of that is measured again.
    """

    def __init__(
        self,
        plan: Plan,
        sides: Sequence[Side],
        expected: Mapping[int, np.ndarray] | None = None,
        rates: Mapping[str, floor.Rates] | None = None,
    ) -> None:
        self.plan, self.sides, self.spec = plan, sides, model_spec(plan.model)
        self.sampling = self.spec.sampling
        self.steps = plan.steps or (self.sampling.num_inference_steps,)
        lengths = {*self.steps, *map(shorter, self.steps)}
        config = self.spec.scheduler_config
        self.tables = {s: TableCompiler(config).table(f"{self.sampling.scheduler}:{s}") for s in lengths}
        self.work = floor.count(plan.model)
        self._known = frozenset(rates or {})
        self.rates: dict[str, floor.Rates] = dict(rates or {})
        self.versions: dict[str, dict[str, str]] = {}  # of peers in environments of their own
        self.expected: dict[int, np.ndarray] = dict(expected or {})
        self._deadline = time.perf_counter() + plan.seconds

    def rows(self) -> Iterator[dict[str, Any]]:
        """A row for every side and case; what failed, and what the time did not allow, says so in its note."""
        first, *others = self.sides
        peer = informed(map(str, others))
        always = [first, *(side for side in others if str(side) == peer)]  # the sides that ratios are to
        others = [side for side in others if side not in always]
        size = max(1, self.plan.together - len(always))
        with self._inputs():
            self._reference_images()
            for start in range(0, max(1, len(others)), size):
                for row in self._group([*always, *others[start : start + size]]):
                    if start == 0 or row["side"] not in map(str, always):
                        yield row

    def references(self) -> dict[int, np.ndarray]:
        """Steps -> the first images by eager fp32, (PARITY_IMAGES, H, W, 3) uint8."""
        with self._inputs():
            self._reference_images()
        return self.expected

    def settings(self) -> dict[str, Any]:
        plan = self.plan
        rates = {
            k: {"tflop_per_s": r.flop_per_s / 1e12, "gb_per_s": r.bytes_per_s / 1e9} for k, r in self.rates.items()
        }
        return {
            "model": plan.model.name,
            "device": plan.device,
            "threads": plan.threads,
            "image_size": self.spec.space.image[1],
            "scheduler": self.sampling.scheduler,
            "steps": list(self.steps),
            "evaluations": [len(self.tables[s]) for s in self.steps],
            "guidance_scale": self.sampling.guidance_scale,
            "images_per_round": plan.images,
            "job": plan.job,
            "unet_params": self.work.unet_params,
            "unet_gflop": self.work.unet_flop / 1e9,
            "vae_gflop": self.work.vae_flop / 1e9,
            "rates": rates,
            "peer_versions": self.versions,
        }

    @contextmanager
    def _inputs(self) -> Iterator[None]:
        """A folder, while the block runs, with what all sides are given."""
        count = max(self.plan.images, *self.plan.batches, PARITY_IMAGES)
        self._given = conditions(self.spec.condition.kind, count, self.plan.requests)
        with tempfile.TemporaryDirectory() as scratch:
            self._scratch = Path(scratch)
            np.save(self._scratch / "latents.npy", normal(range(count), 0, self.spec.space.shape))
            yield

    def _reference_images(self) -> None:
        steps_wanted = [steps for steps in self.steps if steps not in self.expected]
        if not steps_wanted:
            return
        with _Sides(self, [Side.parse(REFERENCE)]) as (opened,):
            for steps in steps_wanted:
                taken = Taken(opened.side, Case(PARITY_IMAGES, steps, PARITY_IMAGES), opened.facts)
                self._first_batch(opened, taken, first_case=True)
                if taken.pixels is None:
                    raise FastgenError(f"{REFERENCE}, the reference of parity: {taken.note}")
                self.expected[steps] = taken.pixels

    def _group(self, sides: Sequence[Side]) -> Iterator[dict[str, Any]]:
        """Sides that are in memory together, in turns; ratios are to the first and to the informed user's."""
        self._measure_rates({side.dtype for side in sides})
        with _Sides(self, sides) as opened:
            for case, (batch, steps) in enumerate(itertools.product(sorted(self.plan.batches), self.steps)):
                here = [o for o in opened if o.side.batch is None or batch == min(self.plan.batches)]
                taken = [
                    Taken(o.side, self._case(o.side.batch or batch, steps), o.facts, o.facts.get("note")) for o in here
                ]
                self._measure(here, taken, first_case=case == 0)
                peer = informed(str(one.side) for one in taken[1:])
                other = next((one for one in taken[1:] if str(one.side) == peer), None)
                yield from (self._row(one, taken[0], other) for one in taken)

    def _case(self, batch: int, steps: int) -> Case:
        return Case(batch, steps, max(self.plan.images, batch))

    def _measure(self, opened: Sequence[Opened], taken: Sequence[Taken], first_case: bool) -> None:
        """A first batch of each, the rounds in turn, then a batch of each with fewer steps."""
        pairs = list(zip(opened, taken, strict=True))
        for side, one in pairs:
            self._first_batch(side, one, first_case)
        for done in range(self.plan.rounds):
            if done and self._is_late():
                for one in taken:
                    if not one.failed:
                        one.add_note(f"{done} of {self.plan.rounds} rounds: the time was used up")
                break
            for side, one in pairs:
                self._round(side, one)
        for side, one in pairs:
            self._short(side, one)

    def _is_late(self) -> bool:
        return time.perf_counter() > self._deadline

    def _first_batch(self, side: Opened, one: Taken, first_case: bool) -> None:
        may_begin = (first_case and not self.plan.strict) or not self._is_late()
        if side.error is not None or not may_begin:
            one.fail(side.error or LATE)
            return
        out = self._scratch / "images.npy"
        answer = self._generate(side, one.case.batch, one.case.batch, one.case.steps, out)
        if "error" in answer:
            one.fail(answer["error"])
            return
        one.pixels, one.first_s = np.load(out), answer.pop("seconds")
        one.memory = answer

    def _round(self, side: Opened, one: Taken) -> None:
        if one.failed:
            return
        answer = self._generate(side, one.case.batch, one.case.images, one.case.steps)
        if "error" in answer:
            one.fail(answer["error"])
        else:
            one.seconds.append(answer["seconds"])

    def _short(self, side: Opened, one: Taken) -> None:
        """One batch with fewer steps, after one for warming up where graphs are recorded per number of steps."""
        batch, steps = one.case.batch, shorter(one.case.steps)
        if one.failed or steps == one.case.steps or self._is_late():
            return
        if self.plan.device.startswith("cuda"):
            self._generate(side, batch, batch, steps)
        one.short_s = self._generate(side, batch, batch, steps).get("seconds")

    def _generate(self, side: Opened, batch: int, count: int, steps: int, out: Path | None = None) -> dict[str, Any]:
        assert side.worker is not None
        request = {"do": "generate", "batch": batch, "steps": steps, "count": count, "out": str(out) if out else None}
        given = {kind: values[:count] for kind, values in self._given.items()}
        return side.worker.call({**request, **given, "latents": str(self._scratch / "latents.npy")})

    def _row(self, one: Taken, reference: Taken, informed: Taken | None) -> dict[str, Any]:
        if not one.failed and one.side.is_peer and self._is_random(one.case.steps):
            one.add_note("draws its own noise: images not comparable")
        if one.failed:
            return one.row(reference, self.plan.job, informed)
        steps = one.case.steps
        step_ms = one.step_ms(len(self.tables[steps]) - len(self.tables[shorter(steps)]))
        if step_ms is None and one.short_s is not None:
            one.add_note(NO_STEP)
        row = one.row(reference, self.plan.job, informed) | {"step_ms": step_ms}
        row["floor_percent"] = 100 * self._floor_s(one.case, row["dtype"]) / (one.case.images / row["images_per_s"])
        if one.side.is_peer and self._is_random(steps):
            return row
        return row | one.parity(self.expected[steps])

    def _is_random(self, steps: int) -> bool:
        """Whether the solver draws noise in its steps."""
        return bool(np.any(self.tables[steps].c))

    def _floor_s(self, case: Case, dtype: str) -> float:
        if dtype not in self.rates:
            self._measure_rates({dtype})
        evaluations, guided = len(self.tables[case.steps]), self.sampling.guidance_scale != 1.0
        shape: dict[str, Any] = {"images": case.images, "batch": case.batch, "evaluations": evaluations}
        return floor.floor_s(self.work, self.rates[dtype], dtype, guided=guided, **shape)

    def _measure_rates(self, dtypes: set[str | None]) -> None:
        """What the machine reaches: the best that was seen in this run."""
        for dtype in dtypes:
            if dtype is not None and dtype not in self._known:
                now = floor.measure(self.plan.device, dtype, threads=self.plan.threads)
                self.rates[dtype] = floor.best(now, self.rates.get(dtype, now))

    def open(self, side: Side) -> Opened:
        """Load a side; what cannot be loaded has an `error`."""
        plan, foreign = self.plan, side.name in FOREIGN
        if reason := missing(side, plan.device):
            return Opened(side, error=reason)
        if (
            foreign
            and self.spec.condition.kind == "text"
            and (own := default_name(self.spec.scheduler_config)) != self.sampling.scheduler
        ):
            return Opened(side, error=f"samples with the folder's scheduler, {own}, not with {self.sampling.scheduler}")
        bundle = self._bundle(side) if side.needs_bundle else None
        if isinstance(bundle, str):
            return Opened(side, error=bundle)
        python = interpreter(side.name) if foreign else sys.executable
        worker = Process(str(python), plan.threads) if plan.processes or foreign else Local()
        facts = worker.call(
            {
                "do": "open",
                "name": side.name,
                "dtype": side.dtype,
                "channels_last": side.channels_last,
                "graphs": side.graphs,
                "device": plan.device,
                "threads": plan.threads,
                "model": str(plan.model.absolute()),
                "bundle": str(bundle.absolute()) if bundle else None,
                "work": str(plan.work.absolute()),
                "image_size": self.spec.space.image[1],
                "guidance_scale": self.sampling.guidance_scale,
                "scheduler": self.sampling.scheduler,
            }
        )
        if bundle is not None and "build_s" in facts:
            facts["build_s"] = export_seconds(bundle)
        if facts.get("versions"):
            self.versions[side.name] = facts["versions"]
        return Opened(side, worker, facts, facts.get("error"))

    def _bundle(self, side: Side) -> Path | str:
        try:
            dtype = "int8" if side.dtype == "int8" else None  # of the other precisions fp32 graphs are enough
            return self.plan.bundle or bundled(self.plan.model, self.plan.work, dtype)
        except Exception as error:  # a model that cannot be exported is the failure of the sides that need it
            return f"export failed: {type(error).__name__}: {first_line(error)}"


class _Sides:
    """Sides that are open while the block runs."""

    def __init__(self, matrix: Matrix, sides: Sequence[Side]) -> None:
        self._matrix, self._sides = matrix, sides

    def __enter__(self) -> list[Opened]:
        self._opened = [self._matrix.open(side) for side in self._sides]
        return self._opened

    def __exit__(self, *_: object) -> None:
        for one in self._opened:
            if one.worker is not None:
                one.worker.close()
