"""The routes of the HTTP API. What a request may say is checked in `wire`, what an answer looks like stands in `answers`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from fastgen.errors import Say
from fastgen.serving import answers
from fastgen.serving.errors import INVALID, NOT_FOUND, SERVER, ApiError
from fastgen.serving.follow import stream_events, until_ended, until_settled, watch_events, while_connected
from fastgen.serving.interface import ServiceView
from fastgen.serving.jobs import Job
from fastgen.serving.security import CLIENT_LEFT, App, Guard, Policy, error_headers
from fastgen.serving.wire import MAX_BODY, read_call, unknown_model

BODY_S = 10.0  # for a whole body
LINGER_S, LINGER_BYTES = 1.0, 1_048_576  # for a client to see why its body was refused
PAGE = Path(__file__).with_name("page") / "index.html"
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def create_app(service: ServiceView, policy: Policy, page: bytes | None = None, say: Say | None = None) -> App:
    """The ASGI application. `page`: the HTML at /. `say`: gets a line for each request."""
    api = Api(service, page)
    handlers: dict[Any, Any] = {ApiError: _refused, HTTPException: _http_error, ClientDisconnect: _gone}
    handlers[Exception] = _failed
    app = Starlette(routes=api.routes(), exception_handlers=handlers)
    app.router.redirect_slashes = False
    return Guard(app, policy, say)


class Api:
    """A method for each route."""

    def __init__(self, service: ServiceView, page: bytes | None) -> None:
        self.service, self.page = service, page

    def routes(self) -> list[Route]:
        job = "/v1/images/jobs/{id}"
        table: list[tuple[str, Callable[[Request], Coroutine[Any, Any, Response]], str]] = [
            ("/", self.index, "GET"),
            ("/health", self.ready, "GET"),
            ("/health/ready", self.ready, "GET"),
            ("/health/live", self.live, "GET"),
            ("/v1/health/ready", self.ready, "GET"),
            ("/v1/health/live", self.live, "GET"),
            ("/metrics", self.metrics, "GET"),
            ("/v1/models", self.models, "GET"),
            ("/v1/models/{id}", self.model, "GET"),
            ("/v1/images/generations", self.generate, "POST"),
            (job, self.job, "GET"),
            (job, self.cancel, "DELETE"),
            (f"{job}/events", self.events, "GET"),
            (f"{job}/images/{{index:int}}.{{format}}", self.image, "GET"),
        ]
        return [Route(path, handler, methods=[method]) for path, handler, method in table]

    async def generate(self, request: Request) -> Response:
        """POST /v1/images/generations."""
        if self.service.draining:
            raise answers.unready(self.service)
        call = read_call(await _body(request), self.service, request.scope.get("fastgen.key", ""))
        job = self.service.submit(call.request)
        headers = {"x-fastgen-job": job.id}
        if call.request.detached:
            return _json(self._job(job), 202, headers)
        try:
            if call.body.stream:
                return await self._stream(request, job)
            if not await until_ended(job, request.receive):
                raise ClientDisconnect
        finally:
            if not (call.body.stream or job.ended):
                self.service.cancel(job.id)
        if (error := answers.job_error(job)) is not None:
            return _error(error, headers)
        address = f"{request.url.scheme}://{request.headers['host']}" if call.body.response_format == "url" else None
        return _json(answers.images_answer(job, self._view(job), address=address), 200, headers)

    async def _stream(self, request: Request, job: Job) -> Response:
        """Events as they come; what fails at once is an answer of its own, with its own status."""

        def leave() -> None:
            if not job.ended:
                self.service.cancel(job.id)

        try:
            here = await until_settled(job, request.receive)
        except BaseException:
            leave()
            raise
        if not here:
            leave()
            raise ClientDisconnect
        headers = {"x-fastgen-job": job.id}
        if job.ended and all(image.data is None for image in job.images):
            error = answers.job_error(job)
            assert error is not None
            return _error(error, headers)
        return EventStream(stream_events(job, self._view(job)), headers, leave)

    async def job(self, request: Request) -> Response:
        """GET /v1/images/jobs/{id}."""
        job = self.service.job(request.path_params["id"])
        return _json(self._job(job), 200, {"x-fastgen-job": job.id})

    async def cancel(self, request: Request) -> Response:
        """DELETE /v1/images/jobs/{id}."""
        job = self.service.cancel(request.path_params["id"])
        return _json(self._job(job), 200, {"x-fastgen-job": job.id})

    async def events(self, request: Request) -> Response:
        """GET /v1/images/jobs/{id}/events."""
        job = self.service.job(request.path_params["id"])
        return EventStream(watch_events(job, self._view(job)), {"x-fastgen-job": job.id})

    async def image(self, request: Request) -> Response:
        """GET /v1/images/jobs/{id}/images/{index}.{format}."""
        job, index = self.service.job(request.path_params["id"]), request.path_params["index"]
        wanted, made = request.path_params["format"], job.request.task.output_format
        data = job.images[index].data if index < len(job.images) and wanted == made else None
        if data is None:
            raise ApiError(
                404, f"job {job.id} has no image {index}.{wanted[:10]}", kind=NOT_FOUND, code="image_not_found"
            )
        headers = {"x-fastgen-job": job.id, "content-type": answers.MEDIA_TYPES[made]}
        if (name := answers.file_name(job.images[index])) is not None:
            headers["content-disposition"] = f'inline; filename="{name}"'
        return Response(data, 200, headers)

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        listed = [answers.model_object(view) for view in self.service.models.values()]
        return _json({"object": "list", "data": listed})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{id}."""
        name = request.path_params["id"]
        if name not in self.service.models:
            raise unknown_model(name, self.service.models)
        return _json(answers.model_object(self.service.models[name]))

    async def live(self, request: Request) -> Response:
        """GET /health/live: the server answers."""
        return _json({"status": "live"})

    async def ready(self, request: Request) -> Response:
        """GET /health/ready: 200 if requests may come, else 503."""
        ready, found = answers.readiness(self.service)
        headers = {} if ready else {"retry-after": str(self.service.retry_after)}
        return _json(found, 200 if ready else 503, headers)

    async def metrics(self, request: Request) -> Response:
        """GET /metrics, as Prometheus reads it."""
        return Response(self.service.metrics(), 200, {"content-type": METRICS_TYPE})

    async def index(self, request: Request) -> Response:
        """GET /: the page."""
        if self.page is None:
            raise HTTPException(404)
        if not self.service.keeps_jobs:
            text = "the page follows jobs, which needs a server of one replica; this one has several"
            raise ApiError(404, text, kind=NOT_FOUND, code="not_found")
        return Response(self.page, 200, {"content-type": "text/html; charset=utf-8"})

    def _job(self, job: Job) -> dict[str, Any]:
        return answers.job_object(job, self._view(job))

    def _view(self, job: Job) -> Any:
        return self.service.models[job.request.model]


