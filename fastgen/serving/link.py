"""A worker process and the connection to it, for a service on an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import msgspec

from fastgen.serving.messages import FromWorker, ToWorker, decode_from_worker, encode
from fastgen.serving.worker import WorkerOptions

Target = Callable[[Connection, WorkerOptions], None]
JOIN_S = 5.0


class Link:
    """One worker process. `on_message` and `on_end` are called on the event loop's thread; after `on_end(exit code)` comes
    nothing more. Sending never waits: a thread writes, another one reads."""

    def __init__(
        self,
        target: Target,
        options: WorkerOptions,
        on_message: Callable[[Link, FromWorker], None],
        on_end: Callable[[Link, int | None], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_message, self._on_end = on_message, on_end
        context = get_context("spawn")
        self._connection, self._theirs = context.Pipe()
        self._process = context.Process(
            target=target, args=(self._theirs, options), name=f"fastgen-{options.name}", daemon=True
        )
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    async def start(self) -> None:
        """Start the process; returns before it is ready."""
        await asyncio.to_thread(self._process.start)
        self._theirs.close()  # so that the end of the process is seen
        for work in (self._read, self._write):
            threading.Thread(target=work, daemon=True, name=f"{self._process.name}-{work.__name__}").start()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def send(self, message: ToWorker) -> None:
        self._outbox.put(encode(message))

    def kill(self) -> None:
        """End the process at once; `on_end` follows."""
        self._process.kill()

    def _read(self) -> None:
        try:
            while True:
                self._tell(self._on_message, decode_from_worker(self._connection.recv_bytes()))
        except (EOFError, OSError):
            pass  # the process has ended
        except msgspec.MsgspecError:
            self._process.kill()  # half a message of a process that was killed, or nonsense: it is of no more use
        self._outbox.put(None)
        self._process.join(JOIN_S)
        if self._process.exitcode is None:  # it closed the connection and lives on
            self._process.kill()
            self._process.join()
        self._tell(self._on_end, self._process.exitcode)

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # the process has ended; the reader tells
            while (data := self._outbox.get()) is not None:
                self._connection.send_bytes(data)

    def _tell(self, call: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(call, self, *arguments)
