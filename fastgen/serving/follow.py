"""Following a job: waiting for its end while the client is there, and its changes as server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, MutableMapping
from typing import Any

from fastgen.serving import answers
from fastgen.serving.interface import ModelView
from fastgen.serving.jobs import Job

KEEP_ALIVE_S = 15.0
SHORTEST_S = 0.1  # between two events of a job: the newest wins
SETTLE_S = 1.0  # how long a stream waits for its first news, so that a refusal has its own status
KEEP_ALIVE = b": keep-alive\n\n"

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


async def until_ended(job: Job, receive: Receive) -> bool:
    """Wait until the job has ended; False where the client left before."""
    return await while_connected(_ended(job), receive)


async def until_settled(job: Job, receive: Receive) -> bool:
    """Wait a moment until the job runs or has ended; False where the client left before."""
    return await while_connected(_settled(job), receive)


async def while_connected(work: Coroutine[Any, Any, None], receive: Receive) -> bool:
    """Do the work; False, and the work is cancelled, where the client leaves before it is done."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
            return True
        leaving.result()
        return False
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def stream_events(job: Job, view: ModelView) -> AsyncIterator[bytes]:
    """The job's images as OpenAI streams them: previews, then each image as it is done; at the end the error, if one failed."""
    previews, sent = [0] * len(job.images), set[int]()
    async for fresh in _changes(job):
        if not fresh:
            yield KEEP_ALIVE
        for index, image in enumerate(job.images):
            if image.preview is not None and image.previews > previews[index] and image.data is None:
                previews[index] = image.previews
                yield answers.partial_event(job, index, view)
            if image.data is not None and index not in sent:
                sent.add(index)
                yield answers.completed_event(job, index, view)
    if (error := answers.job_error(job)) is not None:
        yield answers.event("error", error.body())


async def watch_events(job: Job, view: ModelView) -> AsyncIterator[bytes]:
    """The job itself after every change, its previews, and its images; the present state first, `done` last."""
    previews, sent = [0] * len(job.images), set[int]()
    async for fresh in _changes(job):
        if not fresh:
            yield KEEP_ALIVE
            continue
        yield answers.event("job", answers.job_object(job, view))
        for index, image in enumerate(job.images):
            if image.preview is not None and image.previews > previews[index] and image.data is None:
                previews[index] = image.previews
                yield answers.preview_event(job, index)
            if image.data is not None and index not in sent:
                sent.add(index)
                yield answers.image_event(job, index, view)
        if not job.ended:
            await asyncio.sleep(SHORTEST_S)
    yield answers.event("done", answers.job_object(job, view))


async def _changes(job: Job) -> AsyncIterator[bool]:
    """True at first and after each change, until the job has ended; False where KEEP_ALIVE_S passed without one."""
    version, fresh = job.version, True
    while True:
        ended = job.ended
        yield fresh
        if ended:
            return
        try:
            async with asyncio.timeout(KEEP_ALIVE_S):  # Python 3.11's wait_for can lose a cancellation
                version = await job.changed(version)
            fresh = True
        except TimeoutError:
            fresh = False


async def _ended(job: Job) -> None:
    while not job.ended:
        await job.changed(job.version)


async def _settled(job: Job) -> None:
    try:
        async with asyncio.timeout(SETTLE_S):
            while not job.ended and not any(image.rows or image.data for image in job.images):
                await job.changed(job.version)
    except TimeoutError:
        pass


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
