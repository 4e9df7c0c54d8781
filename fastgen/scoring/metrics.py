"""Label accuracy from a classifier's scores: the official protocol of the i-CLEVR task, breakdowns, standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastgen.errors import InputError


@dataclass(frozen=True)
class Share:
    """`hits` of `total` labels found. An accuracy is their quotient."""

    hits: int
    total: int

    @property
    def accuracy(self) -> float:
        return self.hits / self.total if self.total else math.nan


def label_hits(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Which true labels are among the k highest scores of their row, k = number of true labels of that row.

    scores (N, K) float, higher is more certain; targets (N, K), 0 or 1. Returns (N, K) bool, never true off a target.
    Among equal scores the lower index ranks first. Raises InputError for other shapes, scores that are not finite, and
    targets other than 0 and 1.
    """
    scores, targets = _checked(scores, targets)
    order = np.argsort(-scores, axis=1, kind="stable")  # (N, K): label indices, best first
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(scores.shape[1])[None], axis=1)  # (N, K): place of each label, from 0
    return targets & (rank < targets.sum(axis=1, keepdims=True))


def label_accuracy(scores: np.ndarray, targets: np.ndarray) -> float:
    """(hits among each row's top k scores) / (sum of k) over the whole set, k = number of true labels of the row.

    This is the official score of the i-CLEVR task: an image with three objects weighs three times one with a single
    object. Arguments and errors as `label_hits`; InputError also when no row has a label.
    """
    hits = label_hits(scores, targets)
    total = int(np.count_nonzero(targets))
    if not total:
        raise InputError(f"label accuracy of {len(hits)} rows without a single true label is undefined")
    return int(hits.sum()) / total


def accuracy_by_count(scores: np.ndarray, targets: np.ndarray) -> dict[int, Share]:
    """Label accuracy of the images with 1, 2, 3 ... objects: {number of objects: Share}, ascending."""
    hits = label_hits(scores, targets).sum(axis=1)  # (N,)
    counts = np.count_nonzero(targets, axis=1)  # (N,)
    return {int(k): Share(int(hits[counts == k].sum()), int(counts[counts == k].sum())) for k in np.unique(counts) if k}


def accuracy_by_object(scores: np.ndarray, targets: np.ndarray) -> list[Share]:
    """For each of the K objects, in label order: how often it was among the top k of the rows that have it as a label."""
    hits = label_hits(scores, targets)
    return [Share(int(h), int(t)) for h, t in zip(hits.sum(axis=0), np.count_nonzero(targets, axis=0), strict=True)]


def attribute_hits(scores: np.ndarray, targets: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Whether the highest score of each attribute is that of its true value.

    scores and targets (N, K) as for `label_hits`, the first sizes[0] columns being the values of the first attribute, and
    so on; each row has one true value of each. Returns (N, len(sizes)) bool. InputError for other targets.
    """
    scores, targets = _checked(scores, targets)
    edges = np.cumsum(sizes)[:-1]
    hits = []
    for values, true in zip(np.split(scores, edges, axis=1), np.split(targets, edges, axis=1), strict=True):
        if (true.sum(axis=1) != 1).any():
            raise InputError("targets: expected one true value of each attribute")
        hits.append(values.argmax(axis=1) == true.argmax(axis=1))
    return np.stack(hits, axis=1)


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean of independent runs (one value per seed); NaN for fewer than two."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def ratio_standard_error(parts: np.ndarray, wholes: np.ndarray) -> float:
    """Standard error of r = sum(parts) / sum(wholes), both (N,), for N independent rows; NaN for one row.

    Label accuracy is such a ratio, of an image's hits and labels. The variance is that of a proportion in cluster sampling,
    N / (N - 1) * sum((parts - r wholes)^2) / sum(wholes)^2 (Cochran, Sampling Techniques, 1977, section 3.12); a binomial
    error over labels would wrongly take the labels of one image for independent.
    """
    n = len(parts)
    if n < 2:
        return math.nan
    ratio = parts.sum() / wholes.sum()
    return math.sqrt(n / (n - 1) * float(np.sum((parts - ratio * wholes) ** 2))) / float(wholes.sum())


def _checked(scores: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores, targets = np.asarray(scores, np.float64), np.asarray(targets)
    if scores.ndim != 2 or scores.shape != targets.shape:
        raise InputError(f"scores {scores.shape} and targets {targets.shape}: expected two arrays of one shape (N, K)")
    if not np.isfinite(scores).all():
        raise InputError(f"scores: {int((~np.isfinite(scores)).any(axis=1).sum())} rows hold NaN or infinity")
    if not np.isin(targets, (0, 1)).all():
        raise InputError("targets: expected a multi-hot of 0 and 1, found other values")
    return scores, targets.astype(bool)
