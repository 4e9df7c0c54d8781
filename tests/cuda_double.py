"""A stand-in for torch's streams and CUDA graphs on CPU tensors, so that what is recorded can be replayed and judged here.

`torch.cuda.graph` itself is torch's own. A recording runs its operations once and notes them; a replay runs the same operations
on the same tensors. As on a GPU, streams come from a pool of 32 in rotation, a recording refuses to end with an open fork, and
then leaves its stream current.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

POOL = 32  # torch's streams per device
UNJOINED = "CUDA error: capturing stream has unjoined work"


class Stream:
    """A stream of the pool; two with one number are the same."""

    made = 0

    def __init__(self, device: Any = None) -> None:
        self.number = 1 + Stream.made % POOL
        Stream.made += 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and self.number == other.number

    def __hash__(self) -> int:
        return self.number

    @property
    def cuda_stream(self) -> int:
        return self.number

    def wait_stream(self, other: Stream) -> None:
        recording = State.recording
        if recording is None:
            return
        if other in recording.streams and self not in recording.streams:
            recording.streams.add(self)  # forked
        elif self == recording.origin and other in recording.streams:
            recording.streams.discard(other)  # joined
        elif self in recording.streams and other not in recording.streams:
            recording.broken = "CUDA error: dependency created on uncaptured work in another stream"


class State:
    """What is current in this process."""

    default: Stream
    current: Stream
    recording: CUDAGraph | None = None
    recorded_on: list[Stream] = []  # noqa: RUF012


class _Note(TorchDispatchMode):
    def __init__(self, operations: list[Any]) -> None:
        super().__init__()
        self._operations = operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self._operations.append((func, args, kwargs or {}, output))
        return output


class CUDAGraph:
    """Notes the operations between `capture_begin` and `capture_end`."""

    pools = 0

    def __init__(self) -> None:
        self._operations: list[Any] = []
        self.origin: Stream | None = None
        self.streams: set[Stream] = set()
        self.broken: str | None = None
        self.mode = ""
        self._pool: Any = None

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global", **options: Any) -> None:
        assert State.recording is None, "one recording at a time"
        if pool is None:
            CUDAGraph.pools += 1
        self._pool = pool or (0, CUDAGraph.pools)
        self.mode, self.origin = capture_error_mode, State.current
        self.streams = {self.origin}
        State.recording = self
        State.recorded_on.append(self.origin)
        self._note = _Note(self._operations)
        self._note.__enter__()

    def capture_end(self) -> None:
        self._note.__exit__(None, None, None)
        del self._note
        State.recording = None
        if self.broken or self.streams != {self.origin}:
            raise RuntimeError(self.broken or UNJOINED)

    def pool(self) -> Any:
        return self._pool

    def replay(self) -> None:
        with torch.inference_mode():
            for func, args, kwargs, output in self._operations:
                new = func(*args, **kwargs)
                for held, value in zip(_tensors(output), _tensors(new), strict=True):
                    if held.data_ptr() != value.data_ptr():
                        held.copy_(value)


def _tensors(output: Any) -> list[torch.Tensor]:
    outputs = output if isinstance(output, (tuple, list)) else (output,)
    return [value for value in outputs if isinstance(value, torch.Tensor)]


@contextmanager
def _stream(stream: Stream) -> Any:
    before, State.current = State.current, stream
    try:
        yield
    finally:
        State.current = before


def _set_stream(stream: Stream) -> None:
    State.current = stream


def install(monkeypatch: Any) -> type[State]:
    """Put the double in the place of torch.cuda's functions; returns what is current."""
    from fastgen import streams

    streams._streams.cache_clear()
    Stream.made, State.recording, State.recorded_on = 0, None, []
    State.default = State.current = Stream.__new__(Stream)
    State.default.number = 0
    replaced: dict[str, Any] = {
        "Stream": Stream,
        "CUDAGraph": CUDAGraph,
        "stream": _stream,
        "set_stream": _set_stream,
        "current_stream": lambda device=None: State.current,
        "current_device": lambda: 0,
        "device": lambda device: nullcontext(),
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
    }
    for name, value in replaced.items():
        assert hasattr(torch.cuda, name), name
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    return State
