"""A job: a file of requests -> a folder of images with a manifest, resumable after a kill."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastgen.buckets import Batch, cut, halved
from fastgen.conditions import Conditions
from fastgen.errors import FastgenError, InputError, first_line
from fastgen.jobs.folder import MANIFEST, Limits, claim, extra_files, finish, held_limits
from fastgen.jobs.plan import Estimate, automatic_batch_size, decode_batch_size, estimate
from fastgen.jobs.record import job_identity, manifest_line, truncated_prompts
from fastgen.jobs.shards import Shard, save_part, whole_job
from fastgen.jobs.writing import StepBar, Writer, progress_bar
from fastgen.pictures import Pictures
from fastgen.pipeline import Pipeline
from fastgen.requests import Request, safe_path
from fastgen.retrieval import Index, Start, query
from fastgen.settings import Settings
from fastgen.strip_files import StripFiles
from fastgen.tables import SolverTable

QUEUED = 2  # batches on a GPU at a time: one is sampled while the one before it is decoded


@dataclass(frozen=True)
class Report:
    """What a job did. `errors`: image_name -> why there is no file. `complete`: False while other shards are missing."""

    folder: Path
    images: int
    generated: int  # in this run; the others were there already
    seconds: float
    errors: dict[str, str]
    truncated: dict[str, int]  # prompt -> its number of tokens
    complete: bool = True


def run_job(
    pipeline: Pipeline,
    requests: Sequence[Request],
    out: Path,
    settings: Settings,
    *,
    rag: Index | None = None,
    batch_size: int | None = None,
    strip: Sequence[int] | None = None,
    grid: int | None = None,
    shard: Shard | None = None,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Generate every request's image below `out`, skipping batches whose files are all there.

    Writes the PNGs, manifest.jsonl, job.json and contact_sheet.png; with a `shard` only that part of the batches, and what
    concerns the whole job when the last part is done. `rag`: the index that images start from, if `settings` say so.
    `batch_size` None: what suits the engine and its memory. Where memory runs out all the same, the rest runs in batches of
    half the size, and `say` is told. `strip`: training timesteps at which each image's denoising is shown in
    strips/<image_name>; `grid`: columns of grid.png, with all images.
    Raises InputError when `out` holds another job, and FastgenError when a file cannot be written or not even one image fits
    into memory; whole files written before that stay.
    """
    start = time.perf_counter()
    if rag is not None:
        rag.check(pipeline.spec)
    table = pipeline.source.table(settings.solver)
    settings.check_interval(table)
    encoder = pipeline.encoder(requests, settings.guided)
    files = [safe_path(out, r.image_name) for r in requests]
    strips = None if strip is None else StripFiles.plan_for(pipeline.spec, table, strip, out, files)
    own = [*files, *extra_files(out, files, strips, grid)]
    claimed = False
    while not claimed:  # again where another shard claims the folder while this one measures its memory
        limits = job_limits(pipeline, settings, out, batch_size)
        batches = cut(len(requests), limits.batch, pipeline.buckets(settings))
        identity = job_identity(pipeline, requests, settings, limits.batch, rag)
        claimed = claim(out, own, identity, limits, sweep=shard is None)
    start_from = pipeline.retrieve(requests, settings, rag)
    truncated = truncated_prompts(encoder)
    lines = [manifest_line(r, settings, identity, truncated, start_from) for r in requests]

    part = batches if shard is None else shard.part(batches)
    present = [f.exists() and (strips is None or strips.present(i)) for i, f in enumerate(files)]
    pending = [batch for batch in part if not all(present[batch.rows])]
    errors: dict[str, str] = {}
    count = sum(map(len, pending))
    with progress_bar(count, progress, shard) as bar, Writer(_writers(pipeline)) as writer:
        advance = StepBar(bar, writer, len(table))
        begin = partial(
            _begin, pipeline, requests, encoder, table, settings, start_from, advance, strips, limits.decode
        )
        for batch, pictures in _generated(pipeline, settings, pending, begin, say):
            rows = zip(lines[batch.rows], files[batch.rows], pictures.pixels, pictures.problems, strict=True)
            for line, file, pixels, problem in rows:
                if problem:
                    errors[line["image_name"]] = line["error"] = problem
                else:
                    writer.submit(file, pixels, line)
            if strips is not None:
                strips.submit(writer, batch, pictures, lines)
            advance.to(len(batch))
    seconds = time.perf_counter() - start
    run = {"images": count, "seconds": round(seconds, 3), "smallest_batch": min(map(len, pending))} if count else None
    if shard is None:
        finish(out, requests, files, lines, identity, [run] if run else [], grid, strips)
        return Report(out, len(requests), count, seconds, errors, truncated)
    positions = [i for batch in part for i in range(batch.start, batch.stop)]
    save_part(out, shard, [(i, lines[i]) for i in positions], run)
    with whole_job(out, shard) as collected:
        if collected is not None:
            all_lines = [line for _, line in collected.lines]
            finish(out, requests, files, all_lines, identity, collected.runs, grid, strips)
    return Report(out, len(positions), count, seconds, errors, truncated, (out / MANIFEST).exists())


