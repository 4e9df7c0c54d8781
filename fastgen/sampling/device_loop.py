"""The loop of sampling/loop.py for a GPU: its state stays in fixed buffers there, and the host only replays a recorded row.

A row looks up its coefficients by a counter on the device, scales the state, runs the network, guides, draws noise, steps
and increments the counter: one CUDA graph, or two around an engine that records its own. Nothing waits for the host, so
the whole run is queued in the time that a few rows take.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

from fastgen.sampling import streams
from fastgen.sampling.graphs import Graph
from fastgen.sampling.loop import (
    Conditions,
    TableRow,
    guide,
    guided_rows,
    pack_rows,
    step,
    take_rows,
    unconditional_first,
)
from fastgen.sampling.noise import normal
from fastgen.sampling.tables import SolverTable

Tensor = Any  # torch.Tensor


class TorchNetworks(Protocol):
    """What the loop asks of an engine: see `Engine` in engines/base.py."""

    device: str
    capturable: bool

    def run(self, network: str, *inputs: Tensor) -> tuple[Tensor, ...]: ...

    def run_guided(self, sample: Tensor, timestep: Tensor, *conds: Tensor) -> Tensor: ...


class _Prepared(NamedTuple):
    """A row's coefficients, noise (None where the solver draws none) and network inputs."""

    row: TableRow
    noise: Tensor | None
    sample: Tensor  # (B, C, h, w)
    timestep: Tensor  # (B,)


