"""Requests one by one, in static batches, and step by step with the server's own policy: on a virtual clock with measured
costs, the first two on a real one too."""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from benchmarks.report import percentile
from fastgen.serving.policy import AGEING, MAX_WAIT_S, URGENT_S, Backlog, Curve, Work, choose

MIX: Mapping[int, float] = {10: 0.60, 20: 0.25, 50: 0.15}  # steps -> share of the requests
WINDOW_S = 0.050  # of static batching
POOL = 8  # seeds: the same pictures again and again, so that every one can be compared


class Arrival(NamedTuple):
    """A request of `steps` steps that comes at second `at` of the load. `seed`: which of the pool's pictures it asks for."""

    at: float
    steps: int
    key: str = ""
    seed: int = 0


Execute = Callable[[Sequence[Arrival], float], float]  # runs a batch from a time on, and says when it ended


class Served(NamedTuple):
    arrival: Arrival
    ended: float

    @property
    def latency(self) -> float:
        return self.ended - self.arrival.at


@dataclass(frozen=True)
class Costs:
    """Seconds of a step, and of decoding, by images; `slots`: images in a step, at most."""

    step: Curve
    decode: Curve
    slots: int

    def execute(self, batch: Sequence[Arrival], start: float) -> float:
        """When a batch of one number of steps ends that runs at once from `start` on."""
        return start + batch[0].steps * self.step.seconds(len(batch)) + self.decode.seconds(len(batch))

    def alone_s(self, steps: float) -> float:
        return steps * self.step.seconds(1) + self.decode.seconds(1)

    def share_s(self, steps: float) -> float:
        """An image's part of the server's time where all slots are in use."""
        return (steps * self.step.seconds(self.slots) + self.decode.seconds(self.slots)) / self.slots


@dataclass
class Outcome:
    """What became of a load. `used`, `padding`: rows of the denoiser at step level. `refused`: would have waited too long."""

    served: list[Served] = field(default_factory=list)
    refused: list[Arrival] = field(default_factory=list)
    used: int = 0
    padding: int = 0

    def latencies(self, steps: int | None = None, key: str | None = None) -> list[float]:
        wanted = (s for s in self.served if steps in (None, s.arrival.steps) and key in (None, s.arrival.key))
        return [served.latency for served in wanted]

    def facts(self) -> dict[str, Any]:
        """Latencies in ms, of all and by the steps of the mix; images/s from the first arrival to the last end."""
        found: dict[str, Any] = {"served": len(self.served), "refused": len(self.refused), "images_per_s": None}
        for name, steps in (("", None), *((f"_{steps}_steps", steps) for steps in MIX)):
            taken = self.latencies(steps)
            found |= {f"p{q}_ms{name}": 1000 * percentile(taken, q) if taken else None for q in (50, 95, 99)}
        if self.served:
            start = min(one.arrival.at for one in self.served)
            found["images_per_s"] = len(self.served) / (max(one.ended for one in self.served) - start)
        return found


def poisson(rate: float, seconds: float, seed: int, mix: Mapping[int, float] = MIX, key: str = "") -> list[Arrival]:
    """`rate` requests a second, independent of each other, of `mix` steps."""
    draw, arrivals, at = random.Random(seed), [], 0.0
    while (at := at + draw.expovariate(rate)) < seconds:
        (steps,) = draw.choices(list(mix), list(mix.values()))
        arrivals.append(Arrival(at, steps, key, draw.randrange(POOL)))
    return arrivals


def capacity(costs: Costs, images: int, mix: Mapping[int, float] = MIX) -> float:
    """Images/s of a server that always runs so many images at once."""
    steps = sum(s * share for s, share in mix.items()) / sum(mix.values())
    return images / (steps * costs.step.seconds(images) + costs.decode.seconds(images))


def one_by_one(arrivals: Iterable[Arrival], execute: Execute) -> Outcome:
    """First come, first served."""
    outcome, now = Outcome(), 0.0
    for arrival in arrivals:
        now = execute([arrival], max(now, arrival.at))
        outcome.served.append(Served(arrival, now))
    return outcome


def static(arrivals: Iterable[Arrival], execute: Execute, largest: int, window_s: float = WINDOW_S) -> Outcome:
    """Batches of at most `largest` requests of one number of steps. The oldest request waits `window_s`, or until its batch is
    full, for others like it."""
    outcome, now, waiting, coming = Outcome(), 0.0, list[Arrival](), deque(arrivals)
    while waiting or coming:
        if not waiting:
            waiting.append(coming.popleft())
        steps, until = waiting[0].steps, max(now, waiting[0].at + window_s)
        while coming and coming[0].at <= until and sum(w.steps == steps for w in waiting) < largest:
            waiting.append(coming.popleft())
        batch = [w for w in waiting if w.steps == steps][:largest]
        now = execute(batch, max(now, batch[-1].at) if len(batch) == largest else until)
        outcome.served += [Served(w, now) for w in batch]
        left = [w for w in waiting if w.steps == steps][largest:]
        waiting = sorted([*left, *(w for w in waiting if w.steps != steps)])
    return outcome


class StepLevel:
    """As `fastgen serve` does: every step runs the images that the policy chooses. With `admission`, what would wait longer
    than `max_wait_s` is refused at once."""

    def __init__(
        self,
        costs: Costs,
        *,
        ageing: float = AGEING,
        urgent_s: float = URGENT_S,
        max_wait_s: float = MAX_WAIT_S,
        admission: bool = False,
    ) -> None:
        self.costs, self.admission, self.max_wait_s = costs, admission, max_wait_s
        self._order = {"ageing": ageing, "urgent_s": urgent_s, "max_wait_s": max_wait_s}
        self._works: dict[int, tuple[Work, Arrival]] = {}
        self._backlog, self._ids, self._outcome = Backlog(), itertools.count(), Outcome()

    def run(self, arrivals: Iterable[Arrival]) -> Outcome:
        now, coming = 0.0, deque(arrivals)
        while self._works or coming:
            if not self._works:
                now = max(now, coming[0].at)
            while coming and coming[0].at <= now:
                self._accept(coming.popleft())
            now = self._step(now)
        return self._outcome

    def _accept(self, arrival: Arrival) -> None:
        share_s, step_s = self.costs.share_s(arrival.steps), self.costs.step.seconds(self.costs.slots)
        if self.admission and self._backlog.retry_after(arrival.key, share_s, self.max_wait_s) is not None:
            self._outcome.refused.append(arrival)
            return
        id = next(self._ids)
        self._works[id] = (Work(id, arrival.key, arrival.at, None, arrival.steps, 0, step_s, step_s), arrival)
        self._backlog.add(id, arrival.key, share_s)

    def _step(self, now: float) -> float:
        """The time after a step, and after decoding what it completed."""
        costs, outcome = self.costs, self._outcome
        chosen = choose((work for work, _ in self._works.values()), costs.slots, now, **self._order)
        for work in chosen:
            work.ran(guided=False)
            self._backlog.progress(work.id, costs.share_s(work.rows_left))
        done = [work for work in chosen if not work.rows_left]
        outcome.used += len(chosen)
        outcome.padding += costs.step.size(len(chosen)) - len(chosen)
        now += costs.step.seconds(len(chosen)) + costs.decode.seconds(len(done))
        for work in done:
            outcome.served.append(Served(self._works.pop(work.id)[1], now))
            self._backlog.remove(work.id)
        return now
