"""What is recorded of a job and of each image: everything that its pixels depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from fastgen import __version__
from fastgen.conditions import Conditions, PromptConditions
from fastgen.pipeline import Pipeline
from fastgen.requests import Request, resolve_seed
from fastgen.retrieval import Index, Start, query
from fastgen.settings import Settings

RAG = ("rag_sha256", "noise_steps", "rag_top_k")  # of images that start from training images


def job_identity(
    pipeline: Pipeline, requests: Sequence[Request], settings: Settings, limit: int, rag: Index | None
) -> dict[str, Any]:
    """Everything the pixels depend on: two runs with the same identity are one job."""
    rows = [[r.image_name, r.prompt, r.labels, r.seed] for r in requests]
    texts = None if rag is None else [query(r, rag.text) for r in requests]
    return {
        "fastgen": __version__,
        "model_sha256": pipeline.spec.sha256,
        "checkpoint": pipeline.spec.checkpoint,
        "requests_sha256": _sha256(rows),
        "engine": pipeline.engine.name,
        "dtype": pipeline.engine.dtype,
        "device": pipeline.engine.device.partition(":")[0],
        "scheduler": settings.scheduler,
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
        "guidance_interval": None if settings.guidance_interval is None else list(settings.guidance_interval),
        "normalize": settings.normalize,
        "seed": settings.seed,
        "batch_size": min(limit, len(requests)),
        "rag_sha256": None if rag is None else rag.sha256,
        "noise_steps": settings.noise_steps,
        "rag_top_k": None if rag is None else settings.rag_top_k,
        "queries_sha256": None if texts is None else _sha256(texts),
    }


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def truncated_prompts(encoder: Conditions) -> dict[str, int]:
    """Prompt -> its number of tokens, for those that are longer than the text encoder takes."""
    return encoder.truncated if isinstance(encoder, PromptConditions) else {}


def manifest_line(
    request: Request, settings: Settings, identity: dict[str, Any], truncated: dict[str, int], start: Start | None
) -> dict[str, Any]:
    """What a job's manifest and a PNG's metadata say of an image: its request, and how it is made."""
    line: dict[str, Any] = {"id": request.id, "image_name": request.image_name}
    if request.prompt is not None:
        line["prompt"] = request.prompt
        if request.prompt in truncated:
            line["truncated_from_tokens"] = truncated[request.prompt]
    else:
        line["labels"] = list(request.labels or ())
    line["seed"] = resolve_seed(request, settings.seed)
    left_out = ("requests_sha256", "queries_sha256", "seed", "batch_size", *(RAG if start is None else ()))
    line |= {k: v for k, v in identity.items() if k not in left_out}
    return line if start is None else line | start.record(request)
