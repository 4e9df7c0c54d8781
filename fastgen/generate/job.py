"""A job: a file of requests -> a folder of images with a manifest, resumable after a kill."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastgen.engines.batches import Batch, halved
from fastgen.errors import FastgenError, InputError, Say, first_line
from fastgen.generate.decoder import Pictures
from fastgen.generate.estimate import Estimate, automatic_batch_size, decode_batch_size, estimate
from fastgen.generate.job_folder import JobFolder
from fastgen.generate.job_parts import JobParts, new_run_id
from fastgen.generate.job_record import Limits, Timing, recorded_limits
from fastgen.generate.record import job_identity, manifest_line
from fastgen.generate.requests import Request
from fastgen.generate.run import Run
from fastgen.generate.runner import ModelRunner
from fastgen.generate.shards import Shard
from fastgen.generate.writer import StepBar, Writer, progress_bar

QUEUED = 2  # batches on a GPU at a time: one is sampled while the previous one is decoded


@dataclass(frozen=True)
class JobReport:
    """What a job did. `errors`: image_name -> why there is no file. `complete`: False while other shards are missing."""

    folder: Path
    images: int
    generated: int  # in this run; the others were there already
    seconds: float
    errors: dict[str, str]
    truncated: dict[str, int]  # prompt -> its number of tokens
    complete: bool = True


def run_job(
    run: Run,
    out: Path,
    *,
    batch_size: int | None = None,
    grid: int | None = None,
    shard: Shard | None = None,
    progress: bool = True,
    say: Say = lambda line: None,
) -> JobReport:
    """Generate every request's image below `out`; batches whose files all exist are skipped.

    Writes the PNGs, manifest.jsonl, job.json and contact_sheet.png. With a `shard`: only that part of the batches, and the
    files of the whole job when the last part is done. `batch_size`: by default what suits the engine and its memory; where
    memory runs out, the other batches run at half the size, and `say` gets a line. A run with a strip writes each image's
    denoising to strips/<image_name>. `grid`: columns of grid.png, which shows all images.
    Raises InputError when `out` is the folder of another job, and FastgenError when a file cannot be written or not even one
    image fits into memory; complete files stay.
    """
    start = time.perf_counter()
    folder = JobFolder.of(run, out, grid)
    limits, identity = _claim(run, folder, batch_size, shard)
    lines = [manifest_line(run, r, identity) for r in run.requests]
    batches = run.batches(limits.batch)
    part = batches if shard is None else shard.part(batches)
    parts = None if shard is None else JobParts.of(out, shard, identity, batches, lines)
    pending = [batch for batch in part if not folder.is_complete(batch, lines)]
    count = sum(map(len, pending))
    with progress_bar(count, progress, shard) as bar, Writer(_writers(run.pipeline)) as writer:
        advance = StepBar(bar, writer, len(run.table))
        for batch, pictures in _generated(run, pending, limits.decode, advance, say):
            folder.write(writer, batch, pictures, lines)
            advance.to(len(batch))
    errors = {line["image_name"]: line["error"] for line in lines if "error" in line}
    seconds = time.perf_counter() - start
    truncated = dict(run.conditions.truncated)
    runs = {new_run_id(): Timing(count, round(seconds, 3), min(map(len, pending)))} if pending else {}
    if parts is None:
        folder.finish(run.requests, lines, identity, runs)
        return JobReport(out, len(lines), count, seconds, errors, truncated)
    parts.save(runs)
    complete = merge(parts, folder, run.requests, identity, runs)
    return JobReport(out, len(parts.positions), count, seconds, errors, truncated, complete)


def merge(
    parts: JobParts,
    folder: JobFolder,
    requests: Sequence[Request],
    identity: dict[str, Any],
    runs: Mapping[str, Timing],
) -> bool:
    """Finish the job where all its parts are there, and say whether they are. `runs`: those of this process.

    Of several processes that do so at the same time, each that ends deletes the temporary files of those on other machines,
    which therefore try again.
    """
    for attempt in range(parts.shard.count + 1):
        lines = parts.whole()
        if lines is None:
            return False
        try:
            folder.finish(requests, lines, identity, runs)
            break
        except FastgenError:
            if attempt == parts.shard.count:
                raise
    return True


def estimate_job(run: Run, *, batch_size: int | None = None, shard: Shard | None = None) -> Estimate:
    """How long `run_job` with these arguments would take, and how much memory: measured, and nothing is written."""
    batches = run.batches(batch_size or automatic_batch_size(run.pipeline, run.settings))
    return estimate(run, batches if shard is None else shard.part(batches), decode_batch_size(run.pipeline))


def job_limits(run: Run, out: Path, batch_size: int | None) -> Limits:
    """`batch_size`, else that of the job in `out`, else what suits the engine and its memory."""
    recorded = recorded_limits(out)
    batch = batch_size or (recorded.batch if recorded else automatic_batch_size(run.pipeline, run.settings))
    return Limits(batch, recorded.decode if recorded and recorded.decode else decode_batch_size(run.pipeline))


def _claim(run: Run, folder: JobFolder, batch_size: int | None, shard: Shard | None) -> tuple[Limits, dict[str, Any]]:
    """Make the folder this job's, and return its limits and identity. If another shard does so while this one measures its
    memory, the other one's limits count. Shards share the batches out, so all of them need the same batch size."""
    options: dict[str, Any] = {"clean": shard is None, "extends": run.pipeline.spec.bundle_extends}
    options["any_batch_size"] = shard is None and run.pipeline.engine.batch_invariant
    while True:
        limits = job_limits(run, folder.out, batch_size)
        run.batches(limits.batch)  # refuses a size that the engine lacks before the folder is made
        identity = job_identity(run, limits.batch)
        if folder.claim(identity, limits, **options):
            return limits, identity


def _generated(
    run: Run,
    pending: Sequence[Batch],
    decode_batch_size: int | None,
    advance: StepBar,
    say: Say,
) -> Iterator[tuple[Batch, Pictures]]:
    """The pictures of all batches. On a GPU the next batch is queued before this waits for one; on a CPU `advance` is told of
    each row of the solver table."""
    queue: deque[tuple[Batch, Callable[[], Pictures]]] = deque()
    todo, pipeline = deque(pending), run.pipeline
    while todo or queue:
        out_of_memory = None
        try:
            while todo and len(queue) < (QUEUED if pipeline.on_gpu else 1):
                batch = todo[0]
                on_row = None if pipeline.on_gpu else partial(advance.step, len(batch))
                queue.append((batch, run.begin(batch, decode_batch_size=decode_batch_size, on_row=on_row)))
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
            todo = deque(_smaller(run, todo, out_of_memory, say))


def _smaller(run: Run, todo: Iterable[Batch], error: str, say: Say) -> list[Batch]:
    """The batches `todo` at half the size. `error`: the message when memory ran out."""
    device, sizes = run.pipeline.engine.device, run.pipeline.buckets(run.settings)
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


def _writers(pipeline: ModelRunner) -> int:
    """Threads that compress PNGs: on a CPU the networks need the cores."""
    return min(8, os.cpu_count() or 1) if pipeline.on_gpu else 1
