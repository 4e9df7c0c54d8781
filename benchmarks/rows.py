"""What is taken of one side at one batch size and number of steps, and the row of figures that it makes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.report import parity, spread
from benchmarks.sides import Side

UNITS = {
    "side": "NAME:DTYPE, see benchmarks/sides.py; @N where it has a batch size of its own",
    "dtype": "the precision that was executed",
    "batch": "images per batch",
    "steps": "of the solver",
    "images_per_s": "end to end, from prompts to pixels in host memory; medians",
    "spread": "of images_per_s, over the rounds",
    "ratio": "images_per_s over the first side's, median over the rounds in which both took turns",
    "ratio_informed": "the same over the informed user's side (INFORMED in benchmarks/sides.py), where there is one",
    "step_ms": "one network evaluation, guided where the model is; from runs of two lengths; None without a shorter one",
    "load_s": "imports, weights, and what the side compiles when it is opened",
    "first_s": "load and the first batch",
    "build_s": "export, and what the first batch took longer than later ones; None for a bundle exported before",
    "repaid_after": "images until build_s is won back against the first side; None: never, or not known",
    "job_s": "end-to-end seconds of the job, load included",
    "extrapolated_from": "images measured, where the job is longer",
    "peak_mib": "resident memory of the side's process, or what torch allocated on the GPU",
    "driver_mib": "GPU memory that the driver handed out",
    "psnr_db": "against eager fp32 from the same noise; None where nothing differs",
    "max_abs_255": "largest difference to eager fp32, in grey levels",
    "floor_percent": "of the least time that the measured matrix product and copy rates allow",
    "rounds": "timed",
    "note": "why the row is empty, or what to know of it",
}
NO_STEP = "no time of a step: the run with fewer steps took no less"


@dataclass(frozen=True)
class Case:
    """`images` of every round come in batches of `batch`."""

    batch: int
    steps: int
    images: int


@dataclass
class Taken:
    """Timings and images; `opened` is what the side said when it was loaded."""

    side: Side
    case: Case
    opened: Mapping[str, Any]
    note: str | None = None
    failed: bool = False
    pixels: np.ndarray | None = None
    first_s: float = math.nan
    memory: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    short_s: float | None = None  # one batch with `shorter` steps

    def add_note(self, note: str) -> None:
        self.note = "; ".join(filter(None, [self.note, note]))

    def fail(self, note: str) -> None:
        self.note, self.failed = note, True

    def row(self, reference: Taken, job: int, informed: Taken | None = None) -> dict[str, Any]:
        """Speed and memory, against `reference` and `informed`, which took turns with this side; parity, step and floor columns
        are None yet."""
        row: dict[str, Any] = dict.fromkeys(UNITS)
        row |= {"side": str(self.side), "dtype": self.opened.get("dtype", self.side.dtype), "note": self.note}
        row |= {"batch": self.case.batch, "steps": self.case.steps}
        if self.failed:
            return row
        speed = statistics.median(self.rates)
        row |= {"images_per_s": speed, "spread": spread(self.rates), "rounds": len(self.rates), **self.memory}
        row |= {"load_s": self.opened["load_s"], "first_s": self.opened["load_s"] + self.first_s}
        row |= {"build_s": self.build_s, "job_s": self.opened["load_s"] + job / speed}
        if job > self.case.images:
            row["extrapolated_from"] = self.case.images
        if not reference.failed:
            row["ratio"] = self._ratio(reference)
            saved = 1 / statistics.median(reference.rates) - 1 / speed  # seconds per image
            if (build_s := self.build_s) is not None and saved > 0:
                row["repaid_after"] = math.ceil(build_s / saved)
        if informed is not None and not informed.failed:
            row["ratio_informed"] = self._ratio(informed)
        return row

    def step_ms(self, evaluations: int) -> float | None:
        """Milliseconds of each of the `evaluations` that a timed batch has more than the short one; None without a short one,
        or where that took no less, as on a busy machine."""
        if self.short_s is None or self.short_s >= self.batch_s:
            return None
        return 1000 * (self.batch_s - self.short_s) / evaluations

    @property
    def rates(self) -> list[float]:
        """Images per second of each round."""
        return [self.case.images / s for s in self.seconds]

    def _ratio(self, other: Taken) -> float:
        return statistics.median(own / theirs for own, theirs in zip(self.rates, other.rates, strict=True))

    @property
    def batch_s(self) -> float:
        """Seconds of one batch in the timed rounds."""
        return statistics.median(self.seconds) / math.ceil(self.case.images / self.case.batch)

    @property
    def build_s(self) -> float | None:
        """Seconds of the export, and what the first batch took longer than later ones. None where the bundle was exported
        before, in a time that is not known."""
        if (exported_s := self.opened["build_s"]) is None:
            return None
        return float(exported_s + max(0.0, self.first_s - self.batch_s))

    def parity(self, expected: np.ndarray) -> dict[str, Any]:
        """PSNR and largest difference of as many images as both sides have."""
        assert self.pixels is not None
        count = min(len(expected), len(self.pixels))
        return parity(expected[:count], self.pixels[:count])


def shorter(steps: int) -> int:
    """The number of steps of the second, shorter run."""
    return max(1, steps // 5)
