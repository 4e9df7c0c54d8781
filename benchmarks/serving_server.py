"""`fastgen serve` as a process, and what /proc says of it and its workers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from benchmarks.serving_client import call
from fastgen.errors import FastgenError

PROC = Path("/proc")
START_S, STOP_S = 300.0, 40.0


class Use(NamedTuple):
    """Of a process and its children."""

    rss_mib: float
    fds: int
    threads: int


class Server:
    """`with Server(model, "openvino", log) as server`: serves the model for that long on `port`. `name`, `info`: what
    /v1/models says of it, or of the first of two. Raises FastgenError where it does not become ready."""

    def __init__(self, model: Path, engine: str, log: Path, options: Sequence[str] = ()) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        words = ["serve", str(model), "--engine", engine, "--port", str(self.port), *options]
        self._command, self._log = [sys.executable, "-m", "fastgen", *words], log

    def __enter__(self) -> Server:
        start = time.monotonic()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        try:
            while not self.ready():
                if self._process.poll() is not None or time.monotonic() - start > START_S:
                    raise FastgenError(f"{' '.join(self._command)}: not ready; see {self._log}")
                time.sleep(0.05)
            self.start_s = time.monotonic() - start
            first = json.loads(self.get("/v1/models")[1])["data"][0]
            self.name: str = first["id"]
            self.info: dict[str, Any] = first["fastgen"]
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self.exit_code = self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            if kind is None:
                raise FastgenError(f"fastgen serve did not end within {STOP_S:.0f} s of SIGTERM") from None

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and content."""
        answer = asyncio.run(call(self.port, "GET", path))
        return answer.status, answer.content

    def ready(self) -> bool:
        try:
            return self.get("/health/ready")[0] == 200
        except OSError:
            return False

    def workers(self) -> list[int]:
        """The processes that run a model."""
        found = [pid for pid in _children(self._process.pid) if b"spawn_main" in _read(pid, "cmdline")]
        return [pid for pid in found if _stat(pid)[:1] != [b"Z"]]

    def use(self) -> Use:
        rss = fds = threads = 0
        for pid in (self._process.pid, *self.workers()):
            status = dict(line.split(":\t", 1) for line in _read(pid, "status").decode().splitlines() if ":\t" in line)
            rss += int(status["VmRSS"].split()[0])
            threads += int(status["Threads"])
            fds += len(os.listdir(PROC / str(pid) / "fd"))
        return Use(rss / 1024, fds, threads)


def _children(pid: int) -> Iterator[int]:
    """All descendants."""
    for other in (int(folder.name) for folder in PROC.iterdir() if folder.name.isdigit()):
        if _stat(other)[1:2] == [b"%d" % pid]:
            yield other
            yield from _children(other)


def _stat(pid: int) -> list[bytes]:
    """State, parent, ... of a process; empty when it has ended."""
    return _read(pid, "stat").rpartition(b")")[2].split()


def _read(pid: int, name: str) -> bytes:
    """A file of a process in /proc; empty when the process has ended."""
    try:
        return (PROC / str(pid) / name).read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""