class EventStream(StreamingResponse):
    """Server-sent events. `leave` is called when it ends, however it ends."""

    def __init__(
        self, events: AsyncIterator[bytes], headers: dict[str, str], leave: Callable[[], None] | None = None
    ) -> None:
        headers = {**headers, "x-accel-buffering": "no"}  # a proxy passes each event on at once
        super().__init__(events, 200, headers, "text/event-stream")
        self._leave = leave

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await while_connected(self.stream_response(send), receive)
        finally:
            if self._leave is not None:
                self._leave()


async def _body(request: Request) -> bytes:
    """The body of a POST: JSON of at most MAX_BODY bytes, within BODY_S. Raises ApiError 408, 413 or 415."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the header Content-Type must be application/json", code="unsupported_media_type")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "send the body as it is, without Content-Encoding", code="unsupported_media_type")
    too_large = ApiError(413, f"the body is larger than {MAX_BODY:,} bytes", code="body_too_large")
    announced = request.headers.get("content-length", "0")
    if announced.isascii() and announced.isdigit() and int(announced[:20]) > MAX_BODY:
        raise too_large
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for chunk in request.stream():
                data += chunk
                if len(data) > MAX_BODY:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {BODY_S:.0f} s", code="body_too_slow") from None
    return bytes(data)


class _Farewell(Response):
    """An error before the whole body was read: the connection ends after it. What a client still sends for a moment is thrown
    away, as a connection that is closed before could lose the answer too."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.headers["connection"] = "close"
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        thrown = 0
        try:
            async with asyncio.timeout(LINGER_S):
                while thrown < LINGER_BYTES:
                    message = await receive()
                    if message["type"] == "http.disconnect" or not message.get("more_body"):
                        break
                    thrown += len(message.get("body", b""))
        except TimeoutError:
            pass
        await send({"type": "http.response.body", "body": b""})


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(answers.dump(value), status, headers, "application/json")


def _error(error: ApiError, headers: dict[str, str] | None = None) -> Response:
    kind = _Farewell if error.status in (408, 413) else Response
    return kind(
        answers.dump(error.body()), error.status, {**(headers or {}), **dict(error_headers(error))}, "application/json"
    )


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _error(error)


async def _failed(request: Request, error: Exception) -> Response:
    """An error of the server itself; the layer around the application shows where it arose."""
    return _error(ApiError(500, "the server made an error", kind=SERVER, code="internal_error"))


async def _gone(request: Request, error: Exception) -> Response:
    """Nobody reads this answer; the log shows the status."""
    return Response(b"", CLIENT_LEFT)


async def _http_error(request: Request, error: Exception) -> Response:
    """A path or a method that there is not."""
    assert isinstance(error, HTTPException)
    path = request.scope["path"][:200]
    if error.status_code == 405:
        refused = ApiError(405, f"{path} takes no {request.method[:20]}", kind=INVALID, code="method_not_allowed")
    else:
        refused = ApiError(error.status_code, f"there is no {path}", kind=NOT_FOUND, code="not_found")
    return _error(refused, dict(error.headers or {}))
