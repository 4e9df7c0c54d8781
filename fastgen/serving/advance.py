"""The states of many images as arrays, and one row of some of them: gather, predict, step, scatter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


class SlotArrays:
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


class Prepared(NamedTuple):
    """What a row of some slots (B) needs, read from their arrays."""

    index: Array  # (B,) into the row store
    row: TableRow
    x: Array  # (B, C, h, w)
    sample: Array  # the network's input
    cond: list[Array]  # (B, ...), or with guidance [uncond, cond] (2B, ...)
    noise: Array | None
    history: tuple[Array, ...]


def prepare(store: RowStore, arrays: SlotArrays, numbers: Array, guided: bool, stochastic: bool) -> Prepared:
    """The coefficients, states, conditions and noise of the slots `numbers` (B,)."""
    index = take(arrays.index, numbers)
    row, x = take_rows(store.packed, index, arrays.x.ndim), take(arrays.x, numbers)
    cond = [take(c, numbers) for c in arrays.cond]
    if guided:
        xp = array_namespace(x)
        cond = [xp.concat((take(u, numbers), c)) for u, c in zip(arrays.uncond, cond, strict=True)]
    noise = normal(take(arrays.seeds, numbers), row.stream, x.shape[1:]) if stochastic else None
    history = tuple(take(m, numbers) for m in arrays.history)
    return Prepared(index, row, x, row.scale * x, cond, noise, history)


def predict(engine: Networks, prepared: Prepared, guided: bool) -> Array:
    """The network's prediction (B, C, h, w), or with guidance [uncond, cond] (2B, C, h, w)."""
    if guided:
        return engine.run_guided(prepared.sample, prepared.row.timestep, *prepared.cond)
    return engine.run("unet", prepared.sample, prepared.row.timestep, *prepared.cond)[0]


def finish(store: RowStore, arrays: SlotArrays, numbers: Array, prepared: Prepared, prediction: Array) -> None:
    """Guidance and one step, written back in place; each image goes on to its next row, the padding stays."""
    index, row, x = prepared.index, prepared.row, prepared.x
    if len(prediction) != len(x):
        prediction = guide(prediction, take(arrays.scale, numbers))
    u, w = (array_namespace(x).reshape(take(store.clean[:, i], index), row.scale.shape) for i in (0, 1))
    arrays.clean[numbers] = u * prepared.sample + w * prediction
    x, history = step(x, prepared.history, prediction, row, prepared.noise)
    arrays.x[numbers] = x
    for buffer, m in zip(arrays.history, history, strict=True):
        buffer[numbers] = m
    arrays.index[numbers] = index + (index > IDLE)


class Recorded:
    """A row of so many slots as a CUDA graph, or as two around an engine that records graphs of its own. To run it, the numbers
    of the slots are copied into a buffer; nothing waits for the host. While it is recorded only the padding is advanced."""

    def __init__(
        self,
        engine: Networks,
        store: RowStore,
        arrays: SlotArrays,
        idle: Array,
        guided: bool,
        stochastic: bool,
        pool: Any,
    ) -> None:
        self._engine, self._guided, self._numbers = engine, guided, idle.clone()
        prepared: list[Prepared] = []
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


def take(values: Array, numbers: Array) -> Array:
    return array_namespace(values).take(values, numbers, axis=0)
