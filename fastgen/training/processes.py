"""The processes of one training run: those that `accelerate launch` or torchrun started, or this one alone."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

BUCKET = 64 << 20  # bytes of gradients that are summed in one message


def process_count() -> int:
    """How many processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is rank 0, which writes the files and prints."""
    return int(os.environ.get("RANK", "0")) == 0


@dataclass(frozen=True)
class Processes:
    """All processes have the same weights, and each takes a part of every global batch. Only rank 0 writes files."""

    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def part(self, positions: np.ndarray) -> np.ndarray:
        """This process's share of the positions of a batch: consecutive ones."""
        return np.array_split(positions, self.count)[self.rank]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.count > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def sum_gradients(self, module: nn.Module, weight: float = 1.0) -> None:
        """Every parameter's gradient becomes the sum over all processes, times `weight`."""
        if self.count == 1:
            return
        for gradients in _buckets(p.grad for p in module.parameters() if p.grad is not None):
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            torch.distributed.all_reduce(flat)
            parts = (flat * weight).split([gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process runs the block first, so that the others can read what it writes, such as a cache entry."""
        if not self.is_main:
            torch.distributed.barrier()
        yield
        if self.count > 1 and self.is_main:
            torch.distributed.barrier()


def join(device: torch.device) -> Processes:
    """Meet the processes that the launcher started, over NCCL on GPUs and Gloo on CPUs."""
    if process_count() == 1:
        return Processes()
    from accelerate import PartialState

    state: Any = PartialState(cpu=device.type == "cpu")
    return Processes(state.process_index, state.num_processes)


def _buckets(gradients: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The gradients in lists of up to BUCKET bytes."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and sum(g.nbytes for g in bucket) + gradient.nbytes > BUCKET:
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket
