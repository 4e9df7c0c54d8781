"""The service behind the HTTP application: models, jobs, and the way down."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

from fastgen.serving.errors import NOT_FOUND, SERVER, ApiError
from fastgen.serving.jobs import GenerationRequest, Job, JobImage
from fastgen.serving.link import Target
from fastgen.serving.metrics import Metrics
from fastgen.serving.model_server import ModelServer
from fastgen.serving.worker import WorkerOptions, run_worker

KEPT_S, KEPT_IMAGES = 600.0, 256  # finished jobs are kept for so long, and so many of their images
DRAIN_S = 25.0
POLL_S = 0.05


class Service:
    """The models of one server, each in a process of its own, and the jobs of all clients. Implements `interface.ServiceView`.

    `target`: what a worker process runs. `say` gets a line about loading, and about workers that die. `alone`: whether all
    requests come to this service; False for one of several replicas.
    """

    def __init__(
        self,
        models: Sequence[WorkerOptions],
        *,
        target: Target = run_worker,
        say: Callable[[str], None] = lambda line: None,
        alone: Callable[[], bool] = lambda: True,
    ) -> None:
        self._metrics = Metrics()
        numbers = itertools.count(1).__next__
        self._models = {
            options.name: ModelServer(options, self._metrics, target=target, numbers=numbers, say=say)
            for options in models
        }
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self.draining = False
        self._alone = alone

    @property
    def keeps_jobs(self) -> bool:
        return self._alone()

    @property
    def models(self) -> Mapping[str, ModelServer]:
        return self._models

    @property
    def retry_after(self) -> int:
        return max((model.retry_after for model in self._models.values() if model.state != "ready"), default=1)

    async def start(self) -> None:
        """Start all models at the same time. Raises FastgenError for the first that cannot start."""
        await asyncio.gather(*(model.start() for model in self._models.values()))

    def submit(self, request: GenerationRequest) -> Job:
        if self.draining:
            text = "the server is going down; try again"
            raise ApiError(503, text, kind=SERVER, code="draining", retry_after=self.retry_after)
        if (model := self._models.get(request.model)) is None:
            raise ApiError(
                404, f"no model {request.model!r} here", kind=NOT_FOUND, param="model", code="model_not_found"
            )
        images = [JobImage((request.task.seed + i) % 2**63) for i in range(request.n)]
        job = Job(secrets.token_hex(12), request, images, int(time.time()), time.monotonic())
        try:
            model.submit(job)
        except ApiError:
            self._metrics.requests.labels(model.name, "rejected").inc()
            raise
        self._jobs[job.id] = job
        self._forget()
        return job

    def job(self, id: str) -> Job:
        self._forget()
        if (job := self._jobs.get(id)) is None:
            where = "" if self.keeps_jobs else "; this server has several replicas, and each knows its own jobs alone"
            raise ApiError(404, f"no such job, or it is forgotten{where}", kind=NOT_FOUND, code="job_not_found")
        return job

    def cancel(self, id: str) -> Job:
        job = self.job(id)
        self._models[job.request.model].cancel(job)
        return job

    def metrics(self) -> bytes:
        return self._metrics.text(self._models.values())

    async def drain(self, seconds: float = DRAIN_S) -> None:
        """Refuse new requests and jobs that have not begun, and let the others end, for at most so many seconds."""
        self.draining = True

        def refusal() -> ApiError:
            return ApiError(503, "the server is going down; try again", kind=SERVER, code="draining", retry_after=1)

        end = time.monotonic() + seconds
        for model in self._models.values():
            model.refuse(refusal)
        while any(model.busy for model in self._models.values()) and time.monotonic() < end:
            await asyncio.sleep(POLL_S)
        for model in self._models.values():
            model.refuse(refusal, begun=True)
        await self.stop()

    async def stop(self) -> None:
        """End all workers at once."""
        self.draining = True
        await asyncio.gather(*(model.stop() for model in self._models.values()))

    def _forget(self) -> None:
        """Drop finished jobs that are old, and the oldest where they hold too many images."""
        now = time.monotonic()
        done = [job for job in self._jobs.values() if job.ended]
        images = sum(len(job.images) for job in done)
        for job in done:
            if images <= KEPT_IMAGES and now - job.ended_at < KEPT_S:
                continue
            images -= len(job.images)
            del self._jobs[job.id]
