"""The life of a server: models start while it answers already, a signal lets it end what runs, a second one ends it at once."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from fastgen.serving.http import Server
from fastgen.serving.service import Service

SIGNALS = (signal.SIGTERM, signal.SIGINT)


async def serve(
    service: Service, server: Server, listener: socket.socket, *, drain_s: float, ready: Callable[[], None]
) -> None:
    """Serve until a signal comes. `ready` is called once, when all models are. Raises FastgenError for a model that cannot
    start.

    After the signal new requests are refused, and those that run have `drain_s` seconds to end; then the port is closed.
    """
    with _signals() as ending:
        serving = asyncio.ensure_future(server.serve(sockets=[listener]))
        starting, signalled = asyncio.ensure_future(service.start()), asyncio.ensure_future(ending.wait())
        try:
            await _first(serving, starting, signalled)
            if starting.done() and not signalled.done():
                starting.result()
                ready()
                await _first(serving, signalled)
            if signalled.done() and starting.done():
                await service.drain(drain_s)
        finally:
            for task in (starting, signalled):
                task.cancel()
            await service.stop()
            server.should_exit = True
            await serving


async def _first(*tasks: asyncio.Future[Any]) -> None:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


@contextmanager
def _signals() -> Iterator[asyncio.Event]:
    """An event that the first signal sets. A signal that the parent ignores, as a shell does in the background, stays so."""
    loop, ending = asyncio.get_running_loop(), asyncio.Event()
    came: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if len(came) > 1:
            for worker in multiprocessing.active_children():
                worker.kill()
            os._exit(128 + number)
        loop.call_soon_threadsafe(ending.set)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, end)
        yield ending
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
