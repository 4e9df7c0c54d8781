"""Warming a model up: compile its batch sizes, time a step of each, and see whether a picture depends on its company."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from fastgen.serving.messages import Costs
from fastgen.serving.policy import Curve

if TYPE_CHECKING:
    from fastgen.generate.runner import ModelRunner

CPU_SIZES = (1, 2, 3, 4, 6, 8, 12, 16)
GPU_SIZES = (1, 2, 4, 8, 16, 32, 64)
REPEATS, ENOUGH_S, MOST_REPEATS = 3, 0.1, 20  # of a forward that is timed: until it took so long in all
MISSES = 2  # sizes of other bytes, after which larger ones are not tried


@dataclass(frozen=True)
class Warm:
    """`guided`, `plain`: images per forward of the denoiser, with and without guidance; `decode`: of the VAE decoder. `slots`:
    images in a step, at most. `exact`: each size gives an image the same bytes as the smallest one. `costs`: seconds of the
    fastest of some forwards of each size."""

    guided: tuple[int, ...]
    plain: tuple[int, ...]
    decode: tuple[int, ...]
    slots: int
    exact: bool
    costs: Costs


def warm_up(pipeline: ModelRunner, *, guided: bool, exact: bool, say: Callable[[str], Any]) -> Warm:
    """Run every network at every size that will be used, smaller ones first, until doubling the size gains less than 10 %.

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
        pipeline.engine.probe("text_encoder", 1)
        pipeline.engine.probe("text_encoder", 2)  # with the empty prompt
    found = Costs({n: costs[n] for n in guided_sizes}, {n: plain[n] for n in sizes}, {n: decode[n] for n in decode})
    return Warm(guided_sizes, sizes, tuple(decode), slots, same and same_plain and same_decoded, found)


def warm_again(pipeline: ModelRunner, costs: Costs, slots: int, exact: bool) -> Warm:
    """What `warm_up` found in a process that died, without its measurements: every size runs once."""
    engine, timer = pipeline.engine, _Timer(pipeline)
    for guided, sizes in ((False, costs.plain), (True, costs.guided)):
        for size in sizes:
            timer.forward(size, guided)()
    for size in costs.decode if pipeline.spec.space.latent else ():
        engine.probe("vae_decoder", size)
    return Warm(tuple(costs.guided), tuple(costs.plain), tuple(costs.decode), slots, exact, costs)


def _measured(timer: _Timer, guided: bool, exact: bool, most: int | None = None) -> tuple[dict[int, float], bool]:
    """Seconds by size, up to `most` or until doubling gains too little; and whether each size used gives the bytes of a batch
    of one."""
    seconds: dict[int, float] = {}
    same, others = True, 0
    for size in timer.sizes(guided):
        if seconds and most is not None and size > most:
            break
        row, took = timer.step(size, guided)
        agrees = timer.agrees(row, guided)
        if exact and not agrees:
            others += 1
            if others == MISSES:
                break
            continue
        same = same and agrees
        seconds[size] = took
        half = max((n for n in seconds if 2 * n <= size), default=None)
        if most is None and half is not None and seconds[half] / half < 1.1 * took / size:
            break
    return seconds, same


class _Timer:
    """Times forwards of one pipeline. The first image of every batch has the same inputs, the others have their own."""

    def __init__(self, pipeline: ModelRunner) -> None:
        self._pipeline, self._engine = pipeline, pipeline.engine
        self._alone: dict[bool, bytes] = {}

    def sizes(self, guided: bool) -> Sequence[int]:
        built = self._engine.buckets(guided)
        wanted = GPU_SIZES if self._pipeline.on_gpu else CPU_SIZES
        if built is None:
            return wanted
        largest = max(wanted)
        if isinstance(built, range):
            return [n for n in wanted if n in built]
        return [n for n in built if n <= largest] or [min(built)]

    def step(self, size: int, guided: bool) -> tuple[bytes, float]:
        """The bytes of the first image's prediction, with it also in the last place, and the seconds of a forward."""
        prediction, seconds = self._timed(self.forward(size, guided))
        values = self._engine.numpy(prediction)
        picked = [values[i] for i in ([0, size] if guided else [0])]
        last = [values[i] for i in ([size - 1, 2 * size - 1] if guided else [size - 1])]
        first, other = (b"".join(np.ascontiguousarray(v).tobytes() for v in rows) for rows in (picked, last))
        return first if first == other else b"", seconds

    def forward(self, size: int, guided: bool) -> Callable[[], Any]:
        """One forward of the denoiser for so many images."""
        engine, inputs = self._engine, self._rows(size)
        if not guided:
            return lambda: engine.run("unet", *inputs)[0]
        conds = [engine.xp.concatenate([c, c]) for c in inputs[2:]]
        return lambda: engine.run_guided(*inputs[:2], *conds)

    def agrees(self, row: bytes, guided: bool) -> bool:
        """Whether these are the bytes of the smallest batch."""
        return row == self._alone.setdefault(guided, row) != b""

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
            states = self._rows(size)[0]
            images, took = self._timed(partial(decoder.decode, states, size))
            row = engine.numpy(images)[0].tobytes()
            alone = row if alone is None else alone
            if exact and row != alone:
                continue
            same = same and row == alone
            seconds[size] = took
        return seconds, same

    def _rows(self, size: int) -> list[Any]:
        """Inputs of so many images; the last one is the first again."""
        inputs = self._engine.samples("unet", max(CPU_SIZES[-1], GPU_SIZES[-1]))
        rows = [*range(size - 1), 0]
        return [self._engine.array(self._engine.numpy(x)[rows]) for x in inputs]

    def _timed(self, call: Callable[[], Any]) -> tuple[Any, float]:
        """What it returns, and the seconds of its fastest run after the first."""
        result, taken = call(), list[float]()
        while len(taken) < REPEATS or (sum(taken) < ENOUGH_S and len(taken) < MOST_REPEATS):
            self._engine.synchronize()
            start = time.perf_counter()
            result = call()
            self._engine.synchronize()
            taken.append(time.perf_counter() - start)
        return result, min(taken)
