"""A job: a file of requests -> a folder of images with a manifest, resumable after a kill."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgen.errors import FastgenError, Say
from fastgen.files.bucket import store_of
from fastgen.files.places import Url
from fastgen.files.store import Store
from fastgen.generate.estimate import Estimate, automatic_batch_size, decode_batch_size, estimate
from fastgen.generate.job_folder import JobFolder
from fastgen.generate.job_parts import JobParts, new_run_id
from fastgen.generate.job_record import Timing, recorded_limits
from fastgen.generate.local_work import LocalWork
from fastgen.generate.requests import Request
from fastgen.generate.run import Run
from fastgen.generate.shards import Shard
from fastgen.generate.work import JobPlan, Work
from fastgen.generate.writer import StepBar, Writer, progress_bar


@dataclass(frozen=True)
class JobReport:
    """What a job did. `errors`: image_name -> why there is no file. `complete`: False while other shards are missing."""

    folder: Path | Url
    images: int
    generated: int  # in this run; the others were there already
    seconds: float
    errors: dict[str, str]
    truncated: dict[str, int]  # prompt -> its number of tokens
    complete: bool = True


def run_job(run: Run, out: Path | Url, **options: Any) -> JobReport:
    """Generate a run's images in this process; `options`: of `run_work`. Where memory runs out, the other batches run at half
    the size, and `say` gets a line."""
    return run_work(LocalWork(run), out, **options)


def run_work(
    work: Work,
    out: Path | Url,
    *,
    batch_size: int | None = None,
    grid: int | None = None,
    shard: Shard | None = None,
    progress: bool = True,
    say: Say = lambda line: None,
) -> JobReport:
    """Generate every request's image below `out`; batches whose files all exist are skipped.

    Writes the PNGs, manifest.jsonl, job.json and contact_sheet.png. With a `shard`: only that part of the batches, and the
    files of the whole job when the last part is done. `batch_size`: by default what suits the engine and its memory. A run with
    a strip writes each image's denoising to strips/<image_name>. `grid`: columns of grid.png, which shows all images.
    Raises InputError when `out` is the folder of another job, and FastgenError when a file cannot be written or not even one
    image fits into memory; complete files stay.
    """
    start = time.perf_counter()
    plan, folder = _claim(work, store_of(out), grid, batch_size, shard)
    lines, batches = plan.lines, plan.batches
    part = batches if shard is None else shard.part(batches)
    parts = None if shard is None else JobParts.of(folder.store, shard, plan.identity, batches, lines)
    pending = folder.pending(part, lines, mixed=plan.mixed)
    count = sum(map(len, pending))
    with progress_bar(count, progress, shard) as bar, Writer(folder.store, work.writers) as writer:
        advance = StepBar(bar, writer, plan.steps)
        for batch, pictures in work.pictures(plan, pending, advance, say):
            folder.write(writer, batch, pictures, lines)
            advance.to(len(batch))
    errors = {line["image_name"]: line["error"] for line in lines if "error" in line}
    seconds = time.perf_counter() - start
    runs = {new_run_id(): Timing(count, round(seconds, 3), min(map(len, pending)))} if pending else {}
    if parts is None:
        folder.finish(work.requests, lines, plan.identity, runs)
        return JobReport(out, len(lines), count, seconds, errors, plan.truncated)
    parts.save(runs)
    complete = merge(parts, folder, work.requests, plan.identity, runs)
    return JobReport(out, len(parts.positions), count, seconds, errors, plan.truncated, complete)


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


def _claim(
    work: Work, store: Store, grid: int | None, batch_size: int | None, shard: Shard | None
) -> tuple[JobPlan, JobFolder]:
    """Make the folder this job's. If another shard does so while this one measures its memory, the other one's limits count.
    Shards share the batches out, so all of them need the same batch size."""
    while True:
        plan = work.plan(batch_size, recorded_limits(store))
        folder = JobFolder.of(work.requests, store, plan.strip, grid)
        options: dict[str, Any] = {"clean": shard is None, "extends": plan.extends, "environment": plan.environment}
        options["any_batch_size"] = shard is None and plan.any_batch_size
        if folder.claim(plan.identity, plan.limits, **options):
            return plan, folder
