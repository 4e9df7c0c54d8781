"""A bounded client of `fastgen serve` on this machine: requests at given times, or from clients that wait for their answers."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import itertools
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Body = dict[str, Any]
MOST = 1000  # requests under way
TIMEOUT_S = 120.0  # of a request: one that takes longer hangs
FAILURES = (OSError, TimeoutError, asyncio.IncompleteReadError, ValueError)


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    content: bytes


@dataclass(frozen=True)
class Reply:
    """What became of a request. `status`: 0 without an answer, -1 if the client left. `digests`: SHA-256 of each picture."""

    body: Body
    status: int
    latency_s: float
    ended: float  # time.monotonic()
    digests: tuple[str, ...] = ()
    queue_s: float = 0.0  # of the picture that waited longest
    error: str | None = None
    headers: dict[str, str] = field(default_factory=dict)


async def call(port: int, method: str, path: str, body: Body | None = None) -> Answer:
    """One request on a connection of its own. Raises OSError, TimeoutError and ValueError."""
    content = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    async with asyncio.timeout(TIMEOUT_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(head.encode() + content)
            await writer.drain()
            lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines[1:] if line)}
            return Answer(int(lines[0].split()[1]), headers, await reader.readexactly(int(headers["content-length"])))
        finally:
            writer.close()


async def generate(port: int, body: Body, leave_after_s: float | None = None) -> Reply:
    """Ask for pictures; with `leave_after_s`, close the connection then."""
    start = time.monotonic()
    try:
        async with asyncio.timeout(leave_after_s):
            answer = await call(port, "POST", "/v1/images/generations", body)
    except FAILURES as error:
        ended = time.monotonic()
        left = leave_after_s is not None and ended - start >= leave_after_s
        return Reply(body, -1 if left else 0, ended - start, ended, error=f"{type(error).__name__}: {error}")
    ended = time.monotonic()
    value = json.loads(answer.content)
    pictures = value.get("data", [])
    digests = tuple(digest(base64.b64decode(picture["b64_json"])) for picture in pictures)
    queue_s = max((picture["fastgen"]["queue_s"] for picture in pictures), default=0.0)
    code = value["error"]["code"] if "error" in value else None
    return Reply(body, answer.status, ended - start, ended, digests, queue_s, code, answer.headers)


async def open_loop(
    port: int, load: Iterable[tuple[float, Body]], leave_after_s: Sequence[float | None] = (None,)
) -> list[Reply]:
    """Send each request at its second, whether or not earlier ones are answered; `leave_after_s` is repeated over them. Raises
    RuntimeError where more than MOST are under way."""
    start, tasks = time.monotonic(), list[asyncio.Task[Reply]]()
    for (at, body), leave in zip(load, itertools.cycle(leave_after_s), strict=False):
        await asyncio.sleep(start + at - time.monotonic())
        if sum(not task.done() for task in tasks) >= MOST:
            raise RuntimeError(f"more than {MOST} requests are under way")
        tasks.append(asyncio.create_task(generate(port, body, leave)))
    return list(await asyncio.gather(*tasks))


async def closed_loop(port: int, bodies: Iterable[Body], clients: int) -> list[Reply]:
    """So many clients, each of which sends its next request when the last one is answered, or after the Retry-After of a
    refusal."""
    todo, replies = iter(bodies), list[Reply]()

    async def client() -> None:
        for body in todo:
            replies.append(reply := await generate(port, body))
            if "retry-after" in reply.headers:
                await asyncio.sleep(float(reply.headers["retry-after"]))

    await asyncio.gather(*(client() for _ in range(clients)))
    return replies


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
