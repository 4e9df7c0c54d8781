"""The images of one model on their way: prepared, chosen for the next step, decoded, and made into files."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from fastgen.errors import InputError, one_line
from fastgen.generate.run import Run
from fastgen.serving.delivery import Delivery, described
from fastgen.serving.fence import Fence
from fastgen.serving.messages import (
    Accepted,
    Begun,
    Costs,
    Failed,
    FromWorker,
    Refused,
    Submit,
    Tick,
)
from fastgen.serving.opening import Opened
from fastgen.serving.picture import Picture, preview_rows
from fastgen.serving.policy import Curve, Work, choose
from fastgen.serving.preparing import Preparer, Refusal
from fastgen.serving.sampling import sample_of
from fastgen.serving.slots import Slots
from fastgen.serving.warm import Warm

if TYPE_CHECKING:
    from fastgen.generate.runner import ModelRunner

STATES = 64  # images that may be on their way at once; others wait without a state
COSTS_EVERY_S = 5.0
SMOOTH = 0.1  # weight of a new measurement of a step


class Batcher:
    """All images of a model that were submitted and have not ended."""

    def __init__(
        self,
        pipeline: ModelRunner,
        preparer: Preparer,
        warm: Warm,
        *,
        max_wait_s: float,
        opened: Opened | None = None,
        say: Callable[[str], Any] = lambda line: None,
    ) -> None:
        self._pipeline, self._preparer, self._warm, self._max_wait_s = pipeline, preparer, warm, max_wait_s
        self._opened = opened or Opened(pipeline, warm, later=False)
        self._say = say
        engine = pipeline.engine
        any_size = engine.batch_invariant and not engine.static_shapes and engine.buckets(False) is None
        self._slots = Slots(
            pipeline.engine,
            pipeline.spec.scheduler_config,
            capacity=max(STATES, warm.slots),
            sizes=lambda guided: None if any_size else self._opened["guided" if guided else "plain"],
            graphs=pipeline.graphs,
        )
        self._curves = {
            True: Curve(warm.costs.guided or warm.costs.plain, any_size=any_size),
            False: Curve(warm.costs.plain, any_size=any_size),
        }
        self._preparing: dict[int, Picture] = {}
        self._pictures: dict[int, Picture] = {}  # prepared
        self._room = warm.slots  # images in a step; fewer after memory ran out
        self._delivery = Delivery(pipeline, lambda: self._opened["decode"])
        self._fence = Fence(pipeline.engine)
        self._tick = _Report()
        self._costs = {True: dict(warm.costs.guided), False: dict(warm.costs.plain)}
        self._costs_sent = time.monotonic()

    @property
    def busy(self) -> bool:
        """There are steps to run, or pictures to wait for."""
        return bool(self._pictures or self._delivery)

    @property
    def preparing(self) -> bool:
        """Images wait for their solver tables, or sizes are being opened."""
        return bool(self._preparing) or not self._opened.complete

    def submit(self, submit: Submit) -> None:
        """One more image; `advance` says what became of it."""
        try:
            table = self._preparer.table(submit.task)
        except Refusal as error:
            table = Future()
            table.set_exception(error)
        self._preparing[submit.id] = Picture(submit, table)

    def cancel(self, id: int) -> None:
        """Forget an image, at once."""
        self._preparing.pop(id, None)
        if (picture := self._pictures.get(id)) is not None:
            self._drop(picture)

    def advance(self, now: float) -> Iterator[FromWorker]:
        """Prepare what is new, run one step, and decode what is finished; yields what there is to tell."""
        self._opened.proceed(self._not_opened)
        yield from self._prepare()
        yield from self._expired(now)
        finished: list[Picture] = []
        chosen, begun = yield from self._chosen(now)
        if begun:
            yield Begun(tuple(picture.submit.id for picture in begun))
        if chosen:
            yield from self._step(chosen, finished)
        before = len(self._delivery)
        if finished:
            self._deliver(finished)
        elif not before:
            self._preview(chosen)
        yield from self._delivery.outcomes(before if self._pipeline.on_gpu else len(self._delivery))

    def _not_opened(self, what: str, error: BaseException) -> None:
        self._say(f"{what} cannot be opened, and is not used: {described(error)}")

    def report(self) -> Tick | None:
        """What has run since the last report; None for nothing."""
        now = time.monotonic()
        costs = None
        if now - self._costs_sent >= COSTS_EVERY_S:
            self._costs_sent = now
            costs = Costs(dict(self._costs[True]), dict(self._costs[False]), self._warm.costs.decode)
        begun = sum(picture.slot is not None for picture in self._pictures.values())
        return self._tick.take(begun, len(self._pictures) - begun + len(self._preparing), costs)

    def _prepare(self) -> Iterator[FromWorker]:
        for picture in [p for p in self._preparing.values() if p.table.done()]:
            id = picture.submit.id
            del self._preparing[id]
            try:
                picture.run = self._preparer.run(picture.submit.task, picture.table.result())
            except InputError as error:
                told = self._preparer.refusal(error, picture.submit.task)
                yield Refused(id, one_line(str(told)), told.param)
                continue
            except Exception as error:
                yield Failed(id, described(error), "engine_error")
                continue
            picture.work = self._work(picture.submit, picture.run)
            picture.due = preview_rows(len(picture.run.table), picture.submit.task.previews)
            self._pictures[id] = picture
            tokens = picture.run.conditions.truncated.get(picture.submit.task.prompt or "")
            yield Accepted(id, picture.work.rows_left, picture.work.guided_left, tokens)

    def _work(self, submit: Submit, run: Run) -> Work:
        size = self._warm.slots
        return Work(
            submit.id,
            submit.key,
            submit.arrival,
            submit.deadline,
            rows_left=len(run.table),
            guided_left=run.guided[1] - run.guided[0],
            plain_s=self._curves[False].seconds(size),
            guided_s=self._curves[True].seconds(size),
        )

    def _expired(self, now: float) -> Iterator[FromWorker]:
        for picture in list(self._pictures.values()):
            deadline = picture.submit.deadline
            if deadline is not None and now > deadline:
                self._drop(picture)
                yield Failed(picture.submit.id, "the deadline has passed", "deadline")

    def _chosen(self, now: float) -> Generator[FromWorker, None, tuple[list[Picture], list[Picture]]]:
        """The images of the next step, and those of them that begin with it, as far as there is room for states."""
        works = (p.work for p in self._pictures.values() if p.slot is not None or self._slots.free)
        chosen, begun = [], []
        for work in choose(works, self._room, now, max_wait_s=self._max_wait_s):
            picture = self._pictures[work.id]
            if picture.slot is None:
                if not self._slots.free:
                    continue
                try:
                    picture.slot = self._slots.add(sample_of(picture.run))
                except Exception as error:  # of the text encoder, or of memory: this image's alone
                    self._drop(picture)
                    yield Failed(picture.submit.id, described(error), "engine_error")
                    continue
                picture.begun = now
                begun.append(picture)
            chosen.append(picture)
        return chosen, begun

    def _step(self, chosen: Sequence[Picture], finished: list[Picture]) -> Iterator[FromWorker]:
        """One row of these images, which have slots; those that are finished join the list."""
        slots = {picture: self._slots[picture.number] for picture in chosen}
        guided = {picture: slot.guided for picture, slot in slots.items()}
        before = {picture: slot.row for picture, slot in slots.items()}
        numbers = [picture.number for picture in chosen]
        forwards = self._slots.forwards(numbers)
        start = time.perf_counter()
        try:
            self._slots.tick(numbers)
            self._fence.wait()
        except Exception as error:  # told below, of the images that bring it about
            if self._pipeline.engine.is_out_of_memory(error):
                self._room = max(1, len(chosen) // 2)
                self._pipeline.engine.release_memory()
            yield from self._step_alone([picture for picture in chosen if slots[picture].row == before[picture]])
        seconds = time.perf_counter() - start
        self._timed(forwards, seconds)
        ran = [picture for picture in chosen if slots[picture].row > before[picture]]
        for picture in ran:
            picture.work.ran(guided[picture])
        finished += [picture for picture in ran if slots[picture].row == slots[picture].rows]
        used = sum(2 if guided[picture] else 1 for picture in ran)
        rows = sum(2 * size if is_guided else size for is_guided, size in forwards)
        self._tick.add({p.submit.id: slots[p].row for p in ran}, seconds, used, max(0, rows - used))

    def _step_alone(self, pictures: Sequence[Picture]) -> Iterator[FromWorker]:
        """One row of each image by itself, after the engine failed: those with which it fails again are given up."""
        for picture in pictures:
            try:
                self._slots.tick([picture.number])
            except Exception as error:
                self._drop(picture)
                yield Failed(picture.submit.id, described(error), "engine_error")

    def _timed(self, forwards: Sequence[tuple[bool, int]], seconds: float) -> None:
        """A step of a single forward renews the measurement of its size."""
        if len(forwards) == 1:
            guided, size = forwards[0]
            if size in self._costs[guided]:
                self._costs[guided][size] += SMOOTH * (seconds - self._costs[guided][size])

    def _deliver(self, finished: Sequence[Picture]) -> None:
        """Begin to decode the finished images, and free their states."""
        groups: dict[str, list[Picture]] = {}
        for picture in finished:
            groups.setdefault(picture.submit.task.normalize, []).append(picture)
        for normalize, group in groups.items():
            states = self._slots.states([picture.number for picture in group])
            self._delivery.begin(group, states, [None] * len(group), normalize)
        for picture in finished:
            self._drop(picture)

    def _preview(self, ran: Sequence[Picture]) -> None:
        """Begin to decode the previews that are due of images that ran, as many as are decoded together."""
        for known in (True, False):
            due: list[Picture] = []
            for picture in ran:
                if picture.slot is None or self._slots.has_clean(picture.slot) != known:
                    continue
                if len(due) < self._delivery.most and picture.preview_due(self._slots[picture.slot].row):
                    due.append(picture)
            if due:
                numbers = [picture.number for picture in due]
                states = self._slots.clean(numbers) if known else self._slots.states(numbers)
                self._delivery.begin(due, states, [self._slots[number].row for number in numbers], "clamp")

    def _drop(self, picture: Picture) -> None:
        self._pictures.pop(picture.submit.id, None)
        if picture.slot is not None:
            self._slots.remove(picture.slot)
            picture.slot = None


class _Report:
    """Adds up steps between two reports."""

    def __init__(self) -> None:
        self._clear()

    def add(self, positions: dict[int, int], seconds: float, used: int, padding: int) -> None:
        self._positions |= positions
        self._steps += 1
        self._seconds += seconds
        self._used += used
        self._padding += padding

    def take(self, running: int, waiting: int, costs: Costs | None) -> Tick | None:
        if not self._steps and costs is None:
            return None
        tick = Tick(self._positions, self._steps, self._seconds, self._used, self._padding, running, waiting, costs)
        self._clear()
        return tick

    def _clear(self) -> None:
        self._positions: dict[int, int] = {}
        self._steps, self._seconds, self._used, self._padding = 0, 0.0, 0, 0
