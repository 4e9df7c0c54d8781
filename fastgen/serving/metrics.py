"""The server's metrics, for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
OUTCOMES = ("ok", "rejected", "cancelled", "deadline", "failed")


class Gauged(Protocol):
    """What is read of a model when metrics are asked for."""

    @property
    def name(self) -> str: ...

    @property
    def state(self) -> str: ...

    @property
    def waiting(self) -> int: ...

    @property
    def running(self) -> int: ...

    @property
    def slots(self) -> int: ...


class Metrics:
    """Counters and histograms of one server, each with the label `model`."""

    def __init__(self) -> None:
        disable_created_metrics()  # a second series for each counter and histogram, with the time of its birth
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, ("model", *labels), registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, ("model", *labels), registry=self.registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(name, text, ("model",), registry=self.registry, buckets=SECONDS)

        self.requests = counter("fastgen_requests", "Requests that ended, by outcome", "outcome")
        self.images = counter("fastgen_images", "Images that were made")
        self.steps = counter("fastgen_steps", "Steps that ran")
        self.rows = counter("fastgen_rows", "Rows of the denoiser", "kind")
        self.restarts = counter("fastgen_engine_restarts", "Times that a worker was started again")
        self.step_seconds = histogram("fastgen_step_seconds", "Seconds of a step")
        self.queue_seconds = histogram("fastgen_queue_seconds", "Seconds that an image waited for its first step")
        self.preview_seconds = histogram("fastgen_first_preview_seconds", "Seconds until a request's first preview")
        self.request_seconds = histogram("fastgen_request_seconds", "Seconds of a request, from arrival to end")
        self._waiting = gauge("fastgen_requests_waiting", "Images that wait for their first step")
        self._running = gauge("fastgen_requests_running", "Images between their first and last step")
        self._slots = gauge("fastgen_slots", "Images that a step takes, at most")
        self._started = gauge("fastgen_start_time_seconds", "Unix time at which the server began with the model")
        self._up = gauge("fastgen_engine_up", "1 while the model is ready")
        self._info = gauge("fastgen_model_info", "What a model is", "sha256", "engine", "dtype", "exact")

    def declare(self, model: str) -> None:
        """Let all counters of a model begin at 0, now."""
        self._started.labels(model).set(time.time())
        for outcome in OUTCOMES:
            self.requests.labels(model, outcome)
        for kind in ("used", "padding"):
            self.rows.labels(model, kind)
        for counter in (self.images, self.steps, self.restarts):
            counter.labels(model)

    def describe(self, model: str, sha256: str, engine: str, dtype: str, exact: bool) -> None:
        """What a model is."""
        self._info.labels(model, sha256, engine, dtype, str(exact).lower()).set(1)

    def text(self, models: Iterable[Gauged]) -> bytes:
        """Prometheus' text format."""
        for model in models:
            self._waiting.labels(model.name).set(model.waiting)
            self._running.labels(model.name).set(model.running)
            self._slots.labels(model.name).set(model.slots)
            self._up.labels(model.name).set(model.state == "ready")
        return generate_latest(self.registry)
