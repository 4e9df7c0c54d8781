"""One metric of one folder of images: its value, its standard error, and its values for resampled images.

Every metric is resampled in the same way (the bootstrap, Efron & Tibshirani, An Introduction to the Bootstrap, 1993):
`resample_counts` draws how often each image occurs, always the same for one number of images, so that two runs over the same
requests are resampled together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np

from fastgen.scoring.metrics import ratio_standard_error, standard_error

RESAMPLES = 1000


class Sample(Protocol):
    """One metric of one folder with N images."""

    @property
    def value(self) -> float: ...

    @property
    def standard_error(self) -> float:
        """Over the images; NaN where it is undefined."""

    @property
    def method(self) -> str:
        """How `standard_error` was found, in words."""

    @property
    def replicates(self) -> np.ndarray:
        """(R,) float64: the metric of resampled images, resample r being row r of `resample_counts(N)`."""


@lru_cache(maxsize=2)
def resample_counts(n: int) -> np.ndarray:
    """(RESAMPLES, n) int64: how often each of n images occurs in each resample of n images; every call the same."""
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    counts.setflags(write=False)
    return counts


@dataclass(frozen=True, eq=False)
class Ratio:
    """sum(parts) / sum(wholes): label accuracy with hits and labels per image, both (N,)."""

    parts: np.ndarray
    wholes: np.ndarray

    method = "ratio estimator"

    @property
    def value(self) -> float:
        return float(self.parts.sum() / self.wholes.sum())

    @property
    def standard_error(self) -> float:
        return ratio_standard_error(self.parts, self.wholes)

    @cached_property
    def replicates(self) -> np.ndarray:
        counts = resample_counts(len(self.parts))
        return (counts @ self.parts) / (counts @ self.wholes)


@dataclass(frozen=True, eq=False)
class Mean:
    """Mean of one value per image, (N,): a cosine."""

    values: np.ndarray

    method = "sample standard deviation"

    @property
    def value(self) -> float:
        return float(self.values.mean())

    @property
    def standard_error(self) -> float:
        return standard_error(self.values.tolist())

    @cached_property
    def replicates(self) -> np.ndarray:
        return resample_counts(len(self.values)) @ self.values / len(self.values)


def mean_and_error(samples: Sequence[Sample]) -> tuple[float, float, str, str]:
    """(mean of the folders' values, its standard error, what that is over, how it was found).

    Over "seeds" where there are several folders, else over the "images" of the one.
    """
    values = [sample.value for sample in samples]
    if len(values) > 1:
        return float(np.mean(values)), standard_error(values), "seeds", "sample standard deviation"
    return values[0], samples[0].standard_error, "images", samples[0].method


def spread(replicates: np.ndarray) -> float:
    """Standard deviation of bootstrap replicates; NaN for fewer than two."""
    return float(np.std(replicates, ddof=1)) if len(replicates) > 1 else math.nan
