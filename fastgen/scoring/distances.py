"""FID and KID of one folder's features against a reference's, by torchmetrics, and their bootstrap in NumPy.

Frechet distance: Heusel et al., GANs Trained by a Two Time-Scale Update Rule, 2017, equation 6. Kernel distance: Binkowski et
al., Demystifying MMD GANs, 2018, section 3: the unbiased squared MMD with k(x, y) = (x.y / D + 1)^3.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastgen.scoring.reference_set import Statistics
from fastgen.scoring.samples import RESAMPLES, resample_counts, spread

SUBSETS, SUBSET_SIZE = 100, 1000  # of KID, the sizes of its paper
KERNEL_ROWS = 5000  # of the reference, at most, in KID's resamples
BUDGET = 2e11  # floating-point operations for the resamples of FID: some ten seconds on one core
CHUNK = 1024


@dataclass(frozen=True, eq=False)
class Frechet:
    """Frechet distance between Gaussians fitted to features (N, D) and to the reference's."""

    features: np.ndarray
    reference: Statistics

    @cached_property
    def value(self) -> float:
        return frechet_distance(self.features, self.reference)

    @cached_property
    def standard_error(self) -> float:
        return spread(self.replicates)

    @property
    def method(self) -> str:
        return f"bootstrap, {self._resamples} resamples"

    @property
    def _resamples(self) -> int:
        """As many as BUDGET allows, 20 to 200."""
        n, d = self.features.shape
        rows = 0.64 * n  # distinct images of a resample
        side = min(rows, d)
        return int(np.clip(BUDGET / (2 * rows * d * side + 10 * side**3), 20, 200))

    @cached_property
    def replicates(self) -> np.ndarray:
        """tr((C_x C_y)^(1/2)) is the sum of the singular values of Z = X C_y^(1/2), X the centred features / sqrt(n - 1):
        a symmetric eigenproblem of side min(n, D)."""
        n = len(self.features)
        x = self.features.astype(np.float64)  # (N, D)
        y = x @ self.reference.root  # (N, D)
        squares = np.einsum("nd,nd->n", x, x)
        out = []
        for counts in resample_counts(n)[: self._resamples]:
            present = counts > 0
            weights = counts[present] / n  # (M,)
            mean = weights @ x[present]  # (D,)
            trace = (weights @ squares[present] - mean @ mean) * n / (n - 1)
            z = (y[present] - weights @ y[present]) * np.sqrt(weights * n / (n - 1))[:, None]  # (M, D)
            gram = z @ z.T if len(z) < z.shape[1] else z.T @ z
            overlap = np.sqrt(np.clip(np.linalg.eigvalsh(gram), 0, None)).sum()
            shift = mean - self.reference.mean
            out.append(shift @ shift + trace + np.trace(self.reference.covariance) - 2 * overlap)
        return np.array(out)


@dataclass(frozen=True, eq=False)
class Kernel:
    """Kernel distance between features (N, D) and the reference's."""

    features: np.ndarray
    reference: Statistics

    method = f"bootstrap, {RESAMPLES} resamples"

    @cached_property
    def value(self) -> float:
        return kernel_distance(self.features, self.reference.features)

    @cached_property
    def standard_error(self) -> float:
        return spread(self.replicates)

    @cached_property
    def replicates(self) -> np.ndarray:
        """The unbiased estimate over all pairs of different images (two copies of one image are no pair), against at most
        KERNEL_ROWS of the reference. It lacks the term of the reference alone, which is the same in every resample."""
        x = self.features.astype(np.float64)
        y = _some_rows(self.reference.features).astype(np.float64)
        counts = resample_counts(len(x)).astype(np.float64)  # (R, N)
        within, across = np.zeros(len(counts)), np.zeros(len(counts))
        for start in range(0, len(x), CHUNK):
            rows = slice(start, start + CHUNK)
            kernel = _polynomial(x[rows], x)  # (n, N)
            diagonal = np.diagonal(kernel, start)  # (n,) k(x, x)
            within += ((kernel @ counts.T).T * counts[:, rows]).sum(axis=1) - counts[:, rows] ** 2 @ diagonal
            across += counts[:, rows] @ _polynomial(x[rows], y).mean(axis=1)
        n = len(x)
        pairs = n**2 - (counts**2).sum(axis=1)
        possible = pairs > 0  # else all n are copies of one image
        return np.where(possible, within / np.where(possible, pairs, 1), 0) - 2 * across / n


def frechet_distance(features: np.ndarray, reference: Statistics) -> float:
    """torchmetrics' FrechetInceptionDistance in float64, of features (N, D) against the reference's sums."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Identity(features.shape[1])).set_dtype(torch.float64)
    metric.real_features_sum = torch.from_numpy(np.array(reference.total))
    metric.real_features_cov_sum = torch.from_numpy(np.array(reference.products))
    metric.real_features_num_samples = torch.tensor(len(reference.features))
    metric.update(_double(features), real=False)
    return float(metric.compute())


def kernel_distance(features: np.ndarray, reference: np.ndarray) -> float:
    """torchmetrics' KernelInceptionDistance in float64: the mean over 100 subsets of 1,000 images (of all, where there are
    fewer), the same subsets in every call. Both (N, D)."""
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(SUBSET_SIZE, len(features), len(reference))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message=".*will save all extracted features.*")
        torch.manual_seed(0)
        network = _Identity(features.shape[1])
        metric = KernelInceptionDistance(network, subsets=SUBSETS, subset_size=size).set_dtype(torch.float64)
        metric.update(_double(reference), real=True)
        metric.update(_double(features), real=False)
        return float(metric.compute()[0])


class _Identity(nn.Identity):
    """In place of torchmetrics' feature network: its input is features already, from the one pass over the images."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def _double(features: np.ndarray) -> Tensor:
    return torch.from_numpy(features.astype(np.float64))


def _polynomial(x: np.ndarray, y: np.ndarray) -> Any:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _some_rows(features: np.ndarray) -> np.ndarray:
    if len(features) <= KERNEL_ROWS:
        return np.asarray(features)
    return features[np.sort(np.random.default_rng(0).permutation(len(features))[:KERNEL_ROWS])]
