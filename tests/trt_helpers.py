"""What the tests of engine trt share besides the double: its GPU, random inputs, and a build of a few plans."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np

from fastgen.engines.cache.artifacts import Artifact
from fastgen.engines.trt import platform
from fastgen.models.bundle import Bundle

STREAM = 4711


class CpuGpu(platform.Gpu):
    """The double's GPU: torch's tensors on the CPU stand for those on the card."""

    def active(self) -> Any:
        return nullcontext()

    @contextmanager
    def stream(self) -> Iterator[int]:
        yield STREAM


def inputs(bundle: Bundle, network: str, rows: int) -> list[Any]:
    """Random inputs of a network, torch tensors on the CPU."""
    import torch

    arrays = bundle.spec.signatures[network].sample_inputs(rows, np.random.default_rng(rows))
    return [torch.from_numpy(array) for array in arrays.values()]


def build(bundle: Bundle, **options: Any) -> list[Artifact]:
    """Build plans for batches of two in fp32, or as `options` say."""
    from export.trt import build_engines

    return build_engines(bundle, **{"dtype": "fp32", "batch_sizes": [2]} | options)
