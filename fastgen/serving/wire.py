"""The body of a request for images -> a `GenerationRequest`: every field is checked here, for itself and for its model.

The fields are those of OpenAI's images API and fastgen's own. What cannot be done is refused with the field's name; nothing is
ignored.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from fastgen.errors import InputError, nearest, one_line, unknown
from fastgen.files.jsonfiles import brief, parse_json
from fastgen.files.names import check_labels, check_text
from fastgen.files.records import MAX_SEED, MAX_STEPS, Name, Record, Seed, to_record
from fastgen.sampling.schedulers import SOLVERS
from fastgen.serving.errors import NOT_FOUND, SERVER, ApiError
from fastgen.serving.interface import ServiceView
from fastgen.serving.jobs import GenerationRequest
from fastgen.serving.messages import Condition, Format, ImageTask, Ready

MAX_BODY = 65_536  # bytes
MAX_PROMPT = 4000  # characters
MAX_IMAGES = 10  # of a request
MAX_RANDOM_SEED = 2**31  # exclusive; of a request without a seed

Step = Annotated[int, Meta(ge=0, le=MAX_STEPS)]
Client = Annotated[str, Meta(max_length=200)]


class Body(Record, frozen=True):
    """The fields of a request. `size`: "WxH", the model's. `labels`: names, or one text with commas between them. `previews`:
    as `partial_images`, but more. `detached`: the answer comes at once, and the job goes on when the client leaves."""

    prompt: Annotated[str, Meta(max_length=MAX_PROMPT)] | None = None
    model: Name | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_IMAGES)] = 1
    size: Annotated[str, Meta(max_length=20)] = "auto"
    response_format: Literal["b64_json", "url"] = "b64_json"
    quality: Literal["auto"] = "auto"
    style: None = None
    background: Literal["auto", "opaque"] = "auto"
    moderation: Literal["auto", "low"] = "auto"
    output_format: Format = "png"
    output_compression: Annotated[int, Meta(ge=0, le=100)] | None = None
    user: Client | None = None
    safety_identifier: Client | None = None
    stream: bool = False
    partial_images: Annotated[int, Meta(ge=0, le=3)] = 0
    seed: Seed | None = None
    num_inference_steps: Annotated[int, Meta(ge=1, le=1000)] | None = None
    guidance_scale: Annotated[float, Meta(ge=0, le=1000)] | None = None
    guidance_interval: tuple[Step, Step] | None = None
    scheduler: Name | None = None
    labels: Annotated[list[Name], Meta(min_length=1, max_length=1000)] | Name | None = None
    normalize: Literal["clamp", "min-max"] = "clamp"
    deadline_s: Annotated[float, Meta(gt=0, le=3600)] | None = None
    rag: bool = False
    noise_steps: Annotated[int, Meta(ge=1, le=1000)] | None = None
    strength: Annotated[float, Meta(gt=0, le=1)] | None = None
    rag_top_k: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    previews: Annotated[int, Meta(ge=0, le=50)] = 0
    detached: bool = False


FIELDS = Body.__struct_fields__


@dataclass(frozen=True)
class Call:
    """What a client asks for: a job, and how it wants the answer."""

    request: GenerationRequest
    body: Body


def read_call(data: bytes, service: ServiceView, key: str = "") -> Call:
    """The bytes of a request's body as a checked call. `key`: of the fair share, that of the client's API key; without one the
    body's `safety_identifier` or `user` is it. Raises ApiError 400 with the field, 404 for a model that is not served, and 503
    for one that has never been ready."""
    body = read_body(data)
    name = body.model if body.model is not None else next(iter(service.models))
    info = _ready(name, service)
    _check_together(body)
    if not service.keeps_jobs:
        _check_lives_on(body)
    _check_model(body, info)
    prompt, labels = _condition(body, info.condition)
    task = ImageTask(
        seed=secrets.randbelow(MAX_RANDOM_SEED) if body.seed is None else body.seed,
        prompt=prompt,
        labels=labels,
        previews=body.previews or body.partial_images,
        **{name: getattr(body, name) for name in _TASK_FIELDS},
    )
    request = GenerationRequest(
        model=name,
        task=task,
        n=body.n,
        key=key or _client(body),
        deadline_s=body.deadline_s,
        detached=body.detached,
    )
    return Call(request, body)


_TASK_FIELDS = (
    *("scheduler", "num_inference_steps", "guidance_scale", "guidance_interval", "normalize", "rag", "noise_steps"),
    *("strength", "rag_top_k", "output_format", "output_compression"),
)


def read_body(data: bytes) -> Body:
    """The fields, each checked for itself. A field that is null is as absent. Raises ApiError 400."""
    with refusing(None, "invalid_json"):
        value = parse_json(data, "the body")
        if not isinstance(value, dict):
            raise InputError(f"the body: found {brief(value)}, expected a JSON object")
    asked = {key: item for key, item in value.items() if item is not None}
    for key, item in asked.items():
        if key not in FIELDS:
            short = key[:100]
            with refusing(short, "unknown_parameter"):
                raise InputError(f"unknown field {brief(short)}{nearest(short, FIELDS)}")
        with refusing(key):
            to_record({key: item}, Body)
    return to_record(asked, Body)


@contextmanager
def refusing(param: str | None, code: str = "invalid_value") -> Iterator[None]:
    """An InputError that is raised inside becomes an ApiError 400 that names the field."""
    try:
        yield
    except InputError as error:
        raise ApiError(400, one_line(str(error)), param=param, code=code) from None


def _refuse(param: str, message: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, f"{param}: {message}", param=param, code=code)


def _ready(name: str, service: ServiceView) -> Ready:
    """What the worker of the model called `name` said about it."""
    if name not in service.models:
        raise unknown_model(name, service.models)
    info = service.models[name].info
    if info is None:
        wait = service.retry_after
        raise ApiError(
            503,
            f"model {name!r} is not ready yet",
            kind=SERVER,
            param="model",
            code="model_not_ready",
            retry_after=wait,
        )
    return info


def unknown_model(name: str, models: Mapping[str, object]) -> ApiError:
    """The answer to a request for a model that is not served."""
    return ApiError(404, str(unknown("model", name, models)), kind=NOT_FOUND, param="model", code="model_not_found")


def _check_together(body: Body) -> None:
    """Fields that go together, or against each other, whatever the model."""
    if body.partial_images and not body.stream:
        raise _refuse("partial_images", "needs stream: true")
    if body.previews and body.partial_images:
        raise _refuse("previews", "says the same as partial_images; give one of them")
    if body.previews and not (body.stream or body.detached):
        raise _refuse("previews", "needs stream: true, or detached: true")
    if body.detached and body.stream:
        raise _refuse("detached", "is answered at once, so it has no stream; follow the job's events instead")
    if body.stream and body.response_format == "url":
        raise _refuse("response_format", "a stream carries b64_json")
    if body.output_compression is not None and body.output_format == "png":
        raise _refuse("output_compression", "belongs to output_format jpeg and webp; PNG loses nothing")
    if body.seed is not None and body.seed + body.n - 1 > MAX_SEED:
        raise _refuse("seed", f"the last of {body.n} seeds would be larger than {MAX_SEED}")
    for field in ("noise_steps", "strength", "rag_top_k"):
        if getattr(body, field) is not None and not body.rag:
            raise _refuse(field, "needs rag: true")
    if body.noise_steps is not None and body.strength is not None:
        raise _refuse("strength", "says the same as noise_steps; give one of them")
    if body.guidance_interval is not None and body.guidance_interval[0] >= body.guidance_interval[1]:
        raise _refuse("guidance_interval", f"found {list(body.guidance_interval)}, expected [LO, HI] with LO < HI")


def _check_lives_on(body: Body) -> None:
    """Refuse what is asked for in a later request, which another replica would get."""
    for field, found in (("detached", body.detached), ("response_format", body.response_format == "url")):
        if found:
            raise _refuse(
                field, "this server has several replicas, so a later request would not find the job; use stream"
            )


def _check_model(body: Body, info: Ready) -> None:
    """What the model can do."""
    height, width = info.size
    if body.size not in ("auto", f"{width}x{height}"):
        raise _refuse("size", f"found {brief(body.size)}, this model makes {width}x{height}; or give auto")
    if body.scheduler is not None and body.scheduler not in (*info.schedulers, *SOLVERS):
        with refusing("scheduler"):
            raise unknown("scheduler", body.scheduler, dict.fromkeys((*info.schedulers, *SOLVERS)))
    if body.guidance_scale not in (None, 1.0) and not info.guidable:
        raise _refuse("guidance_scale", "this model cannot be guided; give 1")
    if body.rag and not info.rag:
        raise _refuse("rag", "this server has no index; start it with --rag INDEX")
    steps = body.num_inference_steps or info.defaults["num_inference_steps"]
    if body.noise_steps is not None and body.noise_steps > steps:
        raise _refuse(
            "noise_steps", f"found {body.noise_steps}, expected at most {steps}, the number of inference steps"
        )


def _condition(body: Body, condition: Condition) -> tuple[str | None, tuple[str, ...] | None]:
    """The prompt and the labels that the model gets. A model of labels takes them from the prompt too."""
    takes_text, takes_labels = "text" in condition.kind, condition.kind.endswith("labels")
    prompt, labels = body.prompt, body.labels
    field = "labels"
    if takes_labels and not takes_text and prompt:
        if labels is not None:
            raise _refuse("prompt", "this model takes labels; give them in prompt or in labels, not in both")
        field, labels = "prompt", prompt
    if not takes_labels and labels is not None:
        raise _refuse("labels", f"this model takes {condition.takes}")
    if not takes_labels and not takes_text and prompt:
        raise _refuse("prompt", f"this model takes {condition.takes}; leave prompt empty")
    if takes_text:
        if prompt is None:
            raise _refuse("prompt", f"is missing; this model takes {condition.takes}", "missing_required_parameter")
        with refusing("prompt"):
            check_text(prompt, "prompt")
    return prompt if takes_text else None, _labels(field, labels, condition) if takes_labels else None


def _labels(field: str, labels: list[str] | str | None, condition: Condition) -> tuple[str, ...]:
    """Labels as a list or as "red cube, blue sphere" -> names that the model knows."""
    if labels is None:
        text = f"is missing; this model takes {condition.takes}, such as {', '.join(condition.names[:2])}"
        raise _refuse("labels", text, "missing_required_parameter")
    with refusing(field):
        names = check_labels([name.strip() for name in labels.split(",")] if isinstance(labels, str) else labels)
        if condition.one and len(names) != 1:
            raise InputError(f"{field}: found {len(names)}, this model takes exactly one per image")
        for name in names if condition.names else ():
            if name not in condition.names and not (condition.one and name.isascii() and name.isdigit()):
                raise unknown("class" if condition.one else "label", name, condition.names)
    return names


def _client(body: Body) -> str:
    client = body.safety_identifier or body.user
    return f"client {client}" if client else ""
