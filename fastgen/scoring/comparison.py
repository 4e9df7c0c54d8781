"""Two runs side by side: the difference of every metric with a confidence interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastgen.errors import InputError
from fastgen.scoring.result import Better, Score, columns, number
from fastgen.scoring.samples import spread

Z = 1.959964  # two-sided 95% of a normal distribution


@dataclass(frozen=True)
class Difference:
    """One metric of both runs."""

    a: float
    b: float
    low: float  # 95% confidence interval of a - b
    high: float
    resamples: int
    label: str
    better: Better

    @property
    def value(self) -> float:
        return self.a - self.b

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    @property
    def verdict(self) -> str:
        """Which run is better, "A" or "B"; "undecided" where the interval holds 0."""
        if not self.excludes_zero:
            return "undecided"
        return "A" if (self.value > 0) == (self.better == "higher") else "B"

    def to_json(self) -> dict[str, Any]:
        derived = {"difference": self.value, "excludes_zero": self.excludes_zero, "verdict": self.verdict}
        return {**vars(self), **derived}


@dataclass(frozen=True)
class Comparison:
    """Run A against run B. `paired`: the images of both have the same names and are resampled together."""

    metrics: Mapping[str, Difference]
    paired: bool
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "metrics": {key: difference.to_json() for key, difference in self.metrics.items()},
            "confidence": 0.95,
            "method": f"{self._kind} bootstrap over images, seeds averaged, normal interval",
            "warnings": list(self.warnings),
        }

    def table(self) -> str:
        """Several lines of text."""
        rows = [
            (d.label, number(d.a), number(d.b), number(d.value), f"{number(d.low)} to {number(d.high)}", d.verdict)
            for d in self.metrics.values()
        ]
        resamples = ", ".join(f"{key} {d.resamples}" for key, d in self.metrics.items())
        note = f"95% intervals of A - B: {self._kind} bootstrap over images, seeds averaged; resamples: {resamples}"
        return "\n".join([*columns([("metric", "A", "B", "A - B", "95% interval", "better"), *rows]), "", note])

    @property
    def _kind(self) -> str:
        return "paired" if self.paired else "unpaired"


def compare(a: Score, b: Score) -> Comparison:
    """Compare two results of one `Scorer`.

    The images are resampled with replacement, the same ones in both runs and in all seeds where the runs' images have the
    same names; each resample gives a difference of the seeds' means. The interval is the difference -+ 1.96 standard
    deviations of these: the normal bootstrap interval, which the bias of a resample's FID does not move, as it is alike in
    both runs. InputError for results that were not measured against the same networks and reference.
    """
    shared = [key for key in a.metrics if key in b.metrics]
    if not shared:
        raise InputError("the two runs have no metric in common")
    for key in shared:
        if a.metrics[key].label != b.metrics[key].label or a.reference != b.reference:
            raise InputError(f"{key}: measured with different networks or references; score both with one Scorer")
    paired = a.names == b.names
    differences = {key: _difference(key, a, b, paired) for key in shared}
    return Comparison(differences, paired, _warnings(a, b))


def _difference(key: str, a: Score, b: Score, paired: bool) -> Difference:
    first, second = (np.mean([sample.replicates for sample in run.samples[key]], axis=0) for run in (a, b))
    if not paired:
        second = np.random.default_rng(1).permutation(second)
    count = min(len(first), len(second))
    x, y = a.metrics[key], b.metrics[key]
    half = Z * spread(first[:count] - second[:count])
    difference = x.value - y.value
    return Difference(x.value, y.value, difference - half, difference + half, count, x.label, x.better)


def _warnings(a: Score, b: Score) -> tuple[str, ...]:
    if a.saving != b.saving:
        return (f"the runs were saved differently ({a.saving} and {b.saving}), which changes scores by itself",)
    return ()