class DeviceLoop:
    """Runs one solver table at one batch size on a torch engine, as `loop.sample` does.

    `shape` (B, C, h, w) of the state; `cond`: conditions (B, ...) of the shapes and dtypes that all runs have. With `graphs`,
    rows are recorded as CUDA graphs when they are first needed: one for guided rows (2B rows of the network), one for the
    others (B). `pool`: the memory pool of a loop that still exists and never runs at the same time, such as one of another
    batch size."""

    def __init__(
        self,
        engine: TorchNetworks,
        table: SolverTable,
        shape: Sequence[int],
        cond: Conditions,
        *,
        graphs: bool,
        pool: Any = None,
    ) -> None:
        import torch

        self._torch, self._engine, self._table, self._graphs = torch, engine, table, graphs
        new: dict[str, Any] = {"device": engine.device, "dtype": torch.float32}
        batch = shape[0]
        self._rows = pack_rows(table, torch, engine.device)
        self._x = torch.zeros(*shape, **new)
        self._history = [torch.zeros(*shape, **new) for _ in range(table.depth - 1)]
        self._cond = [torch.zeros_like(c) for c in cond]
        self._conds = [torch.cat([c, c]) for c in self._cond]  # [uncond, cond]
        self._scale = torch.zeros((), **new)
        self._seeds = torch.zeros(batch, dtype=torch.int64, device=engine.device)
        self._index = torch.zeros(1, dtype=torch.int64, device=engine.device)
        self._prepared: dict[bool, _Prepared] = {}  # by whether the row is guided, as the next two
        self._prediction: dict[bool, Tensor] = {}
        self._stochastic = bool((table.c != 0).any())
        # A fork must end in the graph that it began in, and outside graphs it would save nothing.
        forks = graphs and engine.capturable and self._stochastic
        self._side: Any = streams.stream(engine.device, streams.NOISE) if forks else None
        self._forked = False
        # The graph of a whole row, or the two before and after the engine's own.
        self._recorded: dict[bool, tuple[Graph, ...]] = {}
        self._shared_pool = pool

    @property
    def pool(self) -> Any:
        """The memory pool of the recorded graphs, None before there are any."""
        return next((graphs[0].pool for graphs in self._recorded.values()), None)

    def run(self, x: Tensor, cond: Conditions, **options: Any) -> Tensor:
        """The generated sample, the last state of `steps`. Returns when everything is queued, not when it has run."""
        return deque(self.steps(x, cond, **options), maxlen=1)[0][1]

    def steps(
        self,
        x: Tensor,
        cond: Conditions,
        *,
        seeds: Tensor,
        guidance_scale: float = 1.0,
        uncond: Conditions | None = None,
        guidance_interval: tuple[int, int] | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """As `loop.sample_steps`, with `seeds` (B,) int64 on the device. All states but the last are one buffer, which the
        next row overwrites. A row is queued, not finished, when its state is yielded. Raises InputError."""
        first, last = guided_rows(self._table, guidance_scale, uncond is not None, guidance_interval)
        rows = [first <= i < last for i in range(len(self._table))]
        if self._graphs:  # recording changes the buffers: before they are set
            for guided in sorted(set(rows) - set(self._recorded)):
                self._recorded[guided] = self._record(guided)
        self._x.copy_(x)
        both = () if uncond is None else unconditional_first(self._torch, uncond, cond)
        for buffer, values in [*zip(self._cond, cond, strict=True), *zip(self._conds, both, strict=False)]:
            buffer.copy_(values)
        self._seeds.copy_(seeds)
        self._scale.fill_(guidance_scale)
        self._index.zero_()
        for m in self._history:
            m.zero_()
        for i, guided in enumerate(rows):
            with self._torch.inference_mode():  # not across the yield: it would be the caller's mode too
                self._row(guided)
            yield i, self._x.clone() if i == len(rows) - 1 else self._x

    def _row(self, guided: bool) -> None:
        if not self._graphs:
            self._whole_row(guided)
        elif self._engine.capturable:
            self._recorded[guided][0]()
        else:
            before, after = self._recorded[guided]
            before()
            self._predict(guided)
            after()

    def _record(self, guided: bool) -> tuple[Graph, ...]:
        device, pool = self._engine.device, self.pool or self._shared_pool  # rows never overlap

        def reset() -> None:
            self._index.zero_()  # no row is looked up behind the table's end
            self._prepared.pop(guided, None)
            self._prediction.pop(guided, None)

        with self._torch.inference_mode():
            if self._engine.capturable:
                return (Graph(lambda: self._whole_row(guided), device, pool, reset),)
            before = Graph(lambda: self._before(guided), device, pool, reset)
            self._predict(guided)
            return before, Graph(lambda: self._after(guided), device, before.pool)

    def _whole_row(self, guided: bool) -> None:
        try:
            self._before(guided)
            self._predict(guided)
        finally:
            self._join()  # where memory ran out, too: a recording cannot end with a fork
        self._after(guided)

    def _before(self, guided: bool) -> None:
        """The row's coefficients, noise and network inputs; recorded ones stay at the addresses that they had."""
        torch = self._torch
        row = take_rows(self._rows, self._index, self._x.ndim)
        noise = None
        if self._stochastic:
            with self._beside():  # while the network runs
                noise = normal(self._seeds, row.stream, self._x.shape[1:])
        timestep = row.timestep + torch.zeros_like(self._seeds, dtype=torch.float32)  # (B,)
        self._prepared[guided] = _Prepared(row, noise, row.scale * self._x, timestep)

    def _predict(self, guided: bool) -> None:
        sample, timestep = self._prepared[guided].sample, self._prepared[guided].timestep
        if guided:
            prediction = self._engine.run_guided(sample, timestep, *self._conds)  # (2B, ...)
        else:
            prediction = self._engine.run("unet", sample, timestep, *self._cond)[0]
        if self._graphs and not self._engine.capturable:  # the second graph reads a fixed address
            if guided not in self._prediction:
                self._prediction[guided] = self._torch.empty_like(prediction)
            prediction = self._prediction[guided].copy_(prediction)
        self._prediction[guided] = prediction

    def _after(self, guided: bool) -> None:
        """Guidance, step, and on to the next row."""
        prediction, prepared = self._prediction[guided], self._prepared[guided]
        if guided:
            prediction = guide(prediction, self._scale)
        x, history = step(self._x, tuple(self._history), prediction, prepared.row, prepared.noise)
        self._x.copy_(x)
        for buffer, m in reversed(list(zip(self._history, history, strict=True))):
            buffer.copy_(m)  # the oldest first: each is read before it is overwritten
        self._index += 1

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """Within it work goes to the side stream, if there is one; `_join` makes the current stream wait for it."""
        if self._side is None:
            yield
            return
        self._side.wait_stream(self._torch.cuda.current_stream(self._engine.device))
        self._forked = True
        with self._torch.cuda.stream(self._side):
            yield

    def _join(self) -> None:
        if self._forked:
            self._torch.cuda.current_stream(self._engine.device).wait_stream(self._side)
            self._forked = False
