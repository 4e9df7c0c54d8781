"""Which images run in the next step, and how long a new request would wait. Pure: no clocks, threads or arrays.

Images are served short first, with ageing (the shortest remaining time has the least mean wait: Schrage 1968, "A Proof of the
Optimality of the Shortest Remaining Processing Time Discipline"). Clients share the server evenly, image by image, so that
a request for many images holds up nobody else.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

AGEING = 0.1  # an image yields to one that came t seconds later only if that is shorter by more than AGEING * t seconds
URGENT_S = 1.0  # an image with less slack than this goes first
MAX_WAIT_S = 30.0
HEADROOM = 0.7  # of the longest wait is given away; the rest is for clients that come later
PACE_S = 10.0  # the pace of the server is that of about so many seconds
STRETCH = 3.5  # of a step by the company in it
GAIN = 1.05  # of images/s, for which a larger batch is worth its longer step


class Curve:
    """Measured seconds of a step by images in it. Raises ValueError where there is no measurement.

    `any_size`: the engine runs every size, and times between the measured ones are interpolated; otherwise a step is padded up
    to the next size that was measured. Sizes above the largest run as several steps.
    """

    def __init__(self, points: Mapping[int, float], any_size: bool = False) -> None:
        if not points or min(points) < 1:
            raise ValueError(f"a curve needs seconds of steps of 1 image or more, not of {sorted(points)}")
        self.points = dict(sorted(points.items()))
        self.any_size = any_size
        largest = max(self.points)
        self._within = [self._one(n) for n in range(1, largest + 1)]

    @property
    def largest(self) -> int:
        return len(self._within)

    def seconds(self, images: int) -> float:
        """Seconds of one step of so many images; 0 for none."""
        full, rest = divmod(images, self.largest)
        return full * self._within[-1] + (self._within[rest - 1] if rest else 0.0)

    def size(self, images: int) -> int:
        """Images that such a step computes, padding included."""
        full, rest = divmod(images, self.largest)
        padded = rest if self.any_size or not rest else next(n for n in self.points if n >= rest)
        return full * self.largest + padded

    def knee(self) -> int:
        """The smallest size with as many images/s as any, but for a factor of `GAIN`. A step of it takes at most `STRETCH`
        times one of the smallest size: so much slower is an image in company than alone."""
        allowed = [n for n, took in self.points.items() if took <= STRETCH * next(iter(self.points.values()))]
        rates = {n: n / max(self.points[n], 1e-9) for n in allowed}
        return next(n for n in allowed if GAIN * rates[n] >= max(rates.values()))

    def _one(self, images: int) -> float:
        above = next(n for n in self.points if n >= images)
        below = max((n for n in self.points if n <= images), default=above)
        if not self.any_size or below == above:
            return self.points[above]
        share = (images - below) / (above - below)
        return (1 - share) * self.points[below] + share * self.points[above]


@dataclass(slots=True)
class Work:
    """An image that is being made or waits. Count its rows down, or call `ran`, as they run.

    `arrival`, `deadline`: seconds of one clock. `guided_left`: those of the `rows_left` that run with guidance. `plain_s`,
    `guided_s`: seconds of a step of either kind, in a full batch.
    """

    id: int
    key: str
    arrival: float
    deadline: float | None
    rows_left: int
    guided_left: int
    plain_s: float
    guided_s: float
    own_s: float = field(init=False)  # its seconds at the beginning

    def __post_init__(self) -> None:
        self.own_s = self.seconds_left

    @property
    def seconds_left(self) -> float:
        """Until it is done, if it runs in every step from now on."""
        return self.rows_left * self.plain_s + self.guided_left * (self.guided_s - self.plain_s)

    def ran(self, guided: bool) -> None:
        """One of its rows has run."""
        self.rows_left -= 1
        self.guided_left -= guided


def choose(
    works: Iterable[Work],
    room: int,
    now: float,
    *,
    ageing: float = AGEING,
    urgent_s: float = URGENT_S,
    max_wait_s: float = MAX_WAIT_S,
) -> list[Work]:
    """The images that run the next row: `room` of them, or all if there are fewer; the most pressing first.

    1. Images with little slack: those that have to run from now on to end by their deadline, or to wait no longer than
       `max_wait_s` in all; earliest first. Where several clients wait, they leave them up to half of the room.
    2. Every client's best image before any client's second one. The best has the least `seconds_left + ageing * arrival`. That
       order does not change while images wait, and an image that runs only gains: nothing is put aside without need.
    """
    by_key: dict[str, list[tuple[float, int, Work]]] = {}
    late: list[tuple[float, int, Work]] = []
    for work in works:
        left = work.rows_left * work.plain_s + work.guided_left * (work.guided_s - work.plain_s)
        due = work.arrival + work.own_s + max_wait_s
        if work.deadline is not None and work.deadline < due:
            due = work.deadline
        if due - now - left < urgent_s:
            late.append((due, work.id, work))
        entry = (left + ageing * work.arrival, work.id, work)
        if work.key in by_key:
            by_key[work.key].append(entry)
        else:
            by_key[work.key] = [entry]
    first = [entry[2] for entry in heapq.nsmallest(room, late)]
    others = len(by_key.keys() - {work.key for work in first})
    first = first[: room - min(room // 2, others)]
    return first + _in_turn(by_key, room - len(first), first)


def _in_turn(by_key: Mapping[str, list[tuple[float, int, Work]]], room: int, taken: Sequence[Work]) -> list[Work]:
    """Every key's best work, then every key's second; within a round the best first. Keys of works that are `taken` have had
    as many turns."""
    had, ids = Counter(work.key for work in taken), {work.id for work in taken}
    turns: list[tuple[int, float, int, Work]] = []
    for key, entries in by_key.items():
        best = heapq.nsmallest(room + had[key], entries)
        turns += [(had[key] + i, *entry) for i, entry in enumerate(e for e in best if e[1] not in ids)]
    return [turn[3] for turn in heapq.nsmallest(room, turns)]


class Backlog:
    """The images that a model has accepted and not finished, and what a new request would wait for.

    `seconds` are the server's: of an image that shares a full batch of b, 1/b of its steps' time. They are estimates; `observe`
    tells how long the work really takes.
    """

    def __init__(self) -> None:
        self._works: dict[int, tuple[str, float]] = {}
        self._seconds: dict[str, float] = {}  # by key
        self._images: Counter[str] = Counter()
        self._done_s = self._took_s = 1.0

    def __len__(self) -> int:
        return len(self._works)

    def __contains__(self, id: int) -> bool:
        return id in self._works

    def add(self, id: int, key: str, seconds: float) -> None:
        """An image of a client is accepted. Raises KeyError for an id that is there already."""
        if id in self._works:
            raise KeyError(id)
        self._works[id] = (key, seconds)
        self._images[key] += 1
        self._seconds[key] = self._seconds.get(key, 0.0) + seconds

    def progress(self, id: int, seconds_left: float) -> float:
        """So much of an image is still to do; returns how much less that is than before. Raises KeyError for an unknown id."""
        key, before = self._works[id]
        self._works[id] = (key, seconds_left)
        self._seconds[key] += seconds_left - before
        return before - seconds_left

    def remove(self, id: int) -> None:
        """An image is done, or given up. Raises KeyError for an unknown id."""
        key, seconds = self._works.pop(id)
        self._images[key] -= 1
        if self._images[key]:
            self._seconds[key] -= seconds
        else:  # sums of floats drift: an idle key begins at 0 again
            del self._images[key], self._seconds[key]

    def observe(self, done_s: float, took_s: float) -> None:
        """While there was work without a pause, `done_s` estimated seconds of it were done in `took_s` seconds."""
        kept = math.exp(-took_s / PACE_S)
        self._done_s = kept * self._done_s + done_s
        self._took_s = kept * self._took_s + took_s

    @property
    def pace(self) -> float:
        """Seconds that an estimated second of work takes, lately; from a tenth to a hundred."""
        return min(100.0, max(0.1, self._took_s / max(self._done_s, 1e-9)))

    def ahead(self, key: str) -> int:
        """Images that would run before a new one of this client, at most: its own, and as many of every other client."""
        own = self._images[key]
        return own + sum(min(images, own + 1) for other, images in self._images.items() if other != key)

    def predicted(self, key: str, seconds: float) -> float:
        """Seconds until a new request of this client, with so much work of its own, would end.

        The server is shared evenly: while this client's work is done, every other one gets as much of the server, or all that
        it waits for."""
        own = max(0.0, self._seconds.get(key, 0.0)) + seconds
        others = sum(min(max(0.0, other), own) for name, other in self._seconds.items() if name != key)
        return self.pace * (own + others)

    def retry_after(
        self, key: str, seconds: float, max_wait_s: float = MAX_WAIT_S, deadline_s: float | None = None
    ) -> int | None:
        """None if a new request would wait no longer than `HEADROOM * max_wait_s` in all, and end within `deadline_s`;
        otherwise whole seconds after which that may be so."""
        predicted = self.predicted(key, seconds)
        excess = predicted - self.pace * seconds - HEADROOM * max_wait_s
        if deadline_s is not None:
            excess = max(excess, predicted - deadline_s)
        return None if excess <= 0 else max(1, math.ceil(excess))
