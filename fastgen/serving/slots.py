"""Images at different steps of different solvers, advanced together: each tick runs one row of the images that it is given.

An image's state is a row of fixed arrays. It may join, rest for any number of ticks, and leave between two ticks; that costs
the others nothing and changes nothing about them. No threads, sockets or clocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from fastgen.sampling.arrays import array_namespace
from fastgen.sampling.graphs import Graph
from fastgen.sampling.loop import TableRow, guide, step, take_rows
from fastgen.sampling.noise import normal
from fastgen.sampling.tables import SolverTable
from fastgen.serving.rows import IDLE, RowStore

Array = Any
Sizes = Sequence[int] | None  # images that a forward may have, ascending; None: any number


class Networks(Protocol):
    """What slots ask of an engine: see `Engine` in engines/base.py."""

    device: str
    capturable: bool

    def run(self, network: str, *inputs: Array) -> tuple[Array, ...]: ...

    def run_guided(self, sample: Array, timestep: Array, *conds: Array) -> Array: ...

    def array(self, values: np.ndarray) -> Array: ...


@dataclass(frozen=True, eq=False)
class Sample:
    """An image to denoise. `x` (1, C, h, w): the state it starts from. `cond`, `uncond`: arrays (1, ...); `uncond` is empty
    where no row is guided. `guided` = (first, last + 1) rows of the table with guidance, see `loop.guided_rows`."""

    table: SolverTable
    seed: int
    x: Array
    cond: Sequence[Array]
    uncond: Sequence[Array] = ()
    scale: float = 1.0
    guided: tuple[int, int] = (0, 0)


@dataclass
class Slot:
    """Where an image stands: it has run `row` rows of its table."""

    sample: Sample
    offset: int  # of its table in the store
    row: int = 0

    @property
    def rows(self) -> int:
        return len(self.sample.table)

    @property
    def guided(self) -> bool:
        """Whether its next row has guidance."""
        first, last = self.sample.guided
        return first <= self.row < last

    @property
    def stochastic(self) -> bool:
        """Whether its next row draws noise."""
        return bool(self.sample.table.c[self.row] != 0)


class Slots:
    """The states of at most `capacity` images of one model on an engine.

    `sizes(guided)`: images that the engine takes in a forward; a group of images is cut and padded to these. `graphs`: record
    ticks as CUDA graphs, one for each number of images, with and without guidance. The padding stands at the idle row.
    """

    def __init__(
        self,
        engine: Networks,
        scheduler_config: Mapping[str, Any],
        *,
        capacity: int,
        sizes: Callable[[bool], Sizes],
        graphs: bool = False,
    ) -> None:
        self._engine, self._sizes, self._graphs, self._capacity = engine, sizes, graphs, capacity
        self._store = RowStore(engine.array, scheduler_config)
        self._slots: dict[int, Slot] = {}
        self._free = list(range(capacity))[::-1]
        self._arrays: _Arrays | None = None
        self._recorded: dict[tuple[int, bool, bool], _Recorded] = {}
        self._generation = self._store.generation
        self._numpy = isinstance(engine.array(np.zeros(1, np.float32)), np.ndarray)

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def free(self) -> int:
        """Images that may join."""
        return len(self._free)

    def __getitem__(self, number: int) -> Slot:
        return self._slots[number]

    def add(self, sample: Sample) -> int:
        """The number of the slot in which an image begins. At most `capacity` images fit."""
        number = self._free.pop()
        try:
            place = self._store.take(sample.table)
            with self._inference():
                arrays = self._fitting(sample)
                arrays.join(number, sample, place.offset, self._engine.array)
        except BaseException:
            self._free.append(number)
            raise
        self._slots[number] = Slot(sample, place.offset)
        return number

    def remove(self, number: int) -> None:
        """An image leaves, finished or not."""
        self._store.release(self._slots.pop(number).sample.table)
        self._free.append(number)

    def tick(self, numbers: Iterable[int]) -> list[int]:
        """Run the next row of these images, each named once; returns those that are finished now. On a GPU this returns when
        the work is queued. An image that is finished must be removed before the next tick with it. Raises what the engine
        raises; images whose row has run have moved on then, the others stand where they were."""
        groups: dict[bool, list[int]] = {False: [], True: []}
        for number in numbers:
            groups[self._slots[number].guided].append(number)
        finished = []
        for guided, group in groups.items():
            for part in self._parts(group, guided):
                self._run(part, guided)
                for slot in part[: part.index(self._capacity)] if self._capacity in part else part:
                    self._slots[slot].row += 1  # at once: where a later part fails, this one has run
                    if self._slots[slot].row == self._slots[slot].rows:
                        finished.append(slot)
        return finished

    def forwards(self, numbers: Iterable[int]) -> list[tuple[bool, int]]:
        """(guided, images with padding) of each forward that a tick of these images would run."""
        guided = [self._slots[number].guided for number in numbers]
        counts = {kind: guided.count(kind) for kind in (False, True)}
        return [
            (kind, len(part)) for kind, count in counts.items() for part in self._parts([self._capacity] * count, kind)
        ]

    def states(self, numbers: Sequence[int]) -> Array:
        """(B, C, h, w): the states of these images, the result of those that are finished."""
        assert self._arrays is not None
        return _take(self._arrays.x, self._index(numbers))

    def clean(self, numbers: Sequence[int]) -> Array:
        """(B, C, h, w): the clean samples that the last predictions of these images imply; zeros where that is not known."""
        assert self._arrays is not None
        return _take(self._arrays.clean, self._index(numbers))

    def has_clean(self, number: int) -> bool:
        """Whether `clean` of this image is a clean sample."""
        return self._store.has_clean(self._slots[number].offset)

    def _parts(self, group: Sequence[int], guided: bool) -> list[list[int]]:
        """The images in as few forwards as the engine's sizes allow, each padded with the idle slot to the next size."""
        if not group:
            return []
        sizes = self._sizes(guided)
        if sizes is None:
            return [list(group)]
        parts = [list(group[i : i + max(sizes)]) for i in range(0, len(group), max(sizes))]
        return [part + [self._capacity] * (min(s for s in sizes if s >= len(part)) - len(part)) for part in parts]

    def _run(self, numbers: list[int], guided: bool) -> None:
        assert self._arrays is not None
        real = [number for number in numbers if number != self._capacity]
        stochastic = any(self._slots[number].stochastic for number in real)
        with self._inference():
            index = self._index(numbers)
            if not self._graphs:
                prepared = prepare(self._store, self._arrays, index, guided, stochastic)
                finish(self._store, self._arrays, index, prepared, predict(self._engine, prepared, guided))
                return
            if self._generation != self._store.generation:  # the recorded graphs read arrays that are gone
                self._recorded.clear()
                self._generation = self._store.generation
            key = len(numbers), guided, stochastic
            if key not in self._recorded:
                pool = next((recorded.pool for recorded in self._recorded.values()), None)
                idle = self._index([self._capacity] * len(numbers))
                self._recorded[key] = _Recorded(self._engine, self._store, self._arrays, idle, guided, stochastic, pool)
            self._recorded[key](index)

    def _fitting(self, sample: Sample) -> _Arrays:
        """The arrays, with histories as deep as the store's."""
        if self._arrays is None:
            self._arrays = _Arrays(self._capacity, sample, self._store.depth, self._engine.array)
        elif self._arrays.depth < self._store.depth:
            self._arrays.deepen(self._store.depth, self._engine.array)
            self._recorded.clear()
        return self._arrays

    def _index(self, numbers: Sequence[int]) -> Array:
        return self._engine.array(np.array(numbers, np.int64))

    def _inference(self) -> AbstractContextManager[Any]:
        if self._numpy:
            return np.errstate(over="ignore", invalid="ignore")  # broken images are told when they are decoded
        import torch

        return torch.inference_mode()


