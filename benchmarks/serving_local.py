"""The same pictures without a server: those that `fastgen generate` writes, its speed, and the costs of a step."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

import fastgen
from benchmarks.prompts import LABELS, prompts
from benchmarks.report import timed
from benchmarks.serving_client import Body, Reply, digest
from benchmarks.serving_simulation import Arrival, Costs
from fastgen.engines.batches import Batch
from fastgen.files.png import png_bytes
from fastgen.generate.job import run_job
from fastgen.generate.job_input import read_input
from fastgen.generate.record import job_identity, manifest_line
from fastgen.generate.requests import Request
from fastgen.generate.run import Run
from fastgen.generate.single import write_image
from fastgen.generate.start import late_start
from fastgen.retrieval.index import open_index
from fastgen.serving.policy import Curve

SETTINGS = ("scheduler", "num_inference_steps", "guidance_scale", "guidance_interval", "normalize")
LATE = ("noise_steps", "strength", "rag_top_k")
ROUNDS = 3


class Local:
    """A bundle, or model folder, on an engine, in this process. `index`: of its training images, for requests with `rag`."""

    def __init__(self, model: Path, engine: str, threads: int | None = None, index: Path | None = None) -> None:
        self._index = None if index is None else open_index(index)
        self.pipeline = fastgen.load(model, engine, threads=threads)
        self.takes_text = self.pipeline.spec.condition.kind == "text"
        self._prompts = prompts(64) if self.takes_text else [", ".join(labels) for labels in LABELS]
        self._digests: dict[str, str] = {}

    def body(self, seed: int, steps: int | None = None, key: str = "", **more: Any) -> Body:
        """A request of the API: the seed chooses the prompt too."""
        body = {"prompt": self._prompts[seed % len(self._prompts)], "seed": seed, **more}
        return body | ({"num_inference_steps": steps} if steps else {}) | ({"user": key} if key else {})

    def bodies(self, arrivals: Iterable[Arrival]) -> list[tuple[float, Body]]:
        return [(a.at, self.body(a.seed, a.steps, a.key)) for a in arrivals]

    def expected(self, body: Body) -> tuple[str, ...]:
        """SHA-256 of the file that `fastgen generate` writes for each picture of a request, made once."""
        seeds = range(body["seed"], body["seed"] + body.get("n", 1))
        return tuple(self._expected({**body, "seed": seed}) for seed in seeds)

    def wrong(self, replies: Iterable[Reply]) -> tuple[int, int]:
        """(pictures that came, those with other bytes than `fastgen generate` writes)."""
        pairs = [
            pair
            for reply in replies
            if reply.status == 200
            for pair in zip(reply.digests, self.expected(reply.body), strict=True)
        ]
        return len(pairs), sum(found != wanted for found, wanted in pairs)

    def _expected(self, body: Body) -> str:
        identity = {name: body[name] for name in ("prompt", "seed", "rag", *SETTINGS, *LATE) if name in body}
        name = json.dumps(identity, sort_keys=True)
        if name not in self._digests:
            with tempfile.TemporaryDirectory() as scratch:
                file = Path(scratch) / self._request(body)[1]
                write_image(self._run([body]), file)
                self._digests[name] = digest(file.read_bytes())
        return self._digests[name]

    def _request(self, body: Body) -> tuple[Request, str]:
        """The request that `fastgen generate` makes of its options, and the name of the file."""
        texts, labels = ([body["prompt"]], []) if self.takes_text else ([], [body["prompt"]])
        job = read_input(None, texts, labels, None, seed=body["seed"])
        (request,) = job.requests.requests
        return request, PurePosixPath(job.out).name

    def _run(self, bodies: Sequence[Body]) -> Run:
        """A run of requests that differ in prompt and seed only."""
        given = {name: body[name] for body in bodies for name in SETTINGS if name in body}
        late = {name: body[name] for body in bodies for name in LATE if name in body}
        requests = [self._request(body)[0] for body in bodies]
        settings = self.pipeline.settings(seed=bodies[0]["seed"], **given)
        index = self._index if bodies[0].get("rag") else None
        return Run(self.pipeline, requests, *late_start(index, self.pipeline, requests, settings, **late))

    def pictures(self, bodies: Sequence[Body]) -> list[bytes]:
        """The files of requests that run as one batch from the first step to the last."""
        run = self._run(bodies)
        sizes = self.pipeline.buckets(run.settings) or [len(bodies)]
        batch = Batch(0, len(bodies), min(size for size in sizes if size >= len(bodies)))
        made, identity = run.begin(batch)(), job_identity(run, 1)
        lines = [manifest_line(run, request, identity) for request in run.requests]
        names = [self._request(body)[1] for body in bodies]
        return [png_bytes(p, line | {"image_name": n}) for p, line, n in zip(made.pixels, lines, names, strict=True)]

    def generate(self, body: Body) -> Image.Image:
        """One picture by Pipeline.generate."""
        request, settings = self._request(body)[0], {name: body[name] for name in SETTINGS if name in body}
        given: dict[str, Any] = {"prompts": [request.prompt]} if self.takes_text else {"labels": [request.labels]}
        (image,) = self.pipeline.generate(**given, seeds=[body["seed"]], **settings)
        return image

    def warm(self, largest: int) -> None:
        """Run every batch size once: engines compile some of them when they first come."""
        for size in range(1, largest + 1):
            self.pictures([self.body(seed, 1) for seed in range(size)])

    def executor(self, replies: list[Reply]) -> Callable[[Sequence[Arrival], float], float]:
        """Runs batches in real time, from second `start` after this call on; what became of each request goes to `replies`."""
        origin = time.monotonic()

        def execute(batch: Sequence[Arrival], start: float) -> float:
            time.sleep(max(0.0, origin + start - time.monotonic()))
            bodies = [self.body(arrival.seed, arrival.steps) for arrival in batch]
            pictures = self.pictures(bodies)
            now = time.monotonic()
            for arrival, body, picture in zip(batch, bodies, pictures, strict=True):
                replies.append(Reply(body, 200, now - origin - arrival.at, now, (digest(picture),)))
            return now - origin

        return execute

    def images_per_s(self, images: int, batch_size: int) -> float:
        """Of a job of `fastgen generate`, files included, model loaded."""
        run = self._run([self.body(seed) for seed in range(images)])
        with tempfile.TemporaryDirectory() as scratch:
            report = run_job(run, Path(scratch) / "job", batch_size=batch_size, progress=False)
        return report.generated / report.seconds

    def costs(self, slots: int, sizes: Sequence[int], rounds: int = ROUNDS) -> Costs:
        """Seconds of a step by images, and of all the rest of a picture, from runs of 3 and 13 steps; medians."""
        step, rest = {}, {}
        allowed = self.pipeline.buckets(self.pipeline.settings())
        for size in (size for size in sizes if not allowed or size in allowed):
            taken = [
                [timed(partial(self.pictures, [self.body(seed, steps) for seed in range(size)])) for steps in (13, 3)]
                for _ in range(rounds + 1)
            ][1:]  # the first round compiles
            step[size] = max(1e-6, statistics.median((long_s - short_s) / 10 for long_s, short_s in taken))
            rest[size] = max(1e-6, statistics.median(short_s for _, short_s in taken) - 3 * step[size])
        return Costs(Curve(step, any_size=not allowed), Curve(rest, any_size=not allowed), slots)
