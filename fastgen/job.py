"""A job: a file of requests -> a folder of images with a manifest, resumable after a kill."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastgen import __version__
from fastgen.errors import InputError
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
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}, expected at least 1")
    table = pipeline.source.table(settings.solver)
    encoder = pipeline.encoder(requests, settings.guided)
    files = [safe_path(out, r.image_name) for r in requests]
    identity = _identity(pipeline, requests, settings, batch_size)
    _claim(out, files, identity)
    truncated = encoder.truncated if isinstance(encoder, PromptConditions) else {}
    lines = [_manifest_line(r, settings, identity, truncated) for r in requests]

    cuts = list(even_cuts(len(requests), batch_size))
    pending = [cut for cut in cuts if not all(f.exists() for f in files[cut])]
    errors: dict[str, str] = {}
    count = sum(cut.stop - cut.start for cut in pending)
    with _progress_bar(count, progress) as bar, _Writer() as writer:
        for cut in pending:
            batch = list(requests[cut])
            if pipeline.engine.static_shapes:
                batch += [batch[-1]] * (cuts[0].stop - len(batch))
            advance = partial(_advance, bar, (cut.stop - cut.start) / len(table))
            images = pipeline.sample_batch(batch, encoder, table, settings, on_step=advance)
            for line, file, image in zip(lines[cut], files[cut], images, strict=False):
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
    """Writes PNGs in the background while the next batch is sampled; errors surface at the next submit or at the end."""

    def __enter__(self) -> _Writer:
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._futures: list[Future[None]] = []
        return self

    def submit(self, file: Path, image: np.ndarray, metadata: dict[str, Any]) -> None:
        for future in [f for f in self._futures if f.done()]:
            self._futures.remove(future)
            future.result()
        self._futures.append(self._pool.submit(_write_png, file, image, metadata))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            for future in self._futures:
                future.result()


def _write_png(file: Path, image: np.ndarray, metadata: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
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
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file, expected an output folder")
    if path.is_file():
        held = read_json(path)
        held = held.get("job", {}) if isinstance(held, dict) else {}
        for key, value in identity.items():
            if held.get(key) != value:
                raise InputError(
                    f"{out}: holds another job: {key} is {held.get(key)!r} there and {value!r} now; choose another --out"
                )
        return
    taken = [file for file in files if file.exists()]
    if taken:
        raise InputError(
            f"{out}: {len(taken)} of the images exist already, such as {taken[0].name}, but no {JOB}; choose another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, {"job": identity, "runs": []})


def _record(out: Path, identity: dict[str, Any], report: Report) -> None:
    runs = read_json(out / JOB).get("runs", [])
    if report.generated:
        runs.append({"images": report.generated, "seconds": round(report.seconds, 3)})
    write_json(out / JOB, {"job": identity, "runs": runs})


def _advance(bar: Any, share: float, *_: Any) -> None:
    bar.update(min(share, bar.total - bar.n))


def _progress_bar(count: int, show: bool) -> Any:
    from tqdm import tqdm

    layout = "{desc} {percentage:3.0f}%|{bar}| {n:.1f}/{total} [{elapsed}<{remaining}, {rate_fmt}]"
    return tqdm(total=count, desc="generating", unit="image", bar_format=layout, disable=not show or count == 0)
