"""CUDA graphs: a function over fixed tensors is recorded once, then replayed by one call of the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastgen import streams

WARM_UP = 3  # calls before the recording: libraries choose their algorithms and allocate their workspaces there


class Graph:
    """A recorded function without arguments that reads and writes tensors which exist already, or which it made while it
    was recorded. The host must not be read from inside it.

    The caller keeps the tensors that existed before alive; those made while recording live in the graph's memory pool, as long
    as the graph does. The function itself is not kept, so that its owner and the graph do not keep each other alive.
    The calls before the recording change the tensors too: set them before the first replay. `reset` is called before each of
    these calls. `pool`: the memory pool of a graph that never runs at the same time, to share.
    Raises what `function` raises, on the caller's stream.
    """

    def __init__(
        self, function: Callable[[], None], device: str, pool: Any = None, reset: Callable[[], Any] = lambda: None
    ) -> None:
        import torch

        stream = streams.stream(device, streams.CAPTURE)
        with torch.cuda.device(device):
            _warm_up(function, stream, reset)
            self._graph = torch.cuda.CUDAGraph()
            _record(self._graph, function, stream, pool)

    @property
    def pool(self) -> Any:
        """The handle of its memory pool."""
        return self._graph.pool()

    def __call__(self) -> None:
        """Replay it on the current stream; returns before it has run."""
        self._graph.replay()


def _warm_up(function: Callable[[], None], stream: Any, reset: Callable[[], Any]) -> None:
    """Call the function on the stream that it is recorded on, between what the current stream holds and will hold."""
    import torch

    current = torch.cuda.current_stream()
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                reset()
                function()
    finally:
        current.wait_stream(stream)  # also where memory ran out: what was queued still uses the tensors


def _record(graph: Any, function: Callable[[], None], stream: Any, pool: Any) -> None:
    """Record one call of the function.

    An error inside it is raised after the recording has ended. Raised from within, torch would end the recording with an
    error of its own where work is forked off, and stay on the recording's stream: an OutOfMemoryError would be lost.
    Other threads may go on using CUDA meanwhile (`thread_local`).
    """
    import torch

    current, failure = torch.cuda.current_stream(), None
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            try:
                function()
            except BaseException as error:
                failure = error
    except BaseException as error:
        torch.cuda.set_stream(current)
        failure = failure or error
    if failure is not None:
        try:
            raise failure
        finally:
            del failure  # its traceback holds this frame
