"""Keeping the host a step or two ahead of a GPU, and no further."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgen.engines.base import Engine

AHEAD = 2  # steps that may be queued


class Fence:
    """Waits, after a step is queued, for the step before the last one. On a CPU there is nothing to wait for."""

    def __init__(self, engine: Engine) -> None:
        self._device = engine.device if engine.device.startswith("cuda") else None
        self._events: deque[Any] = deque()

    def wait(self) -> None:
        """Call this after each step."""
        if self._device is None:
            return
        import torch

        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        self._events.append(event)
        while len(self._events) > AHEAD:
            self._events.popleft().synchronize()
