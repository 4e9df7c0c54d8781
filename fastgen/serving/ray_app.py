"""The server under Ray Serve: every replica is a whole server, with worker processes and slots of its own.

Ray gives each request to a replica that has few. A job lives in the replica that made it, so with several replicas nothing can
be asked of a job later: such requests are refused.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.serve.config import BackpressureConfig
from ray.serve.metrics import Gauge

from fastgen.errors import FastgenError
from fastgen.serving.app import PAGE, create_app
from fastgen.serving.security import App, Policy
from fastgen.serving.service import Service
from fastgen.serving.worker import WorkerOptions

ONGOING = 512  # requests that a replica takes: far more than slots, so that its own admission refuses first
QUEUED = 128  # that wait in Ray's proxy while all replicas have so many

logger = logging.getLogger("ray.serve")


@serve.deployment(
    name="fastgen",
    max_ongoing_requests=ONGOING,
    max_queued_requests=QUEUED,
    backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
)
@serve.ingress()
class Replica:
    """One replica. `prepare`: checks a model on this node, and gives what its worker loads. `drain_s`: for images that run at
    the end. `log`: a line for each request in the replica's log file. Raises FastgenError for a model that cannot start."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self,
        models: Sequence[WorkerOptions],
        policy: Policy,
        prepare: Callable[[WorkerOptions], WorkerOptions],
        drain_s: float,
        log: bool,
    ) -> None:
        self._policy, self._drain_s, self._log = policy, drain_s, log
        self._gauges: dict[str, Gauge] = {}
        prepared = [await asyncio.to_thread(prepare, model) for model in models]
        self._service = Service(prepared, say=logger.info, alone=lambda: serve.get_replica_context().world_size == 1)
        try:
            await self._service.start()
        except BaseException:
            await self._service.stop()
            raise

    def __serve_build_asgi_app__(self) -> App:
        return create_app(self._service, self._policy, PAGE.read_bytes(), logger.info if self._log else None)

    async def check_health(self) -> None:
        """Raises for a model that is given up: Ray replaces the replica then. A worker that starts again is not that. Ray calls
        this every 10 s, so Ray's metrics are renewed here too."""
        self._report()
        if failed := [name for name, model in self._service.models.items() if model.state == "failed"]:
            raise FastgenError(f"failed for good: {', '.join(failed)}")

    def _report(self) -> None:
        """The server's metrics among Ray's own, each under its name with `ray_` before it, and with the replica as a label."""
        for family in text_string_to_metric_families(self._service.metrics().decode()):
            for sample in family.samples:
                if sample.name not in self._gauges:
                    labels: Any = tuple(sample.labels)
                    self._gauges[sample.name] = Gauge(sample.name, family.documentation, labels)
                self._gauges[sample.name].set(sample.value, dict(sample.labels))

    async def __del__(self) -> None:
        """Ray calls this once, when the replica's requests have ended, or their time has."""
        await self._service.drain(self._drain_s)
