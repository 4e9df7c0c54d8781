"""A stand-in for torch's streams, events and CUDA graphs on CPU tensors, so that what a GPU would do can be judged here.

`torch.cuda.graph` itself is torch's own. As on a GPU: a recording computes nothing, holds garbage until its first replay,
refuses what needs the host, and does not end with an open fork; one that fails to end leaves its stream current and the
allocator waiting; streams come from a pool of 32 in rotation; work on two streams is in no order unless one waits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

POOL = 32  # torch's streams per device
UNJOINED = "CUDA error: capturing stream has unjoined work"
FORBIDDEN = {"_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal", "masked_select", "_pin_memory"}
GARBAGE = 2**40  # of integers that were never computed; of floats, NaN
Clock = dict[int, int]  # number of a stream -> how much of its work


class Device(str):
    """`cpu`, which says of itself that it is a GPU."""

    def startswith(self, prefix: Any, *place: Any) -> bool:
        return prefix == "cuda" or super().startswith(prefix, *place)


class Stream:
    """A stream of the pool; two with one number are the same."""

    made = 0

    def __init__(self, device: Any = None, number: int | None = None) -> None:
        if number is None:
            number = 1 + Stream.made % POOL
            Stream.made += 1
        self.number, self.device = number, 0 if device is None else device

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
            _merge(State.clock(self), State.clock(other))
        elif other in recording.streams and self not in recording.streams:
            recording.streams.add(self)  # forked
        elif self == recording.origin and other in recording.streams:
            recording.streams.discard(other)  # joined
        elif self in recording.streams and other not in recording.streams:
            recording.broken = "CUDA error: dependency created on uncaptured work in another stream"


class Event:
    def __init__(self) -> None:
        self._clock: Clock = {}

    def record(self, stream: Stream) -> None:
        self._clock = dict(State.clock(stream))

    def synchronize(self) -> None:
        _merge(State.host, self._clock)


class State:
    """What is current in this process, and what was seen."""

    default: Stream
    current: Stream
    device: int
    contexts: set[int]  # devices that were made current
    recording: CUDAGraph | None
    recorded_on: list[Stream]
    underway: set[Any]  # pools that the allocator takes for being recorded to
    released: list[Any]
    fails_at_end: BaseException | None  # what the next recording's end raises, after it has ended
    host: Clock
    clocks: dict[int, Clock]

    @classmethod
    def reset(cls) -> None:
        cls.default = cls.current = Stream(number=0)
        cls.device, cls.contexts, cls.recording, cls.recorded_on = 0, set(), None, []
        cls.underway, cls.released, cls.fails_at_end, cls.host, cls.clocks = set(), [], None, {}, {}
        Stream.made = 0

    @classmethod
    def clock(cls, stream: Stream) -> Clock:
        """All work that comes before what this stream will do next."""
        return cls.clocks.setdefault(stream.number, {})


class Order(TorchDispatchMode):
    """Fails where work reads or overwrites memory that work of another stream, which it does not wait for, has written, or
    overwrites what that still reads."""

    def __init__(self) -> None:
        super().__init__()
        self._written: dict[int, tuple[int, int]] = {}  # address of a storage -> (stream, its work)
        self._read: dict[int, Clock] = {}
        self._alive: list[Any] = []  # so that no address is used again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if State.recording is None:
            self._note(func, args, kwargs or {}, output)
        return output

    def _note(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        clock, number = State.clock(State.current), State.current.number
        _merge(clock, State.host)
        clock[number] = clock.get(number, 0) + 1
        read, changed = self._addresses((args, kwargs)), self._addresses(_changed(func, args, kwargs))
        for address in read:
            self._wait_for(clock, [self._written.get(address)], f"{func} reads")
        for address in changed | (self._addresses(output) - read):
            self._wait_for(clock, [self._written.get(address), *self._read.get(address, {}).items()], f"{func} writes")
            self._written[address], self._read[address] = (number, clock[number]), {}
        for address in read - changed:
            self._read.setdefault(address, {})[number] = clock[number]

    def host_reads(self, tensor: torch.Tensor) -> None:
        for address in self._addresses(tensor):
            self._wait_for(State.host, [self._written.get(address)], "the host reads")

    @staticmethod
    def _wait_for(clock: Clock, work: list[tuple[int, int] | None], what: str) -> None:
        for stream, time in filter(None, work):
            assert clock.get(stream, 0) >= time, f"{what} what stream {stream} may still use"

    def _addresses(self, values: Any) -> set[int]:
        storages = [v.untyped_storage() for v in tree_leaves(values) if isinstance(v, torch.Tensor)]
        self._alive += storages
        return {storage.data_ptr() for storage in storages}


class _Note(TorchDispatchMode):
    """Notes the operations of a recording, and what they change."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Any] = []
        self._made: list[torch.Tensor] = []
        self._before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = [t for t in _tensors(args[1:2]) if t.dtype == torch.bool] if name.startswith("index") else []
        if name in FORBIDDEN or masks:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        kwargs, made = kwargs or {}, {t.untyped_storage().data_ptr() for t in self._made}
        for value in _changed(func, args, kwargs):
            if value.untyped_storage().data_ptr() not in made:
                self._before.setdefault(id(value), (value, value.clone()))
        output = func(*args, **kwargs)
        given = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        self._made += [t for t in _tensors(output) if t.untyped_storage().data_ptr() not in given]
        self.operations.append((func, args, kwargs, output))
        return output

    def undo(self) -> None:
        """Nothing was computed: what was made holds garbage, what was changed is as it was."""
        for value in self._made:
            value.fill_(torch.nan if value.is_floating_point() else True if value.dtype == torch.bool else GARBAGE)
        for value, before in self._before.values():
            value.copy_(before)