def job_limits(pipeline: Pipeline, settings: Settings, out: Path, batch_size: int | None) -> Limits:
    """What was asked for, else what the job in `out` began with, else what suits the engine and its memory."""
    held = held_limits(out)
    batch = batch_size or (held.batch if held else automatic_batch_size(pipeline, settings))
    return Limits(batch, held.decode if held and held.decode else decode_batch_size(pipeline))


def estimate_job(
    pipeline: Pipeline,
    requests: Sequence[Request],
    settings: Settings,
    *,
    rag: Index | None = None,
    batch_size: int | None = None,
    shard: Shard | None = None,
) -> Estimate:
    """How long `run_job` with these arguments would take, and how much memory: measured, and nothing is written."""
    if rag is not None:
        rag.check(pipeline.spec)
    table = pipeline.source.table(settings.solver)
    settings.check_interval(table)
    pipeline.encoder(requests, settings.guided)  # refuses requests of the wrong kind
    texts = len({r.prompt for r in requests}) + (len({query(r, rag.text) for r in requests}) if rag else 0)
    limit = batch_size or automatic_batch_size(pipeline, settings)
    batches = cut(len(requests), limit, pipeline.buckets(settings))
    part = batches if shard is None else shard.part(batches)
    return estimate(pipeline, table, settings, part, texts, decode_batch_size(pipeline))


def _generated(
    pipeline: Pipeline,
    settings: Settings,
    pending: list[Batch],
    begin: Callable[[Batch], Callable[[], Pictures]],
    say: Callable[[str], None],
) -> Iterator[tuple[Batch, Pictures]]:
    """The pictures of all batches; on a GPU the next batch is queued before the one before it is waited for."""
    queue: deque[tuple[Batch, Callable[[], Pictures]]] = deque()
    todo = deque(pending)
    while todo or queue:
        short = None
        try:
            while todo and len(queue) < (QUEUED if pipeline.on_gpu else 1):
                queue.append((todo[0], begin(todo[0])))
                todo.popleft()
        except Exception as error:
            if not pipeline.engine.is_out_of_memory(error):
                raise
            short = first_line(error)  # the error itself and its causes hold on to the tensors of the failed batch
        if queue:
            batch, wait = queue.popleft()
            yield batch, wait()
        if short is not None and not queue:
            pipeline.free_memory()
            todo = deque(_smaller(pipeline, settings, todo, short, say))


def _smaller(
    pipeline: Pipeline, settings: Settings, todo: Iterable[Batch], error: str, say: Callable[[str], None]
) -> list[Batch]:
    """What is still to do, in batches of half the size. `error`: what was said when memory ran out."""
    device, sizes = pipeline.engine.device, pipeline.buckets(settings)
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


def _begin(
    pipeline: Pipeline,
    requests: Sequence[Request],
    encoder: Conditions,
    table: SolverTable,
    settings: Settings,
    start: Start | None,
    advance: StepBar,
    strips: StripFiles | None,
    decode: int | None,
    batch: Batch,
) -> Callable[[], Pictures]:
    """Start one batch; where that blocks, on a CPU, the bar follows its steps."""
    options: dict[str, Any] = {"bucket": batch.bucket, "strip": strips.plan if strips else None}
    options["decode_batch_size"] = decode
    options["on_step"] = None if pipeline.on_gpu else partial(advance.step, len(batch))
    return pipeline.start_batch(requests[batch.rows], encoder, table, settings, start, **options)


def _writers(pipeline: Pipeline) -> int:
    """Threads that compress PNGs: on a CPU the networks need the cores."""
    return min(8, os.cpu_count() or 1) if pipeline.on_gpu else 1
