"""Random numbers of training: functions of (seed, step, index in the global batch) alone.

So a run draws the same numbers after an interruption, on several processes, and with micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastgen.sampling.noise import normal

VALIDATION = -1  # the step number of all validations, so that they use the same noise


def batch_rows(count: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """The examples of one global batch (batch_size,): consecutive entries of one permutation per epoch."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, offsets = np.divmod(positions, count)
    rows = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs):
        order = np.random.default_rng([seed, int(epoch)]).permutation(count)
        rows[epochs == epoch] = order[offsets[epochs == epoch]]
    return rows


@dataclass(frozen=True)
class Draws:
    """Random numbers for some examples of one global batch. `stream`: a small integer, a different one for each use."""

    seed: int
    step: int
    positions: np.ndarray  # (b,) indices in the global batch
    batch_size: int  # of the global batch
    device: torch.device

    @property
    def keys(self) -> np.ndarray:
        """One key per example, (b,) int64 in [0, 2^63)."""
        first = _mix(np.uint64(self.seed) + _mix(np.array([self.step]).astype(np.uint64)))
        return (_mix(first + self.positions.astype(np.uint64)) >> np.uint64(1)).astype(np.int64)

    def normal(self, stream: int, shape: tuple[int, ...]) -> Tensor:
        """Standard normal noise (b, *shape) float32."""
        return normal(torch.from_numpy(self.keys).to(self.device), stream, shape)

    def uniform(self, stream: int) -> np.ndarray:
        """(b,) float64 in [0, 1)."""
        words = _mix(self.keys.astype(np.uint64) + _mix(np.array([stream + 1]).astype(np.uint64)))
        return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def integers(self, stream: int, high: int | np.ndarray) -> np.ndarray:
        """(b,) int64 in [0, high)."""
        return (self.uniform(stream) * high).astype(np.int64)

    def timesteps(self, stream: int, count: int, shift: float = 1) -> Tensor:
        """(b,) int64 in [0, count), stratified: the global batch covers the range evenly, which makes its loss, and so
        the gradient, less noisy than independent timesteps do (Kingma et al., Variational Diffusion Models, 2021).

        With a `shift` s the share u of the range becomes s u / (1 + (s - 1) u) (Esser et al., Scaling Rectified Flow
        Transformers, 2024, eq. 23).
        """
        share = (self.positions + self.uniform(stream)) / self.batch_size
        share = shift * share / (1 + (shift - 1) * share)
        return torch.from_numpy((share * count).astype(np.int64).clip(0, count - 1)).to(self.device)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function (Steele et al., 2014): a bijection of 64-bit words that scatters neighbours."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
