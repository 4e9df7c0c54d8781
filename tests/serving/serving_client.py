"""A real server in a thread of the test, on a free port of 127.0.0.1, and a client of it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx

from fastgen.serving import http
from fastgen.serving.app import create_app
from fastgen.serving.security import Policy


def wait_for(condition: Callable[[], object], seconds: float = 10) -> None:
    """Return once the condition holds; fail where it does not within the time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.005)


class Client(httpx.Client):
    """`with Client(service) as client`: serves for that long. `lines`: the log. `call`: run on the server's loop."""

    def __init__(self, service: Any, policy: Policy | None = None, page: bytes | None = None) -> None:
        self.lines: list[str] = []
        self._listener = http.bind("127.0.0.1", 0)
        self.port = self._listener.getsockname()[1]
        self._app = create_app(service, policy or Policy(), page, self.lines.append)
        self.loop = asyncio.new_event_loop()
        super().__init__(base_url=f"http://127.0.0.1:{self.port}", timeout=30, trust_env=False)

    def __enter__(self) -> Client:
        self.server = http.create_server(self._app)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        while not self.server.started:
            self._thread.join(0.01)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()

    def call(self, function: Any, *arguments: Any) -> Any:
        """The function's result, called on the server's thread."""

        async def run() -> Any:
            return function(*arguments)

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(10)

    def _serve(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_until_complete(self.server.serve(sockets=[self._listener]))
        self.loop.close()
