"""Keeping one worker process alive: it is started, pinged between its steps, killed when it hangs, and started again when it
dies, later each time, until it is given up."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from typing import Any, Protocol

from fastgen.errors import FastgenError, InputError, Say
from fastgen.serving.link import Link, Target
from fastgen.serving.messages import FromWorker, Loading, Ping, Pong, Ready, Stop, ToWorker, Unready
from fastgen.serving.worker import WorkerOptions

PING_S = 0.5  # between two pings
ANSWER_S = 2.0  # a worker that has not answered for so long is not ready
HANG_S = 10.0  # and for so long is killed
STEPS = 10.0  # both are at least so many of its steps
DEATHS, WINDOW_S = 5, 300.0  # so many deaths within this time, without a picture between, and the worker is given up
BACKOFF_S = 1.0  # before the second restart in a row; twice as long before each further one


class Owner(Protocol):
    """Who the worker works for. All calls come on the event loop's thread."""

    def received(self, message: FromWorker) -> None:
        """The worker says something, at first Ready."""

    def died(self, again: bool) -> None:
        """The worker has died, and another one starts (`again`), or it is given up."""

    def looked(self, now: float) -> None:
        """It is time to look after things: twice a second."""

    def longest_step(self) -> float:
        """Seconds between two of the worker's looks at its messages, usually."""


@dataclass
class Life:
    """One worker process: what is known of it."""

    link: Link
    ready: bool = False
    number: int = 0  # of the last ping
    asked: float | None = None  # when the ping was sent that has no answer


class Keeper:
    """Keeps a worker for its owner. `state`: starting, ready, stalled, restarting or failed, as in `interface.ModelView`."""

    def __init__(self, options: WorkerOptions, target: Target, owner: Owner, say: Say) -> None:
        self._options, self._target, self._owner = options, target, owner
        self._say = lambda line: say(f"{options.name}: {line}")
        self.state = "starting"
        self._life: Life | None = None
        self._deaths: list[float] = []  # since the last picture
        self._restart_at = 0.0
        self._started: asyncio.Future[None] | None = None  # the first start
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False

    @property
    def pid(self) -> int | None:
        """Of the worker process."""
        return self._life.link.pid if self._life else None

    @property
    def can_work(self) -> bool:
        """The worker takes messages."""
        return self._life is not None and self._life.ready and not self._stopping

    @property
    def retry_after(self) -> int:
        """Whole seconds after which a client may try again while the worker is not ready."""
        return max(1, math.ceil(self._restart_at - time.monotonic()) + 1)

    async def start(self) -> None:
        """Start the worker, and wait until it is ready. Raises FastgenError for what it says instead."""
        self._started = asyncio.get_running_loop().create_future()
        await self._begin()
        self._background(self._watch())
        await self._started

    def send(self, message: ToWorker) -> None:
        """To the worker, if there is one."""
        if self._life is not None:
            self._life.link.send(message)

    def made_a_picture(self) -> None:
        """The worker is of use: its deaths until now count no more."""
        self._deaths.clear()

    async def stop(self) -> None:
        """End the worker for good."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        if self._life is not None:
            self._life.link.send(Stop())
            await asyncio.sleep(0)
            self._life.link.kill()

    async def _begin(self) -> None:
        self._life = Life(Link(self._target, self._options, self._received, self._ended))
        await self._life.link.start()

    def _received(self, link: Link, message: FromWorker) -> None:
        life = self._life
        if life is None or link is not life.link or self._stopping:
            return
        match message:
            case Loading(line):
                self._say(line)
            case Pong(number):
                if number == life.number:
                    life.asked = None
                    self.state = "ready" if self.state == "stalled" else self.state
            case Unready(text, exit_code):
                self._refused(text, exit_code)
            case Ready():
                life.ready, self.state = True, "ready"
                self._options = replace(self._options, before=self._options.before or message)
                self._owner.received(message)
                if self._started is not None and not self._started.done():
                    self._started.set_result(None)
            case _:
                self._owner.received(message)

    def _refused(self, text: str, exit_code: int) -> None:
        """The worker cannot serve its model, and ends: at the first start an error, later a death."""
        if self._started is not None and not self._started.done():
            self._started.set_exception((InputError if exit_code == 2 else FastgenError)(text))
        else:
            self._say(text)

    def _ended(self, link: Link, exit_code: int | None) -> None:
        if self._stopping or self._life is None or link is not self._life.link:
            return
        text = f"the worker ended with exit code {exit_code}"
        if self._started is not None and not self._started.done():
            self._started.set_exception(FastgenError(f"{self._options.name}: {text}"))
        if self.state == "starting":
            return
        self._say(text)
        now = time.monotonic()
        self._life = None
        self._deaths = [when for when in self._deaths if now - when < WINDOW_S] + [now]
        if len(self._deaths) >= DEATHS:
            self.state = "failed"
            self._say(f"{DEATHS} deaths without a picture between them: this model is given up")
            self._owner.died(again=False)
            return
        self.state = "restarting"
        backoff = 0.0 if len(self._deaths) < 2 else BACKOFF_S * 2 ** (len(self._deaths) - 2)
        self._restart_at = now + backoff
        self._owner.died(again=True)
        self._background(self._restart(backoff))

    async def _restart(self, backoff: float) -> None:
        await asyncio.sleep(backoff)
        await self._begin()

    async def _watch(self) -> None:
        """Ping the worker between its steps, and kill one that hangs."""
        while not self._stopping:
            await asyncio.sleep(PING_S)
            now, life = time.monotonic(), self._life
            if life is not None and life.ready:
                if life.asked is None:
                    life.number, life.asked = life.number + 1, now
                    life.link.send(Ping(life.number))
                silent, step = now - life.asked, self._owner.longest_step()
                if silent > max(ANSWER_S, STEPS * step) and self.state == "ready":
                    self.state = "stalled"
                if silent > max(HANG_S, 2 * STEPS * step):
                    self._say(f"the worker has not answered for {silent:.0f} s and is killed")
                    life.link.kill()
            self._owner.looked(now)

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
