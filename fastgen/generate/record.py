"""The records of a job and of each image: everything that the pixels depend on."""

from __future__ import annotations

from typing import Any

from fastgen import __version__
from fastgen.files.hashes import sha256_json
from fastgen.generate.job_record import BUNDLE
from fastgen.generate.requests import Request, resolve_seed
from fastgen.generate.run import Run
from fastgen.generate.start import NO_START


def job_identity(run: Run, limit: int) -> dict[str, Any]:
    """Everything that the pixels depend on, for batches of at most `limit`. Runs with the same identity are one job."""
    spec, engine, settings = run.pipeline.spec, run.pipeline.engine, run.settings
    identity = {
        "fastgen": __version__,
        "model_sha256": spec.sha256,
        "checkpoint": spec.checkpoint,
        "requests_sha256": sha256_json([[r.image_name, r.prompt, r.labels, r.seed] for r in run.requests]),
        "engine": engine.name,
        "dtype": engine.dtype,
        "device": engine.device.partition(":")[0],
        "scheduler": settings.scheduler,
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
        "guidance_interval": None if settings.guidance_interval is None else list(settings.guidance_interval),
        "normalize": settings.normalize,
        "seed": settings.seed,
        "batch_size": min(limit, len(run.requests)),
        **NO_START,
        "noise_steps": settings.noise_steps,
    }
    if settings.cache_interval > 1:  # without it the job is that of an older version
        identity["cache_interval"] = settings.cache_interval
    if spec.bundle_sha256 is not None:
        identity[BUNDLE] = spec.bundle_sha256
    return identity if run.start is None else identity | dict(run.start.identity)


def manifest_line(run: Run, request: Request, identity: dict[str, Any]) -> dict[str, Any]:
    """An image's line in the manifest, which is also its PNG's metadata: the request, and how the image is made."""
    line: dict[str, Any] = {"id": request.id, "image_name": request.image_name}
    if request.prompt is not None:
        line["prompt"] = request.prompt
        if request.prompt in run.conditions.truncated:
            line["truncated_from_tokens"] = run.conditions.truncated[request.prompt]
    else:
        line["labels"] = list(request.labels or ())
    line["seed"] = resolve_seed(request, run.settings.seed)
    omit = {"requests_sha256", "queries_sha256", "seed", "batch_size", *(NO_START if run.start is None else ())}
    line |= {k: v for k, v in identity.items() if k not in omit}
    return line if run.start is None else line | dict(run.start.record(request))
