"""Warming a model up: compile its batch sizes, time a step of each, and see whether a picture depends on its company."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from fastgen.serving.messages import Costs
from fastgen.serving.policy import STRETCH, Curve

if TYPE_CHECKING:
    from fastgen.engines.base import Engine
    from fastgen.generate.runner import ModelRunner

CPU_SIZES = (1, 2, 3, 4, 6, 8, 12, 16)
GPU_SIZES = (1, 2, 4, 8, 16, 32, 64)
REPEATS, ENOUGH_S, MOST_REPEATS = 3, 0.2, 21  # of a forward that is timed: until it took so long in all
DOUBT = 1.5  # of a first look at a size
STEADY = 1.5  # median over fastest forward, above which something else disturbs the measurements
TEXT_ROWS = (1, 2)  # of the text encoder: a prompt, and with the empty one
MISSES = 2  # sizes of other bytes, after which larger ones are not tried


@dataclass(frozen=True)
class Warm:
    """`guided`, `plain`: images per forward of the denoiser, with and without guidance; `decode`: of the VAE decoder. `slots`:
    images in a step, at most. `exact`: each size gives an image the same bytes as the smallest one. `costs`: seconds of the
    fastest of some forwards of each size. `steady`: the others took about as long, so that these are worth remembering."""

    guided: tuple[int, ...]
    plain: tuple[int, ...]
    decode: tuple[int, ...]
    slots: int
    exact: bool
    costs: Costs
    steady: bool = True


def warm_of(costs: Costs, slots: int, exact: bool) -> Warm:
    """What `warm_up` found before, in another process."""
    return Warm(tuple(costs.guided), tuple(costs.plain), tuple(costs.decode), slots, exact, costs)


def warm_up(pipeline: ModelRunner, *, guided: bool, exact: bool, say: Callable[[str], Any]) -> Warm:
    """Run every network at every size that will be used, smaller ones first.

    `guided`: the model takes guidance. `exact`: only sizes that give an image the same bytes as a batch of one. `say` gets a
    line before each network."""
    timer = _Timer(pipeline)
    say("timing the denoiser")
    costs, same = _measured(timer, guided, exact)
    slots = Curve(costs).knee()
    plain, same_plain = _measured(timer, False, exact, most=slots) if guided else (costs, same)
    sizes = tuple(n for n in plain if n <= slots)
    guided_sizes = tuple(n for n in costs if n <= slots) if guided else ()
    if pipeline.spec.space.latent:
        say("timing the VAE decoder")
    decode, same_decoded = timer.decode(sorted({*sizes, *guided_sizes}), exact)
    if pipeline.spec.condition.text is not None:
        say("running the text encoder")
        for rows in TEXT_ROWS:
            pipeline.engine.probe("text_encoder", rows)
    found = Costs({n: costs[n] for n in guided_sizes}, {n: plain[n] for n in sizes}, {n: decode[n] for n in decode})
    same = same and same_plain and same_decoded
    return Warm(guided_sizes, sizes, tuple(decode), slots, same, found, timer.steady)


def _measured(timer: _Timer, guided: bool, exact: bool, most: int | None = None) -> tuple[dict[int, float], bool]:
    """Seconds by size, up to `most` or until a step takes too long for a server; and whether each size used gives the bytes of
    a batch of one. The sizes are timed in turns, so that what else the machine does slows all of them."""
    sizes: dict[int, float] = {}
    same, others = True, 0
    for size in timer.sizes(guided):
        if sizes and most is not None and size > most:
            break
        agrees = timer.agrees(size, guided)
        if exact and not agrees:
            others += 1
            if others == MISSES:
                break
            continue
        same = same and agrees
        sizes[size] = timer.glance(size, guided)
        if sizes[size] > DOUBT * STRETCH * min(sizes.values()):
            break
    return timer.times(list(sizes), guided), same


class _Timer:
    """Times forwards of one pipeline. The first image of every batch has the same inputs, the others have their own."""

    def __init__(self, pipeline: ModelRunner) -> None:
        self._pipeline, self._engine = pipeline, pipeline.engine
        self._alone: dict[bool, bytes] = {}
        self.steady = True

    def sizes(self, guided: bool) -> Sequence[int]:
        built = self._engine.buckets(guided)
        wanted = GPU_SIZES if self._pipeline.on_gpu else CPU_SIZES
        if built is None:
            return wanted
        largest = max(wanted)
        if isinstance(built, range):
            return [n for n in wanted if n in built]
        return [n for n in built if n <= largest] or [min(built)]

    def agrees(self, size: int, guided: bool) -> bool:
        """Whether an image in a batch of this size has the bytes that it has in the smallest one that was asked for, in its
        first place and in its last."""
        values = self._engine.numpy(self.forward(size, guided)())
        picked = [values[i] for i in ([0, size] if guided else [0])]
        last = [values[i] for i in ([size - 1, 2 * size - 1] if guided else [size - 1])]
        first, other = (b"".join(np.ascontiguousarray(v).tobytes() for v in rows) for rows in (picked, last))
        return first == other == self._alone.setdefault(guided, first)

    def forward(self, size: int, guided: bool) -> Callable[[], Any]:
        """One forward of the denoiser for so many images."""
        return denoiser_forward(self._engine, size, guided)

    def glance(self, size: int, guided: bool) -> float:
        """Seconds of a forward, roughly."""
        call = self.forward(size, guided)
        return min(self._seconds(call) for _ in range(2))

    def times(self, sizes: Sequence[int], guided: bool) -> dict[int, float]:
        """Seconds of the fastest forward of each size; they run in turns, `REPEATS` times each."""
        calls = {size: self.forward(size, guided) for size in sizes}
        taken: dict[int, list[float]] = {size: [] for size in sizes}
        while not all(map(_enough, taken.values())):
            for size, call in calls.items():
                taken[size] += [self._seconds(call) for _ in range(REPEATS)]
        for seconds in taken.values():
            self.steady = self.steady and statistics.median(seconds) <= STEADY * min(seconds)
        return {size: min(seconds) for size, seconds in taken.items()}

    def decode(self, sizes: Sequence[int], exact: bool) -> tuple[dict[int, float], bool]:
        """Seconds of the VAE decoder by size, up to what it decodes at once; 0 where there is none."""
        decoder, engine = self._pipeline.decoder, self._engine
        if not self._pipeline.spec.space.latent:
            return dict.fromkeys(sizes, 0.0), True
        built = engine.batch_sizes("vae_decoder")
        usable = list(built) if built is not None else [n for n in sizes if n <= decoder.most] or [1]
        seconds: dict[int, float] = {}
        same, alone = True, None
        for size in usable:
            states = _rows(engine, size)[0]
            images, took = self._timed(partial(decoder.decode, states, size))
            row = engine.numpy(images)[0].tobytes()
            alone = row if alone is None else alone
            if exact and row != alone:
                continue
            same = same and row == alone
            seconds[size] = took
        return seconds, same

    def _timed(self, call: Callable[[], Any]) -> tuple[Any, float]:
        """What it returns, and the seconds of its fastest run after the first."""
        result, taken = call(), list[float]()
        while not _enough(taken):
            taken.append(self._seconds(call))
        return result, min(taken)

    def _seconds(self, call: Callable[[], Any]) -> float:
        self._engine.synchronize()
        start = time.perf_counter()
        call()
        self._engine.synchronize()
        return time.perf_counter() - start


def denoiser_forward(engine: Engine, size: int, guided: bool) -> Callable[[], Any]:
    """A forward of the denoiser for so many images. The first one has the same inputs in every batch, and the last one too."""
    inputs = _rows(engine, size)
    if not guided:
        return lambda: engine.run("unet", *inputs)[0]
    conds = [engine.xp.concatenate([c, c]) for c in inputs[2:]]
    return lambda: engine.run_guided(*inputs[:2], *conds)


def _rows(engine: Engine, size: int) -> list[Any]:
    """Inputs of so many images; the last one is the first again."""
    inputs = engine.samples("unet", max(CPU_SIZES[-1], GPU_SIZES[-1]))
    rows = [*range(size - 1), 0]
    return [engine.array(engine.numpy(x)[rows]) for x in inputs]


def _enough(taken: Sequence[float]) -> bool:
    return len(taken) >= REPEATS and (sum(taken) >= ENOUGH_S or len(taken) >= MOST_REPEATS)
