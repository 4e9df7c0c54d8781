"""CUDA graphs: a function over fixed tensors is recorded once, then replayed by one call of the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

WARM_UP = 3  # calls before the recording: libraries choose their algorithms and allocate their workspaces there


class Graph:
    """A recorded function without arguments that reads and writes tensors which exist already, or which it made while it
    was recorded. The host must not be read from inside it.

    The calls before the recording change those tensors too: set them before the first replay; `reset` is called before each of
    these calls. `pool`: the memory pool of a
    graph that never runs at the same time, to share; tensors made while recording live in it for as long as the graph.
    """

    def __init__(
        self, function: Callable[[], None], device: str, pool: Any = None, reset: Callable[[], Any] = lambda: None
    ) -> None:
        import torch

        self._function = function  # keeps alive what the recording points to
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.device(device), torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                reset()
                function()
        torch.cuda.current_stream(device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(self._graph, pool=pool, stream=stream):
            function()

    @property
    def pool(self) -> Any:
        """The handle of its memory pool."""
        return self._graph.pool()

    def __call__(self) -> None:
        """Replay it on the current stream; returns before it has run."""
        self._graph.replay()
