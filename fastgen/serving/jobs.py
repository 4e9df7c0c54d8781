"""A job of the server: the images of one request, how far they are, and who waits for them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, Literal

from fastgen.serving.errors import ApiError
from fastgen.serving.messages import ImageTask

Phase = Literal["waiting", "running", "done", "failed", "cancelled"]


@dataclass(frozen=True)
class GenerationRequest:
    """A request whose fields have been checked one by one. `task`: of its first image; the others have the seeds seed + 1, ...
    `key`: of the fair share. `detached`: goes on when the client leaves. `deadline_s`: from its arrival."""

    model: str
    task: ImageTask
    n: int = 1
    key: str = ""
    deadline_s: float | None = None
    detached: bool = False


@dataclass
class JobImage:
    """One image of a job. `row` of `rows` evaluations have run; `preview`: the newest, `previews` of them so far."""

    seed: int
    phase: Phase = "waiting"
    row: int = 0
    rows: int = 0  # 0: not known yet
    previews: int = 0
    preview: bytes | None = None
    preview_row: int = 0
    data: bytes | None = None  # the finished file
    line: dict[str, Any] | None = None  # its manifest line
    queue_s: float = 0.0
    run_s: float = 0.0
    tokens: int | None = None  # of a prompt that was truncated
    error: ApiError | None = None

    @property
    def ended(self) -> bool:
        return self.phase in ("done", "failed", "cancelled")


@dataclass
class Job:
    """The images of one request. Whoever follows it waits for `changed` and compares what it knows with the images.

    `ahead`: images that wait before its first one; `wait_s`: estimated seconds until all are done; None: not known."""

    id: str
    request: GenerationRequest
    images: list[JobImage]
    created: int  # Unix time, s
    arrival: float  # time.monotonic(), as the next
    ended_at: float = 0.0
    ahead: int | None = None
    wait_s: float | None = None
    version: int = 0
    _waiters: set[asyncio.Future[None]] = field(default_factory=set, repr=False)

    @property
    def ended(self) -> bool:
        return all(image.ended for image in self.images)

    def touch(self) -> None:
        """Something about the job has changed: wake all that follow it."""
        self.version += 1
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    async def changed(self, version: int) -> int:
        """Wait until `self.version` is another than `version`, and return it."""
        while self.version == version:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.add(waiter)
            try:
                await waiter
            finally:
                self._waiters.discard(waiter)
        return self.version
