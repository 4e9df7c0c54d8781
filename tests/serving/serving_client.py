"""A real server in a thread of the test, on a free port of 127.0.0.1, and a client of it."""

from __future__ import annotations

import asyncio
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

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


class Running(NamedTuple):
    """The fake service as a process of its own."""

    port: int
    process: subprocess.Popen[str]

    def rss(self) -> int:
        """Bytes of its memory."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * resource.getpagesize()

    def sockets(self) -> int:
        """Sockets that it has open."""
        links = Path(f"/proc/{self.process.pid}/fd").iterdir()
        return sum(1 for link in links if _target(link).startswith("socket:"))


@contextmanager
def running_server(*options: str) -> Iterator[Running]:
    """`python fake_service.py` on a free port, for the time of the block."""
    command = [
        sys.executable,
        str(Path(__file__).with_name("fake_service.py")),
        "--port",
        "0",
        "--row-s",
        "0",
        *options,
    ]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True)
        try:
            first = _first_line(log, process)
            port = int(first.rpartition(":")[2])
            wait_for(lambda: _connects(port))
            yield Running(port, process)
        finally:
            process.kill()
            process.wait(10)


def _first_line(log: IO[str], process: subprocess.Popen[str]) -> str:
    text = ""

    def come() -> bool:
        nonlocal text
        log.seek(0)
        text = log.read()
        assert process.poll() is None, text
        return "\n" in text

    wait_for(come, 30)
    return text.splitlines()[0]


def _connects(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:  # closed meanwhile
        return ""
