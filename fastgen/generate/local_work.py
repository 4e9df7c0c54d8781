"""A job's pictures, made in this process."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from fastgen.engines.batches import Batch, halved
from fastgen.errors import FastgenError, InputError, Say, first_line
from fastgen.generate.decoder import Pictures
from fastgen.generate.job_record import Limits
from fastgen.generate.run import Run
from fastgen.generate.work import JobPlan, plan_of
from fastgen.generate.writer import StepBar

QUEUED = 2  # batches on a GPU at a time: one is sampled while the previous one is decoded


class LocalWork:
    """A `Work` on this machine. Where memory runs out, the other batches run at half the size."""

    def __init__(self, run: Run) -> None:
        self.run, self.requests = run, run.requests
        on_gpu = run.pipeline.on_gpu
        self.writers = min(8, os.cpu_count() or 1) if on_gpu else 1  # on a CPU the networks need the cores

    def plan(self, batch_size: int | None, recorded: Limits | None) -> JobPlan:
        """See `Work.plan`."""
        return plan_of(self.run, batch_size, recorded)

    def pictures(
        self, plan: JobPlan, pending: Sequence[Batch], advance: StepBar, say: Say
    ) -> Iterator[tuple[Batch, Pictures]]:
        """See `Work.pictures`. On a GPU the next batch is queued before this waits for one; on a CPU `advance` is told of each
        row of the solver table."""
        queue: deque[tuple[Batch, Callable[[], Pictures]]] = deque()
        run, pipeline, todo = self.run, self.run.pipeline, deque(pending)
        while todo or queue:
            out_of_memory = None
            try:
                while todo and len(queue) < (QUEUED if pipeline.on_gpu else 1):
                    batch = todo[0]
                    on_row = None if pipeline.on_gpu else partial(advance.step, len(batch))
                    queue.append((batch, run.begin(batch, decode_batch_size=plan.limits.decode, on_row=on_row)))
                    todo.popleft()
            except Exception as error:
                if not pipeline.engine.is_out_of_memory(error):
                    raise
                out_of_memory = first_line(error)  # the error itself keeps the tensors of the failed batch alive
            if queue:
                batch, wait = queue.popleft()
                yield batch, wait()
            if out_of_memory is not None and not queue:
                pipeline.free_memory()
                todo = deque(smaller(todo, plan.sizes, pipeline.engine.device, out_of_memory, say))


def smaller(todo: Iterable[Batch], sizes: Sequence[int] | None, device: str, error: str, say: Say) -> list[Batch]:
    """The batches `todo` at half the size of the first, where memory ran out with `error`. `sizes`: those of the engine. Raises
    FastgenError where there is no smaller size."""
    first, *rest = todo
    try:
        parts = halved(first, sizes)
        limit = max(part.bucket for part in parts)
        for batch in rest:
            parts += halved(batch, sizes) if batch.bucket > limit else [batch]
    except InputError as reason:
        raise FastgenError(f"{device}: out of memory with a batch of {first.bucket}, and {reason}: {error}") from None
    say(f"{device}: out of memory with a batch of {first.bucket}; going on with {limit}")
    return parts
