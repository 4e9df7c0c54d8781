"""A job: a file of requests -> a folder of images with a manifest, resumable after a kill."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastgen import __version__
from fastgen.errors import FastgenError, InputError
from fastgen.images import png_bytes, problem, save_contact_sheet, to_uint8
from fastgen.jsonfiles import read_json, write_bytes, write_json
from fastgen.pipeline import Pipeline, PromptConditions, Settings, even_cuts
from fastgen.requests import CONTACT_SHEET, Request, resolve_seed, safe_path

MANIFEST, JOB = "manifest.jsonl", "job.json"


@dataclass(frozen=True)
class Report:
    """What a job did. `errors`: image_name -> why there is no file."""

    folder: Path
    images: int
    generated: int  # in this run; the others were there already
    seconds: float
    errors: dict[str, str]
    truncated: dict[str, int]  # prompt -> its number of tokens


def run_job(
    pipeline: Pipeline,
    requests: Sequence[Request],
    out: Path,
    settings: Settings,
    *,
    batch_size: int = 16,
    progress: bool = True,
) -> Report:
    """Generate every request's image below `out`, skipping batches whose files are all there.

    Writes the PNGs, manifest.jsonl, job.json and contact_sheet.png. Raises InputError when `out` holds another job, and
    FastgenError when a file cannot be written; whole files written before that stay.
    """
    start = time.perf_counter()
    cuts = list(even_cuts(len(requests), batch_size))
    table = pipeline.source.table(settings.solver)
    settings.check_interval(table)
    encoder = pipeline.encoder(requests, settings.guided)
    files = [safe_path(out, r.image_name) for r in requests]
    identity = _identity(pipeline, requests, settings, batch_size)
    _claim(out, files, identity)
    truncated = encoder.truncated if isinstance(encoder, PromptConditions) else {}
    lines = [_manifest_line(r, settings, identity, truncated) for r in requests]

    pending = [cut for cut in cuts if not all(f.exists() for f in files[cut])]
    errors: dict[str, str] = {}
    count = sum(cut.stop - cut.start for cut in pending)
    with _progress_bar(count, progress) as bar, _Writer() as writer:
        for cut in pending:
            advance = partial(_advance, bar, writer, (cut.stop - cut.start) / len(table))
            images = pipeline.sample_batch(requests[cut], encoder, table, settings, size=cuts[0].stop, on_step=advance)
            for line, file, image in zip(lines[cut], files[cut], images, strict=True):
                if why := problem(image):
                    errors[line["image_name"]] = line["error"] = why
                else:
                    writer.submit(file, image, line)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_bytes(out / MANIFEST, text.encode())
    done = [(f, r) for f, r in zip(files, requests, strict=True) if r.image_name not in errors]
    if done:
        captions = [r.prompt or ", ".join(r.labels or ()) for _, r in done]
        save_contact_sheet(out / CONTACT_SHEET, [f for f, _ in done], captions)
    report = Report(out, len(requests), count, time.perf_counter() - start, errors, truncated)
    _record(out, identity, report)
    return report


class _Writer:
    """Writes PNGs in the background while the next batch is sampled; an error surfaces at the next step, or at the end."""

    def __enter__(self) -> _Writer:
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._futures: list[Future[None]] = []
        return self

    def submit(self, file: Path, image: np.ndarray, metadata: dict[str, Any]) -> None:
        self._futures.append(self._pool.submit(_write_png, file, image, metadata))

    def raise_error(self) -> None:
        """Raise what went wrong with a file so far, if anything."""
        while self._futures and self._futures[0].done():
            self._futures.pop(0).result()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            for future in self._futures:
                future.result()


def _write_png(file: Path, image: np.ndarray, metadata: dict[str, Any]) -> None:
    _make_folder(file.parent)
    write_bytes(file, png_bytes(to_uint8(image[None])[0], metadata))


def _identity(pipeline: Pipeline, requests: Sequence[Request], settings: Settings, batch_size: int) -> dict[str, Any]:
    """Everything the pixels depend on: two runs with the same identity are one job."""
    rows = json.dumps([[r.image_name, r.prompt, r.labels, r.seed] for r in requests])
    return {
        "fastgen": __version__,
        "model_sha256": pipeline.spec.sha256,
        "requests_sha256": hashlib.sha256(rows.encode()).hexdigest(),
        "engine": pipeline.engine.name,
        "dtype": pipeline.engine.dtype,
        "device": pipeline.engine.device,
        "scheduler": settings.scheduler,
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
        "guidance_interval": None if settings.guidance_interval is None else list(settings.guidance_interval),
        "seed": settings.seed,
        "batch_size": min(batch_size, len(requests)),
    }


def _manifest_line(
    request: Request, settings: Settings, identity: dict[str, Any], truncated: dict[str, int]
) -> dict[str, Any]:
    line: dict[str, Any] = {"id": request.id, "image_name": request.image_name}
    if request.prompt is not None:
        line["prompt"] = request.prompt
        if request.prompt in truncated:
            line["truncated_from_tokens"] = truncated[request.prompt]
    else:
        line["labels"] = list(request.labels or ())
    line["seed"] = resolve_seed(request, settings.seed)
    shared = {k: v for k, v in identity.items() if k not in ("requests_sha256", "seed", "batch_size")}
    return line | shared


def _claim(out: Path, files: Sequence[Path], identity: dict[str, Any]) -> None:
    """Make `out` this job's folder, or refuse: it belongs to another job, or holds files that would be overwritten."""
    path = out / JOB
    for folder in (out, *out.parents):
        if os.path.lexists(folder) and not folder.is_dir():
            raise InputError(f"{folder}: is not a folder; choose another --out")
    if os.path.lexists(path):
        held = _read_record(path)["job"]
        for key, value in identity.items():
            if held.get(key) != value:
                raise InputError(
                    f"{out}: holds another job: {key} is {held.get(key)!r} there and {value!r} now; choose another --out"
                )
        for folder in {file.parent for file in files}:
            for leftover in folder.glob(".tmp-*"):  # of a process that was killed while writing
                leftover.unlink(missing_ok=True)
        return
    taken = [file for file in (*files, out / MANIFEST, out / CONTACT_SHEET) if os.path.lexists(file)]
    if taken:
        raise InputError(
            f"{out}: {len(taken)} of the files to write exist already, such as {taken[0].name}, but no {JOB}; "
            "choose another --out"
        )
    _make_folder(out)
    write_json(path, {"job": identity, "runs": []})


