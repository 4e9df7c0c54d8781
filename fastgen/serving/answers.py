"""Jobs and models -> the JSON of the API's answers."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from fastgen.serving.errors import SERVER, ApiError
from fastgen.serving.interface import ModelView, ServiceView
from fastgen.serving.jobs import GenerationRequest, Job, JobImage
from fastgen.serving.messages import ImageTask

MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
_FILE_NAME = re.compile(r"[A-Za-z0-9._-]{1,200}")
_DEFAULTS = {field.name: field.default for field in msgspec.structs.fields(ImageTask)}


def dump(value: Any) -> bytes:
    """JSON in ASCII, so that a lone surrogate of a request can be repeated too."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def event(name: str, value: Any) -> bytes:
    """A server-sent event."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), dump(value))


def images_answer(job: Job, view: ModelView, *, address: str | None = None) -> dict[str, Any]:
    """The answer of a job whose images are all done. `address`: of this server, for images by URL; None: their bytes."""
    data = []
    for index, image in enumerate(job.images):
        where = _base64(image.data) if address is None else address + image_path(job, index)
        name = "b64_json" if address is None else "url"
        data.append({name: where, "revised_prompt": None, "fastgen": _line(image, view)})
    return {"created": job.created, "data": data, **_picture(job, view), "usage": _usage(job.images)}


def partial_event(job: Job, index: int, view: ModelView) -> bytes:
    """The newest preview of an image, as a stream of images has it."""
    image = job.images[index]
    assert image.preview is not None
    name = "image_generation.partial_image"
    about = {"index": index, "seed": image.seed, "row": image.preview_row, "rows": image.rows}
    head = {"type": name, "b64_json": _base64(image.preview), "partial_image_index": max(image.previews - 1, 0)}
    return event(name, {**head, "created_at": job.created, **_picture(job, view), "fastgen": about})


def completed_event(job: Job, index: int, view: ModelView) -> bytes:
    """A finished image, as a stream of images has it."""
    image = job.images[index]
    name = "image_generation.completed"
    head = {"type": name, "b64_json": _base64(image.data), "created_at": job.created, **_picture(job, view)}
    return event(name, {**head, "usage": _usage([image]), "fastgen": {"index": index, **_line(image, view)}})


def job_object(job: Job, view: ModelView) -> dict[str, Any]:
    """A job, as the API shows it."""
    return {
        "id": job.id,
        "object": "image.job",
        "status": job_status(job),
        "model": job.request.model,
        "created": job.created,
        "ahead": job.ahead,
        "wait_s": job.wait_s,
        "request": request_fields(job.request),
        "images": [_image_object(job, index, view) for index in range(len(job.images))],
    }


def job_status(job: Job) -> str:
    """waiting, running, done, failed or cancelled: of the images that are worst off, once all have ended."""
    phases = {image.phase for image in job.images}
    if not job.ended:
        return "waiting" if phases == {"waiting"} else "running"
    return next(phase for phase in ("failed", "cancelled", "done") if phase in phases)


def job_error(job: Job) -> ApiError | None:
    """Why a job that has ended has not all of its images."""
    for index, image in enumerate(job.images):
        if image.error is None:
            continue
        if len(job.images) == 1:
            return image.error
        text = f"image {index + 1} of {len(job.images)}, seed {image.seed}: {image.error.message}"
        error = image.error
        return ApiError(
            error.status, text, kind=error.kind, param=error.param, code=error.code, retry_after=error.retry_after
        )
    if job_status(job) == "cancelled":
        return ApiError(410, f"job {job.id} was cancelled", code="job_cancelled")
    return None


def request_fields(request: GenerationRequest) -> dict[str, Any]:
    """The fields of a request, as they can be sent again."""
    task = {name: value for name, value in msgspec.to_builtins(request.task).items() if value != _DEFAULTS[name]}
    fields = {"model": request.model, "n": request.n, **task, "seed": request.task.seed}
    if request.deadline_s is not None:
        fields["deadline_s"] = request.deadline_s
    if request.detached:
        fields["detached"] = True
    elif request.task.previews:
        fields["stream"] = True
    return fields


def image_path(job: Job, index: int) -> str:
    return f"/v1/images/jobs/{job.id}/images/{index}.{job.request.task.output_format}"


def file_name(image: JobImage) -> str | None:
    """The name under which a browser saves the image."""
    name = (image.line or {}).get("image_name")
    return name if isinstance(name, str) and _FILE_NAME.fullmatch(name) else None


def image_event(job: Job, index: int, view: ModelView) -> bytes:
    """A finished image, as the events of a job have it."""
    found = _image_object(job, index, view)
    return event("image", {name: found[name] for name in ("index", "seed", "url", "fastgen")})


def preview_event(job: Job, index: int) -> bytes:
    """The newest preview of an image, as the events of a job have it."""
    image = job.images[index]
    assert image.preview is not None
    about = {"index": index, "row": image.preview_row, "rows": image.rows}
    return event("preview", {**about, "b64_json": _base64(image.preview)})


def model_object(view: ModelView) -> dict[str, Any]:
    """A model, as the API shows it; what its worker knows is null before it has been ready."""
    info, about = view.info, dict.fromkeys(_MODEL_FIELDS)
    if info is not None:
        about |= {name: value for name, value in msgspec.to_builtins(info).items() if name in about}
        condition = info.condition
        about |= {"kind": condition.kind, "takes": condition.takes, "labels": list(condition.names)}
        about |= {"one": condition.one, "tokens": condition.tokens}
    about |= {"waiting": view.waiting, "running": view.running, "command": view.command}
    head = {"id": view.name, "object": "model", "created": view.created, "owned_by": "fastgen"}
    return {**head, "fastgen": {"state": view.state, **about}}


_MODEL_FIELDS = (
    *("engine", "dtype", "device", "exact", "sha256", "checkpoint", "kind", "takes", "labels", "one", "tokens"),
    *("defaults", "size", "slots", "schedulers", "rag", "guidable"),
)


def readiness(service: ServiceView) -> tuple[bool, dict[str, Any]]:
    """Whether requests may come, and what to say about it. A model that failed for good does not keep the others from work."""
    states: Mapping[str, str] = {name: view.state for name, view in service.models.items()}
    working = [state for state in states.values() if state != "failed"]
    ready = bool(working) and all(state == "ready" for state in working) and not service.draining
    status = "ready" if ready else "draining" if service.draining else "not ready"
    return ready, {"status": status, "models": states}


def unready(service: ServiceView) -> ApiError:
    """The answer to a new request while the server ends."""
    text = "the server is ending; try again, another one may take over"
    return ApiError(503, text, kind=SERVER, code="draining", retry_after=service.retry_after)


def _image_object(job: Job, index: int, view: ModelView) -> dict[str, Any]:
    image = job.images[index]
    done = image.data is not None
    return {
        "index": index,
        "seed": image.seed,
        "status": image.phase,
        "row": image.row,
        "rows": image.rows,
        "previews": image.previews,
        "url": image_path(job, index) if done else None,
        "fastgen": _line(image, view) if done else None,
        "error": image.error.body()["error"] if image.error is not None else None,
    }


def _line(image: JobImage, view: ModelView) -> dict[str, Any]:
    """The manifest line of a finished image, and how it came about."""
    exact = view.info.exact if view.info is not None else None
    return {**(image.line or {}), "queue_s": image.queue_s, "run_s": image.run_s, "exact": exact}


def _picture(job: Job, view: ModelView) -> dict[str, Any]:
    size = view.info.size if view.info is not None else (0, 0)
    return {
        "background": "opaque",
        "output_format": job.request.task.output_format,
        "quality": "auto",
        "size": f"{size[1]}x{size[0]}",
    }


def _usage(images: list[JobImage]) -> dict[str, Any]:
    """`output_tokens`: evaluations of the network; `input_tokens`: of the prompt, where they are known."""
    tokens, rows = sum(image.tokens or 0 for image in images), sum(image.rows for image in images)
    details = {"text_tokens": tokens, "image_tokens": 0}
    return {
        "input_tokens": tokens,
        "output_tokens": rows,
        "total_tokens": tokens + rows,
        "input_tokens_details": details,
    }


def _base64(data: bytes | None) -> str:
    assert data is not None
    return base64.b64encode(data).decode()
