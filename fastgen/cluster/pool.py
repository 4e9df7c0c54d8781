"""Workers on the machines of a Ray cluster, and the calls that wait for them. Any number of jobs share one pool.

A worker has two calls at a time, so that it never waits for the driver. When a worker dies, its calls are made again on other
workers. One of them may be the cause, so from then on each of them runs alone.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from fastgen.cluster.machines import Machines, Slot
from fastgen.cluster.worker import Opened, Refused, Worker, WorkerOptions
from fastgen.errors import FastgenError, Say, first_line
from fastgen.generate.job_record import Environment

IN_FLIGHT = 2  # calls of a worker at a time
DEATHS = 3  # of workers during a call, after which it is given up
UNREAD = 64  # replies that a job has not taken yet, after which it gets no more workers
LOOK_S = 0.1  # between two looks at new calls
NODES_S = 2.0  # between two looks at the machines of the cluster
SETTLE_S = 60.0  # after the first worker is ready, how long the others may take before the kind of machine is chosen
WAIT_SAY_S = 30.0  # without any worker, before the user is told


@dataclass
class Call:
    """A call of a worker's method. `replies`: where its result goes, as (call, result or Died or error). `most_deaths`: of
    workers during the call, after which it is given up. `first`: before calls that wait already."""

    method: str
    arguments: tuple[Any, ...]
    replies: queue.SimpleQueue[tuple[Call, Any]]
    tag: Any = None
    most_deaths: int = DEATHS
    first: bool = False
    deaths: int = 0


@dataclass(frozen=True)
class Died:
    """Instead of a result: `count` workers died during this call; `why`: what Ray says of the last one."""

    count: int
    why: str


@dataclass
class _Member:
    """A worker. `opening`: the reference to what it says of itself, until it is ready."""

    handle: Any
    node: str
    opening: Any
    environment: Environment | None = None
    calls: dict[Any, Call] = field(default_factory=dict)


class Pool:
    """Workers, as many as the cluster has room for: more when machines join, fewer when they are lost.

    `expected`: the kind of machine to use, None for the most common. Machines of another kind are left out, and `say` gets a
    line, unless `options.mixed`. `close` ends all workers. The methods raise FastgenError, and InputError where every machine
    refuses the model. `deaths`: of workers, so far.
    """

    def __init__(
        self,
        ray: Any,
        slot: Slot,
        options: WorkerOptions,
        *,
        expected: Environment | None = None,
        say: Say = lambda line: None,
    ) -> None:
        self._ray, self._slot, self._say = ray, slot, say
        self._machines = Machines(ray, slot, expected, options.mixed, say)
        self._sent = ray.put(options)
        self.deaths = 0
        self._members: list[_Member] = []
        self._calls: deque[Call] = deque()
        self._new: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._ready = threading.Event()
        self._error: BaseException | None = None
        self._closing = False
        self._looked = self._first_ready = self._told = 0.0
        self._since = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="pool", daemon=True)
        self._thread.start()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait(self) -> None:
        """Wait until the kind of machine is chosen, and a worker is ready."""
        while not self._ready.wait(LOOK_S):
            self._check()
        self._check()

    def put(self, value: Any) -> Any:
        """A reference to a value that calls can carry: it travels to each machine once."""
        return self._ray.put(value)

    def submit(self, call: Call) -> None:
        """Make a call when a worker is free; its reply comes to its queue."""
        self._new.put(call)

    def reply(self, replies: queue.SimpleQueue[tuple[Call, Any]]) -> tuple[Call, Any]:
        """The next reply of a queue; waits for it."""
        while True:
            try:
                call, result = replies.get(timeout=1.0)
            except queue.Empty:
                self._check()
                continue
            if isinstance(result, BaseException):
                raise result
            return call, result

    def close(self) -> None:
        """End all workers, also where calls are not done."""
        self._closing = True
        self._new.put(None)
        self._thread.join(timeout=30)
        for member in self._members:
            self._kill(member)
        self._members.clear()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
        if not self._thread.is_alive():
            raise FastgenError("--ray: the pool of workers has ended")

    def _run(self) -> None:
        try:
            while not self._closing:
                self._step()
        except FastgenError as error:
            self._error = error
        except BaseException as error:
            self._error = FastgenError(f"--ray: the connection to the cluster is lost: {first_line(error)}")

    def _step(self) -> None:
        now = time.monotonic()
        if now - self._looked >= NODES_S:
            self._looked = now
            self._start_workers()
            self._tell(now)
        if not self._ready.is_set():
            self._choose(now)
        self._assign()
        references = [ref for member in self._members for ref in ([member.opening] if member.opening else member.calls)]
        if not references or not any(member.calls or member.opening for member in self._members):
            self._take(LOOK_S)
            return
        done, _ = self._ray.wait(references, num_returns=len(references), timeout=0)
        if not done:
            done, _ = self._ray.wait(references, num_returns=1, timeout=LOOK_S)
        for reference in done:
            self._finish(reference)
        self._take(0)

    def _take(self, wait: float) -> None:
        """Take new calls; wait so many seconds for the first."""
        try:
            call = self._new.get(timeout=wait) if wait else self._new.get_nowait()
            while True:
                if call is not None:
                    (self._calls.appendleft if call.first else self._calls.append)(call)
                call = self._new.get_nowait()
        except queue.Empty:
            return

    def _start_workers(self) -> None:
        """Start a worker wherever one fits."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        room = self._machines.room()
        here = Counter(member.node for member in self._members)
        actor = self._ray.remote(Worker)
        for name, (count, takes) in room.items():
            for _ in range(count - here[name]):
                options: dict[str, Any] = {
                    **takes,
                    "max_concurrency": IN_FLIGHT,
                    "max_restarts": 0,
                    "max_task_retries": 0,
                }
                options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(name, soft=False)
                handle = actor.options(**options).remote(self._ray.get)
                self._members.append(_Member(handle, name, handle.open.remote(self._sent)))
        if not self._members:
            self._machines.check_left()

    def _tell(self, now: float) -> None:
        """Tell the user where nothing goes on."""
        if any(member.environment is not None for member in self._members):
            self._since = now
        elif now - self._since > WAIT_SAY_S and now - self._told > 4 * WAIT_SAY_S:
            self._told = now
            self._say(f"ray: waiting for a worker: {self._slot} of a machine must be free, and the model be loaded")

    def _choose(self, now: float) -> None:
        """Choose the kind of machine, once all workers are there or time is up."""
        opening = [member for member in self._members if member.opening is not None]
        found = [member.environment for member in self._members if member.environment is not None]
        if not found:
            return
        self._first_ready = self._first_ready or now
        if opening and now - self._first_ready < SETTLE_S:
            return
        self._machines.choose(found)
        for member in list(self._members):
            self._compare(member)
        if self._members:
            self._machines.begin()
            self._ready.set()

    def _compare(self, member: _Member) -> None:
        """Leave a machine of another kind out."""
        if member.environment is not None and (refused := self._machines.refusal(member.environment)) is not None:
            self._leave_out(member, refused)

    def _leave_out(self, member: _Member, refused: Refused) -> None:
        self._members.remove(member)
        self._kill(member)
        self._calls.extendleft(reversed(member.calls.values()))
        self._machines.leave_out(member.node, refused)

    def _assign(self) -> None:
        """Give calls to the workers that have the fewest. A call during which a worker died is alone on its worker."""
        if not self._ready.is_set():
            return
        free = [m for m in self._members if m.environment is not None and len(m.calls) < IN_FLIGHT]
        for depth in range(IN_FLIGHT):
            for member in free:
                if not self._calls:
                    return
                if len(member.calls) != depth or any(call.deaths for call in member.calls.values()):
                    continue
                if (self._calls[0].deaths and depth) or self._calls[0].replies.qsize() >= UNREAD:
                    continue
                call = self._calls.popleft()
                member.calls[getattr(member.handle, call.method).remote(*call.arguments)] = call

    def _finish(self, reference: Any) -> None:
        """Take the result of a call, or what a worker says of itself."""
        member = next((m for m in self._members if reference == m.opening or reference in m.calls), None)
        if member is None:
            return  # its worker has died, and its call is made again
        errors = self._ray.exceptions
        try:
            result = self._ray.get(reference)
        except errors.RayTaskError as error:
            cause = getattr(error, "cause", None) or error
            result = FastgenError(
                f"--ray: {self._machines.name(member.node)}: {type(cause).__name__}: {first_line(cause)}"
            )
            if reference == member.opening:
                raise result from None
        except errors.RayError as error:  # the worker is lost, or its machine, or what it returned
            self._buried(member, _reason(error))
            return
        if reference != member.opening:
            call = member.calls.pop(reference)
            call.replies.put((call, result))
            return
        member.opening = None
        if isinstance(result, Refused):
            self._leave_out(member, result)
            return
        assert isinstance(result, Opened)
        for line in result.said:
            self._say(f"ray: {self._machines.name(member.node)}: {line}")
        member.environment = result.environment
        self._machines.started()
        self._compare(member)

    def _buried(self, member: _Member, why: str) -> None:
        """A worker died. Its calls are made again, after all others: a random kill then seldom strikes the same call twice."""
        self.deaths += 1
        self._members.remove(member)
        self._kill(member)
        if not self._closing:
            again = "; what it had begun is made again" if member.calls else ""
            self._say(f"ray: {self._machines.name(member.node)}: a worker is lost: {why.rstrip('.')}{again}")
        if member.opening is not None:
            self._machines.died_at_start(member.node, why)
        for call in member.calls.values():
            call.deaths += 1
            if call.deaths >= call.most_deaths:
                call.replies.put((call, Died(call.deaths, why)))
            else:
                self._calls.append(call)

    def _kill(self, member: _Member) -> None:
        with suppress(self._ray.exceptions.RayError, ConnectionError, RuntimeError):  # it is dead, or so is the cluster
            self._ray.kill(member.handle, no_restart=True)


def _reason(error: Exception) -> str:
    """Why a worker died, of the many lines that Ray says."""
    text = str(error)
    if "No module named" in text:
        return f"{text[text.index('No module named') :].splitlines()[0]}; every machine needs fastgen and its engine"
    return first_line(error)
