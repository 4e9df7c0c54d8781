"""What the tests of engine trt share besides the double: its GPU, random inputs, a build of a few plans, and Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest

from fastgen.engines.cache.artifacts import Artifact
from fastgen.engines.trt import platform
from fastgen.models.bundle import Bundle

STREAM = 4711


class CpuGpu(platform.TrtDevice):
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


def press_ctrl_c_at_the_first_step(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first step of the next TensorRT build sends one SIGINT to the main thread, and waits until the build is cancelled.

    Returns a list, to which every step of the build adds its number.
    """
    from export.trt_progress import Progress

    steps: list[int] = []
    step, cancel, cancelled = Progress.step, Progress.cancel, threading.Event()

    def interrupting_step(self: Progress, phase: str, number: int) -> bool:
        steps.append(number)
        if len(steps) == 1:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            assert cancelled.wait(60)
        return step(self, phase, number)

    def noted_cancel(self: Progress) -> None:
        cancel(self)
        cancelled.set()

    monkeypatch.setattr(Progress, "step", interrupting_step)
    monkeypatch.setattr(Progress, "cancel", noted_cancel)
    return steps
