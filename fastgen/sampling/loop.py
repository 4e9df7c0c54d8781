"""THE sampling loop: network evaluations, guidance, and one pure step per row of a solver table.

Written against the array API (https://data-apis.org/array-api): NumPy and torch run these very lines.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import array_api_compat
import numpy

from fastgen.errors import InputError
from fastgen.sampling.arrays import array_namespace
from fastgen.sampling.noise import normal, seed_array
from fastgen.sampling.tables import SolverTable

Array = Any  # an array of any array-API library
Conditions = Sequence[Array]  # what the network takes besides sample and timestep, (N, ...) each; may be empty
# (sample (N, ...), timestep (N,) float32, *conditions (N, ...)) -> prediction like sample
Denoiser = Callable[..., Array]
History = tuple[Array, ...]  # predictions, newest first


class TableRow(NamedTuple):
    """Coefficients of one row, see SolverTable. Floats, or arrays (B, 1, 1, 1) when the images of a batch stand at
    different rows; `b` is a sequence of H of them. `clip` is None where nothing is clipped, a float for the whole batch, or an
    array (B, 1, 1, 1), infinite for images that are not clipped."""

    timestep: Any
    stream: Any
    scale: Any
    p: Any
    q: Any
    r: Any
    x0_p: Any
    x0_q: Any
    a: Any
    b: Any
    d: Any
    c: Any
    clip: Any


SCALARS = tuple(name for name in TableRow._fields if name not in ("stream", "b", "clip"))
ROW_COLUMNS = ("timesteps", "streams", *TableRow._fields[2:-1])  # the table's columns, in the order of TableRow


def table_rows(table: SolverTable) -> list[TableRow]:
    """The rows as Python numbers: R of them, in order."""
    columns = [getattr(table, name).tolist() for name in ROW_COLUMNS]
    return [TableRow._make((*values, table.clip)) for values in zip(*columns, strict=True)]


class PackedRows(NamedTuple):
    """All rows of a table as arrays of one device, see `pack_rows`; or of several tables, one after the other."""

    coefficients: Array  # (R, 10 + H) float32: timestep, scale, p, q, r, x0_p, x0_q, a, d, c, then b
    streams: Array  # (R,) int64
    clip: Any  # see TableRow; of several tables an array (R,)


def coefficient_rows(table: SolverTable) -> numpy.ndarray:
    """The rows as in `PackedRows.coefficients`, float64."""
    columns = numpy.stack([getattr(table, "timesteps" if name == "timestep" else name) for name in SCALARS], axis=1)
    return numpy.concatenate([columns, table.b], axis=1)


def pack_rows(table: SolverTable, xp: Any = numpy, device: Any = None) -> PackedRows:
    """The rows as arrays of `xp` on `device`, to look them up there with `take_rows`."""
    xp = array_namespace(xp.asarray(0))
    coefficients = xp.asarray(coefficient_rows(table).tolist(), dtype=xp.float32, device=device)
    return PackedRows(coefficients, xp.asarray(table.streams.tolist(), dtype=xp.int64, device=device), table.clip)


def take_rows(packed: PackedRows, index: Array, ndim: int = 4) -> TableRow:
    """The rows number `index` (B,), or (1,) for a whole batch, for a state of `ndim` dimensions: timestep and stream (B,),
    b H times (B, 1, ...), the others (B, 1, ...). Two lookups on the device, the rest are views: nothing waits for the host."""
    xp = array_namespace(index)
    values = xp.take(packed.coefficients, index, axis=0)  # (B, 10 + H)
    shape = (index.shape[0], *[1] * (ndim - 1))
    scalars = {name: xp.reshape(values[:, i], shape) for i, name in enumerate(SCALARS)}
    b = [xp.reshape(values[:, i], shape) for i in range(len(SCALARS), values.shape[1])]
    scalars["timestep"] = values[:, 0]
    clip = packed.clip
    if clip is not None and not isinstance(clip, float):
        clip = xp.reshape(xp.take(clip, index, axis=0), shape)
    return TableRow(**scalars, stream=xp.take(packed.streams, index, axis=0), b=b, clip=clip)


def step(x: Array, history: History, prediction: Array, row: TableRow, z: Array | None = None) -> tuple[Array, History]:
    """One step of any solver: the state x (B, ...) and its history after the network said `prediction` at this row.

    `history` holds the newest predictions, at most H - 1 are read; start with (). In a graph with static shapes pass
    H - 1 arrays of zeros instead. `z` is noise like x, needed if c is not 0. The arguments are not written to.
    """
    x0 = None
    if row.clip is not None:
        x0 = _clipped(_weighted_sum((row.x0_p, x), (row.x0_q, prediction)), row.clip)
    newest = _weighted_sum((row.p, x), (row.q, prediction), (row.r, x0))
    predictions = (newest, *history)
    x_next = _weighted_sum((row.a, x), *zip(row.b, predictions, strict=False), (row.d, x0), (row.c, z))
    return x_next, predictions[: len(row.b) - 1]


def sample(network: Denoiser, table: SolverTable, x: Array, cond: Conditions, **options: Any) -> Array:
    """The generated sample, shaped like x: the last state of `sample_steps`, which takes the same arguments."""
    return deque(sample_steps(network, table, x, cond, **options), maxlen=1)[0][1]


def sample_steps(
    network: Denoiser,
    table: SolverTable,
    x: Array,
    cond: Conditions,
    *,
    seeds: Sequence[int] | Array,
    guidance_scale: float = 1.0,
    uncond: Conditions | None = None,
    guidance_interval: tuple[int, int] | None = None,
    guided: Denoiser | None = None,
) -> Iterator[tuple[int, Array]]:
    """Run a solver table from the state x (B, ...) float32; yields (i, state after row i), the last one the generated sample.

    `network(sample, timestep, *cond)` must return a float32 prediction that it does not overwrite until its next call;
    timestep is (N,) float32. `cond`: arrays (B, ...); `seeds`: B, for the noise of stochastic solvers.
    Guidance (Ho and Salimans 2022): with `guidance_scale` s other than 1 the network sees one batch of 2B rows,
    [uncond, cond], and the prediction is uncond + s * (cond - uncond). `uncond`: an array (1, ...), one row for all images, or
    (B, ...), for each of `cond`. `guided(sample (B), timestep (B), *conds (2B))` replaces the network there, if a (2B, ...)
    prediction can be had cheaper.
    `guidance_interval` (lo, hi) limits this to the rows lo <= i < hi of the table; elsewhere, as with s = 1, only the B
    conditional rows run. States are arrays of their own, which later rows do not write to. Raises InputError.
    """
    xp, device, batch = array_namespace(x), array_api_compat.device(x), x.shape[0]
    seeds = seed_array(seeds, xp, device)
    first, last = guided_rows(table, guidance_scale, uncond is not None, guidance_interval)
    both = unconditional_first(xp, uncond, cond) if first < last else ()
    guided = guided or (lambda x, t, *conds: network(xp.concat((x, x)), xp.concat((t, t)), *conds))
    timesteps = xp.asarray(table.timesteps.tolist(), dtype=xp.float32, device=device)[:, None]  # (R, 1)
    timesteps = timesteps * xp.ones((1, batch), dtype=xp.float32, device=device)  # (R, B)
    history: History = ()
    for i, row in enumerate(table_rows(table)):
        network_input = x if row.scale == 1.0 else row.scale * x
        if first <= i < last:
            prediction = guide(guided(network_input, timesteps[i], *both), guidance_scale)
        else:
            prediction = network(network_input, timesteps[i], *cond)
        z = normal(seeds, row.stream, x.shape[1:]) if row.c != 0.0 else None
        x, history = step(x, history, prediction, row, z)
        yield i, x


def guide(prediction: Array, guidance_scale: float | Array) -> Array:
    """(2B, ...) predictions ordered [uncond, cond] -> guided (B, ...): uncond + s * (cond - uncond)."""
    batch = prediction.shape[0] // 2
    uncond = prediction[:batch]
    guided = prediction[batch:] - uncond
    guided *= guidance_scale
    guided += uncond
    return guided


def initial_latents(
    table: SolverTable,
    seeds: Sequence[int] | Array,
    shape: Sequence[int],
    clean: Array | None = None,
    xp: Any = numpy,
    device: Any = None,
) -> Array:
    """The state (B, *shape) float32 a run starts from: init_alpha * clean + init_sigma * noise of stream 0.

    `clean` (B, *shape) is needed by a table with a late start, and only there; its library and device replace `xp` and
    `device`. Raises InputError.
    """
    late = table.noise_steps is not None
    if late != (clean is not None):
        words = "no latents to start from, a late start needs them"
        words = words if late else "clean latents to start from, a full start needs none"
        raise InputError(f"solver {table.key}: {words}")
    if clean is None:
        return table.init_sigma * normal(seeds, 0, shape, xp, device)
    if tuple(clean.shape) != (len(seeds), *shape):
        raise InputError(
            f"solver {table.key}: clean latents of shape {tuple(clean.shape)}, expected {(len(seeds), *shape)}"
        )
    x = table.init_sigma * normal(seeds, 0, shape, array_namespace(clean), array_api_compat.device(clean))
    x += table.init_alpha * clean
    return x


def guided_rows(
    table: SolverTable, guidance_scale: float, has_uncond: bool, interval: tuple[int, int] | None
) -> tuple[int, int]:
    """First guided row, and the one after the last; equal if none is. Raises InputError."""
    lo, hi = interval if interval is not None else (0, len(table))
    if not 0 <= lo < hi <= len(table):
        raise InputError(
            f"guidance_interval is {lo} {hi}, expected 0 <= LO < HI <= {len(table)}, the rows of {table.key}"
        )
    if guidance_scale == 1.0:
        return 0, 0
    if not has_uncond:
        raise InputError(f"guidance scale {guidance_scale:g} needs the unconditional row (empty prompt or zero labels)")
    return lo, hi


def unconditional_first(xp: Any, uncond: Conditions | None, cond: Conditions) -> tuple[Array, ...]:
    """(2B, ...) each: the unconditional rows, a single one B times, then the conditions. Raises InputError."""
    if uncond is None or len(uncond) != len(cond):
        raise InputError(f"{len(uncond or ())} unconditional arrays, expected {len(cond)}, one for each condition")
    both = []
    for none, array in zip(uncond, cond, strict=True):
        if tuple(none.shape[1:]) != tuple(array.shape[1:]) or none.shape[0] not in (1, array.shape[0]):
            raise InputError(f"unconditional row of shape {tuple(none.shape)}, expected {(1, *array.shape[1:])}")
        both.append(xp.concat((xp.broadcast_to(none, array.shape), array)))
    return tuple(both)


def _clipped(x0: Array, limit: float | Array) -> Array:
    xp = array_namespace(x0)
    return xp.clip(x0, -limit, limit) if isinstance(limit, float) else xp.maximum(xp.minimum(x0, limit), -limit)


def _weighted_sum(*terms: tuple[Any, Any]) -> Array:
    """sum of coefficient * array in a new array; terms whose coefficient is the number 0 are left out."""
    total = None
    for coefficient, array in terms:
        if array is None or (isinstance(coefficient, float) and coefficient == 0.0):
            continue
        if total is None:
            total = coefficient * array
        else:
            total += coefficient * array
    return 0.0 * terms[0][1] if total is None else total
