"""CUDA graphs: a function over fixed tensors is recorded once, then replayed by one call of the host."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fastgen.sampling import streams

WARM_UP = 3  # calls before the recording, in which libraries choose their algorithms and allocate their workspaces
_lock = threading.Lock()  # of the recording's stream: what another thread queues there would be recorded too


class Graph:
    """A recorded function without arguments that reads and writes tensors which exist already, or which it made while it
    was recorded. The host must not be read from inside it.

    The caller keeps the tensors that existed before alive; those made while recording live in the graph's memory pool, as long
    as the graph does. The function itself is not kept, so that its owner and the graph do not keep each other alive.
    The calls before the recording change the tensors too: set them before the first replay. `reset` is called before each of
    these calls, and before the recording. `pool`: the `pool` of a graph that still exists and never runs at the same time, to
    share. Graphs of one device share the workspace of cuBLAS: replay them on one stream at a time.
    Raises what `function` raises, on the caller's stream.
    """

    def __init__(
        self, function: Callable[[], None], device: str, pool: Any = None, reset: Callable[[], Any] = lambda: None
    ) -> None:
        import torch

        stream = streams.stream(device, streams.CAPTURE)
        with _lock, torch.cuda.device(device):
            self.pool = pool or torch.cuda.graph_pool_handle()
            _warm_up(function, stream, reset)
            reset()  # drops the tensors of the last call, so that the recording can use their memory
            self._graph = torch.cuda.CUDAGraph()
            _record(self._graph, function, stream, self.pool)

    def __call__(self) -> None:
        """Replay it on the current stream; returns before it has run."""
        self._graph.replay()


def _warm_up(function: Callable[[], None], stream: Any, reset: Callable[[], Any]) -> None:
    """Call the function on the recording's stream, which waits for the current one before, and the current one for it after."""
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
        capture = torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")
        with _no_collector(), capture:
            try:
                function()
            except BaseException as error:
                failure = error
    except BaseException as error:
        torch.cuda.set_stream(current)
        _give_back(pool)
        failure = failure or error
    if failure is not None:
        try:
            raise failure
        finally:
            del failure  # its traceback holds this frame


@contextmanager
def _no_collector() -> Iterator[None]:
    """Keep Python's cycle collector from freeing CUDA memory during a recording, which that would break."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _give_back(pool: Any) -> None:
    """Close the pool that a failed recording left open: until then the allocator keeps all memory that is freed for the
    recording. torch has no public function for it."""
    import torch

    device, names = torch.cuda.current_device(), ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool")
    end = next(getattr(torch._C, name) for name in names if hasattr(torch._C, name))  # the latter: torch before 2.7
    with contextlib.suppress(RuntimeError):  # it was not open: then the graph gives its pool back itself
        end(device, pool)
        torch._C._cuda_releasePool(device, pool)
