"""A job's pictures, made by a pool of workers."""

from __future__ import annotations

import queue
import secrets
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fastgen.cluster.pool import Call, Died, Pool
from fastgen.cluster.worker import OutOfMemory, Refused
from fastgen.engines.batches import Batch, halved
from fastgen.errors import FastgenError, InputError, Say
from fastgen.generate.job_record import Limits
from fastgen.generate.recipe import Recipe
from fastgen.generate.work import Files, JobPlan

if TYPE_CHECKING:
    from fastgen.generate.writer import StepBar

PLANNING_DEATHS = 10  # of workers: a plan is quick, and seldom what kills one
WRITERS = 4  # threads that write files: they come compressed


class PoolWork:
    """A `generate.work.Work` on the workers of a pool: the run that `recipe` makes there."""

    writers = WRITERS

    def __init__(self, pool: Pool, recipe: Recipe) -> None:
        self._pool, self.requests = pool, recipe.requests
        self._key, self._recipe = secrets.token_hex(8), [pool.put(recipe)]

    def plan(self, batch_size: int | None, recorded: Limits | None) -> JobPlan:
        """See `Work.plan`; a worker makes it."""
        self._pool.wait()
        replies: queue.SimpleQueue[tuple[Call, Any]] = queue.SimpleQueue()
        arguments = self._key, self._recipe, batch_size, recorded
        self._pool.submit(Call("plan", arguments, replies, most_deaths=PLANNING_DEATHS, first=True))
        _, plan = self._pool.reply(replies)
        if isinstance(plan, Died):
            raise FastgenError(f"--ray: {plan.count} workers died while they planned the job: {plan.why}")
        return _checked(plan)

    def pictures(
        self, plan: JobPlan, pending: Sequence[Batch], advance: StepBar, say: Say
    ) -> Iterator[tuple[Batch, Files]]:
        """See `Work.pictures`. A batch with which three workers died, or memory ran out, is made in halves; a single image with
        which three died has an error, and the job goes on."""
        replies: queue.SimpleQueue[tuple[Call, Any]] = queue.SimpleQueue()
        waiting = 0
        todo = list(pending)
        while todo or waiting:
            for batch in todo:
                call = Call("make", (self._key, self._recipe, batch, plan.limits), replies, batch)
                self._pool.submit(call)
                waiting += 1
            todo = []
            call, result = self._pool.reply(replies)
            waiting -= 1
            batch = call.tag
            if isinstance(result, Died):
                parts = _halves(batch, plan.sizes)
                if parts is None:
                    text = f"{result.count} workers died with this image: {result.why}"
                    yield batch, Files([None] * len(batch), [text] * len(batch))
                    continue
                say(
                    f"ray: {result.count} workers died with a batch of {len(batch)}; it is made in batches of {len(parts[0])}"
                )
                todo = parts
            elif isinstance(result, OutOfMemory):
                parts = _halves(batch, plan.sizes)
                if parts is None:
                    raise FastgenError(f"--ray: out of memory with a batch of {batch.bucket}: {result.text}")
                say(f"ray: out of memory with a batch of {batch.bucket}; it is made in batches of {parts[0].bucket}")
                todo = parts
            else:
                yield batch, _checked(result)


def _halves(batch: Batch, sizes: Sequence[int] | None) -> list[Batch] | None:
    """The batch in two or more; None where there is no smaller size, or one image."""
    if len(batch) == 1:
        return None
    try:
        return halved(batch, sizes)
    except InputError:
        return None


def _checked(result: Any) -> Any:
    """A worker's result. Raises its error where it refuses."""
    if isinstance(result, Refused):
        kind = InputError if result.exit_code == InputError.exit_code else FastgenError
        raise kind(result.text)
    return result