class _Arrays:
    """The states of all slots, and one more row for the padding: x, history (newest first), clean, index into the row store,
    seeds, scale, and both conditions."""

    def __init__(self, capacity: int, sample: Sample, depth: int, array: Callable[[np.ndarray], Array]) -> None:
        rows, shape = capacity + 1, tuple(sample.x.shape[1:])
        self._new = lambda: array(np.zeros((rows, *shape), np.float32))
        self.x, self.clean = self._new(), self._new()
        self.history = [self._new() for _ in range(depth - 1)]
        self.index, self.seeds = array(np.full(rows, IDLE, np.int64)), array(np.zeros(rows, np.int64))
        self.scale = array(np.ones((rows, *[1] * len(shape)), np.float32))
        self.cond = [_rows_like(c, rows) for c in sample.cond]
        self.uncond = [_rows_like(c, rows) for c in sample.cond]

    @property
    def depth(self) -> int:
        return len(self.history) + 1

    def deepen(self, depth: int, array: Callable[[np.ndarray], Array]) -> None:
        self.history += [self._new() for _ in range(depth - self.depth)]

    def join(self, number: int, sample: Sample, offset: int, array: Callable[[np.ndarray], Array]) -> None:
        here = slice(number, number + 1)
        self.x[here] = sample.x
        self.clean[here] = sample.x
        for m in self.history:
            m[here] = 0.0  # of the image before, it may hold NaN
        self.index[here] = array(np.array([offset], np.int64))
        self.seeds[here] = array(np.array([sample.seed], np.int64))
        self.scale[here] = array(np.full((1, *self.scale.shape[1:]), sample.scale, np.float32))
        for buffers, values in ((self.cond, sample.cond), (self.uncond, sample.uncond)):
            for buffer, value in zip(buffers, values, strict=False):
                buffer[here] = value