class CUDAGraph:
    """Notes the operations between `capture_begin` and `capture_end`."""

    def __init__(self) -> None:
        self.origin: Stream | None = None
        self.streams: set[Stream] = set()
        self.broken: str | None = None
        self.mode = ""

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global", **options: Any) -> None:
        assert State.recording is None, "one recording at a time"
        self.pool_id, self.mode, self.origin = pool, capture_error_mode, State.current
        self.streams = {self.origin}
        State.recording = self
        State.recorded_on.append(self.origin)
        State.underway.add(pool)
        self._note = _Note()
        self._note.__enter__()

    def capture_end(self) -> None:
        self._note.__exit__(None, None, None)
        with torch.inference_mode():
            self._note.undo()
        State.recording = None
        if self.broken or self.streams != {self.origin}:
            raise RuntimeError(self.broken or UNJOINED)
        State.underway.discard(self.pool_id)
        failure, State.fails_at_end = State.fails_at_end, None
        if failure is not None:
            raise failure

    def replay(self) -> None:
        with torch.inference_mode():
            for func, args, kwargs, output in self._note.operations:
                new = func(*args, **kwargs)
                for held, value in zip(_tensors(output), _tensors(new), strict=True):
                    if held.data_ptr() != value.data_ptr():
                        held.copy_(value)


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def _changed(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The arguments that an operation writes to."""
    found = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += _tensors(args[position] if position < len(args) else kwargs.get(argument.name))
    return found


def _merge(clock: Clock, other: Clock) -> None:
    for stream, time in other.items():
        clock[stream] = max(clock.get(stream, 0), time)


def _make_current(stream: Stream) -> None:
    State.current, State.device = stream, stream.device
    State.contexts.add(stream.device)  # as torch does, whichever device was current


class _StreamContext:
    """torch.cuda.stream. A class, as torch's: a generator would put the stream back when it is freed, however it was left."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __enter__(self) -> None:
        self._before = State.current if State.current.device == State.device else Stream(State.device, number=0)
        _make_current(self._stream)

    def __exit__(self, *raised: object) -> None:
        _make_current(self._before)


@contextmanager
def _device(device: Any) -> Iterator[None]:
    index = device if isinstance(device, int) else torch.device(device).index
    before, stream = State.device, State.current
    State.device = before if index is None else index
    changed = State.device != before
    if changed:
        State.current = Stream(State.device, number=0)
    try:
        yield
    finally:
        State.device = before  # without making a context where there is none
        if changed:
            State.current = stream  # each device has its own; that of this one stays as it was left


def _empty_cache() -> None:
    assert not State.underway or State.recording, "captures_underway.empty()"


def _end(device: int, pool: Any) -> None:
    if pool not in State.underway:
        raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
    State.underway.discard(pool)


def _synchronize(device: Any = None) -> None:
    for clock in State.clocks.values():
        _merge(State.host, clock)


def install(monkeypatch: Any) -> type[State]:
    """Put the double in the place of torch.cuda's functions; returns what is current."""
    from fastgen.sampling import streams

    streams._streams.cache_clear()
    State.reset()
    pools = iter(range(1, 10**6))
    replaced: dict[str, Any] = {
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": CUDAGraph,
        "stream": _StreamContext,
        "set_stream": _make_current,
        "current_stream": lambda device=None: State.current,
        "current_device": lambda: State.device,
        "device": _device,
        "synchronize": _synchronize,
        "empty_cache": _empty_cache,
        "graph_pool_handle": lambda: (0, next(pools)),
        "mem_get_info": lambda device=None: (2**36, 2**37),
    }
    for name, value in replaced.items():
        assert hasattr(torch.cuda, name), name
        monkeypatch.setattr(torch.cuda, name, value)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", _end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: State.released.append(pool), raising=False)
    return State


@contextmanager
def ordered(monkeypatch: Any) -> Iterator[Order]:
    """Within it everything must be in order, and what the host reads must have been waited for."""
    order, numpy = Order(), torch.Tensor.numpy

    def read(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        order.host_reads(tensor)
        return numpy(tensor, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "numpy", read)
        with order:
            yield order
