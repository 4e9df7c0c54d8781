"""A cluster of Ray in this process: its machines and workers can be killed, and every call can be made to fail."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any


class RayError(Exception):
    pass


class RayActorError(RayError):
    pass


class RayTaskError(RayError):
    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause


class DieError(BaseException):
    """Raised by a worker's method: the worker is dead."""


class Actor:
    """A worker, in threads; its methods are called as `actor.method.remote(...)`."""

    def __init__(self, ray: FakeRay, node: str, instance: Any, threads: int) -> None:
        self._ray, self._instance = ray, instance
        self._pool, self._lock = ThreadPoolExecutor(threads), threading.Lock()
        self._waiting: set[Future[Any]] = set()
        self.node, self.alive = node, True

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: self._call(name, arguments))

    def _call(self, name: str, arguments: Sequence[Any]) -> Future[Any]:
        reference: Future[Any] = Future()
        with self._lock:
            if not self.alive:
                reference.set_exception(RayActorError("The actor is dead."))
                return reference
            self._waiting.add(reference)
        self._pool.submit(self._work, reference, name, [self._ray.resolved(value) for value in arguments])
        return reference

    def _work(self, reference: Future[Any], name: str, arguments: Sequence[Any]) -> None:
        try:
            result, error = getattr(self._instance, name)(*arguments), None
        except DieError:
            self.die("The actor died unexpectedly.")
            return
        except Exception as problem:
            result, error = None, RayTaskError(problem)
        with self._lock:
            if reference not in self._waiting:
                return
            self._waiting.remove(reference)
        if error is None:
            reference.set_result(result)
        else:
            reference.set_exception(error)

    def die(self, why: str) -> None:
        with self._lock:
            self.alive = False
            lost, self._waiting = self._waiting, set()
        for reference in lost:
            reference.set_exception(RayActorError(why))


class FakeRay:
    """The parts of the module `ray` that a pool uses. `nodes_`: name -> resources; `worker(get, node)` makes a worker."""

    exceptions = SimpleNamespace(
        RayError=RayError,
        RayTaskError=RayTaskError,
    )

    def __init__(self, nodes: dict[str, dict[str, float]], worker: Callable[[Callable[[Any], Any], str], Any]) -> None:
        self.machines, self._worker = dict(nodes), worker
        self.actors: list[Actor] = []
        self._objects: dict[str, Any] = {}
        self._names = (f"ref-{i}" for i in itertools.count())

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {
                "NodeID": name.encode().hex().ljust(56, "0"),
                "Alive": True,
                "Resources": resources,
                "NodeManagerAddress": name,
            }
            for name, resources in self.machines.items()
        ]

    def lose(self, node: str) -> None:
        """A machine is gone, with its workers."""
        del self.machines[node]
        for actor in self.actors:
            if actor.node == node and actor.alive:
                actor.die("The actor died because its node has died.")

    def put(self, value: Any) -> str:
        name = next(self._names)
        self._objects[name] = value
        return name

    def resolved(self, value: Any) -> Any:
        """Arguments of a call that are references are passed as their values."""
        return self._objects.get(value, value) if isinstance(value, str) else value

    def get(self, reference: Any) -> Any:
        return reference.result() if isinstance(reference, Future) else self._objects[reference]

    def wait(self, references: Sequence[Any], *, num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        until = time.monotonic() + timeout
        while True:
            done = [reference for reference in references if reference.done()][:num_returns]
            if done or time.monotonic() >= until:
                return done, [reference for reference in references if reference not in done]
            time.sleep(0.002)

    def remote(self, kind: type) -> Any:
        def options(**settings: Any) -> Any:
            node = bytes.fromhex(settings["scheduling_strategy"].node_id).rstrip(b"\0").decode()

            def start(get: Callable[[Any], Any]) -> Actor:
                actor = Actor(self, node, self._worker(get, node), settings["max_concurrency"])
                self.actors.append(actor)
                return actor

            return SimpleNamespace(remote=start)

        return SimpleNamespace(options=options)

    def kill(self, actor: Actor, *, no_restart: bool) -> None:
        actor.die("The actor was killed.")