def _read_record(path: Path) -> dict[str, Any]:
    record = read_json(path)
    if not (isinstance(record, dict) and isinstance(record.get("job"), dict) and isinstance(record.get("runs"), list)):
        raise InputError(f"{path}: is not the record of a fastgen job; choose another --out")
    return record


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FastgenError(f"{folder}: the folder cannot be made: {error.strerror or error}") from None


def _record(out: Path, identity: dict[str, Any], report: Report) -> None:
    runs = _read_record(out / JOB)["runs"]
    if report.generated:
        runs.append({"images": report.generated, "seconds": round(report.seconds, 3)})
    write_json(out / JOB, {"job": identity, "runs": runs})


def _advance(bar: Any, writer: _Writer, share: float, *_: Any) -> None:
    writer.raise_error()
    if bar is not None:
        bar.update(min(share, bar.total - bar.n))


def _progress_bar(count: int, show: bool) -> AbstractContextManager[Any]:
    """A bar on stderr, or None where it is no terminal: importing tqdm takes a tenth of the time to a first small image."""
    if not (show and count and sys.stderr.isatty()):
        return nullcontext()
    from tqdm import tqdm

    layout = "{desc} {percentage:3.0f}%|{bar}| {n:.1f}/{total} [{elapsed}<{remaining}, {rate_fmt}]"
    return tqdm(total=count, desc="generating", unit="image", bar_format=layout)