class _Prepared(NamedTuple):
    """What a row of some slots (B) needs, read from their arrays."""

    index: Array  # (B,) into the row store
    row: TableRow
    x: Array  # (B, C, h, w)
    sample: Array  # the network's input
    cond: list[Array]  # (B, ...), or with guidance [uncond, cond] (2B, ...)
    noise: Array | None
    history: tuple[Array, ...]


def prepare(store: RowStore, arrays: _Arrays, numbers: Array, guided: bool, stochastic: bool) -> _Prepared:
    """The coefficients, states, conditions and noise of the slots `numbers` (B,)."""
    index = _take(arrays.index, numbers)
    row, x = take_rows(store.packed, index, arrays.x.ndim), _take(arrays.x, numbers)
    cond = [_take(c, numbers) for c in arrays.cond]
    if guided:
        xp = array_namespace(x)
        cond = [xp.concat((_take(u, numbers), c)) for u, c in zip(arrays.uncond, cond, strict=True)]
    noise = normal(_take(arrays.seeds, numbers), row.stream, x.shape[1:]) if stochastic else None
    history = tuple(_take(m, numbers) for m in arrays.history)
    return _Prepared(index, row, x, row.scale * x, cond, noise, history)


def predict(engine: Networks, prepared: _Prepared, guided: bool) -> Array:
    """The network's prediction (B, C, h, w), or with guidance [uncond, cond] (2B, C, h, w)."""
    if guided:
        return engine.run_guided(prepared.sample, prepared.row.timestep, *prepared.cond)
    return engine.run("unet", prepared.sample, prepared.row.timestep, *prepared.cond)[0]


def finish(store: RowStore, arrays: _Arrays, numbers: Array, prepared: _Prepared, prediction: Array) -> None:
    """Guidance and one step, written back in place; each image goes on to its next row, the padding stays."""
    index, row, x = prepared.index, prepared.row, prepared.x
    if len(prediction) != len(x):
        prediction = guide(prediction, _take(arrays.scale, numbers))
    u, w = (array_namespace(x).reshape(_take(store.clean[:, i], index), row.scale.shape) for i in (0, 1))
    arrays.clean[numbers] = u * prepared.sample + w * prediction
    x, history = step(x, prepared.history, prediction, row, prepared.noise)
    arrays.x[numbers] = x
    for buffer, m in zip(arrays.history, history, strict=True):
        buffer[numbers] = m
    arrays.index[numbers] = index + (index > IDLE)


class _Recorded:
    """A row of so many slots as a CUDA graph, or as two around an engine that records graphs of its own. To run it, the numbers
    of the slots are copied into a buffer; nothing waits for the host. While it is recorded only the padding is advanced."""

    def __init__(
        self,
        engine: Networks,
        store: RowStore,
        arrays: _Arrays,
        idle: Array,
        guided: bool,
        stochastic: bool,
        pool: Any,
    ) -> None:
        self._engine, self._guided, self._numbers = engine, guided, idle.clone()
        prepared: list[_Prepared] = []
        predicted: list[Array] = []

        def before() -> None:
            prepared[:] = [prepare(store, arrays, self._numbers, guided, stochastic)]

        def after() -> None:
            finish(store, arrays, self._numbers, prepared[0], predicted[0])

        def whole() -> None:
            before()
            predicted[:] = [predict(engine, prepared[0], guided)]
            after()

        def reset() -> None:
            prepared.clear()
            predicted.clear()

        if engine.capturable:
            self._graphs = [Graph(whole, engine.device, pool, reset)]
        else:
            first = Graph(before, engine.device, pool, prepared.clear)
            first()  # a recording computes nothing, and what follows looks rows up
            predicted.append(predict(engine, prepared[0], guided).clone())  # at a fixed address
            self._graphs = [first, Graph(after, engine.device, first.pool)]
        self._prepared, self._predicted = prepared, predicted
        self.pool = self._graphs[0].pool

    def __call__(self, numbers: Array) -> None:
        self._numbers.copy_(numbers)
        self._graphs[0]()
        if len(self._graphs) > 1:
            self._predicted[0].copy_(predict(self._engine, self._prepared[0], self._guided))
            self._graphs[1]()


def _rows_like(value: Array, rows: int) -> Array:
    """(1, ...) -> (rows, ...), all the same: what the padding is conditioned on is a value that the network knows."""
    xp = array_namespace(value)
    return xp.concat([value] * rows)


def _take(values: Array, numbers: Array) -> Array:
    return array_namespace(values).take(values, numbers, axis=0)
