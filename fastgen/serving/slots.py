"""Images at different steps of different solvers, advanced together: each tick runs one row of the images that it is given.

An image's state is a row of fixed arrays. It may join, rest for any number of ticks, and leave between two ticks; that costs
the others nothing and changes nothing about them. No threads, sockets or clocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastgen.serving.advance import Networks, Recorded, Sample, SlotArrays, finish, predict, prepare, take
from fastgen.serving.rows import RowStore

Array = Any
Sizes = Sequence[int] | None  # images that a forward may have, ascending; None: any number


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
        self._arrays: SlotArrays | None = None
        self._recorded: dict[tuple[int, bool, bool], Recorded] = {}
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
        return take(self._arrays.x, self._index(numbers))

    def clean(self, numbers: Sequence[int]) -> Array:
        """(B, C, h, w): the clean samples that the last predictions of these images imply; zeros where that is not known."""
        assert self._arrays is not None
        return take(self._arrays.clean, self._index(numbers))

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
                self._recorded[key] = Recorded(self._engine, self._store, self._arrays, idle, guided, stochastic, pool)
            self._recorded[key](index)

    def _fitting(self, sample: Sample) -> SlotArrays:
        """The arrays, with histories as deep as the store's."""
        if self._arrays is None:
            self._arrays = SlotArrays(self._capacity, sample, self._store.depth, self._engine.array)
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
