"""What the HTTP application asks of the service behind it. `service.Service` is one; tests have another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from fastgen.serving.jobs import GenerationRequest, Job
from fastgen.serving.messages import Ready


class ModelView(Protocol):
    """A model that is served, as the application sees it."""

    @property
    def name(self) -> str: ...

    @property
    def state(self) -> str:
        """starting, ready, restarting, stalled (no answer between two steps), or failed (it died too often)."""

    @property
    def command(self) -> str:
        """What `fastgen generate --model` calls it: the name of a shipped model, or a folder."""

    @property
    def info(self) -> Ready | None:
        """What its worker said when it was ready; None before the first time."""

    @property
    def created(self) -> int:
        """Unix time of its start, s."""

    @property
    def waiting(self) -> int:
        """Images that have not begun."""

    @property
    def running(self) -> int: ...


class ServiceView(Protocol):
    """The service: models, and the jobs of their clients. Everything is called on the event loop's thread."""

    @property
    def models(self) -> Mapping[str, ModelView]: ...

    @property
    def draining(self) -> bool:
        """It ends: new requests are refused."""

    @property
    def keeps_jobs(self) -> bool:
        """Later requests for a job come to this service too; False for one of several replicas."""

    @property
    def retry_after(self) -> int:
        """Whole seconds after which a client of a draining or unready server may try again."""

    def submit(self, request: GenerationRequest) -> Job:
        """A new job. Raises ApiError: 404 unknown model, 429 with Retry-After where it could not end in time, 503 while the
        model is not ready or the server drains."""

    def job(self, id: str) -> Job:
        """A job that is known. Raises ApiError 404."""

    def cancel(self, id: str) -> Job:
        """End a job; images that are done stay. Raises ApiError 404."""

    def metrics(self) -> bytes:
        """The metrics in Prometheus' text format."""
