"""A service without models for tests of the HTTP part, and of the page: pictures of one colour, deterministic, in a time that
the test says. As a program it serves them: `python tests/serving/fake_service.py --port 8000`."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import io
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from PIL import Image, PngImagePlugin

import fastgen
from fastgen.files.names import ICLEVR_OBJECTS
from fastgen.serving import http, security
from fastgen.serving.answers import unready
from fastgen.serving.app import create_app
from fastgen.serving.errors import LIMIT, NOT_FOUND, SERVER, ApiError
from fastgen.serving.jobs import GenerationRequest, Job, JobImage
from fastgen.serving.messages import Condition, Costs, ImageTask, Ready
from fastgen.serving.wire import unknown_model

PAGE = Path(fastgen.__file__).parent / "serving" / "page" / "index.html"
SCHEDULERS = ("ddim", "ddpm", "dpmpp-2m", "euler-ancestral", "pndm", "unipc")
CONDITIONS = {
    "monsters-64": Condition("text", "a prompt", tokens=77),
    "iclevr-64": Condition("labels", "labels", tuple(ICLEVR_OBJECTS)),
    "digits": Condition("labels", "one class", tuple(map(str, range(10))), one=True),
    "seeds": Condition("nothing", "nothing but a seed"),
    "both": Condition("text and labels", "a prompt and labels", ("red cube", "blue sphere"), tokens=77),
}


class FakeModel:
    def __init__(self, name: str, state: str = "ready") -> None:
        self.name, self.state, self.created, self.command = name, state, int(time.time()), name
        self.waiting = self.running = 0
        self.guidable, self.rag = name != "seeds", False

    @property
    def info(self) -> Ready | None:
        if self.state == "starting":
            return None
        return Ready(
            condition=CONDITIONS[self.name],
            defaults={"scheduler": "ddim", "num_inference_steps": 8, "guidance_scale": 2.0},
            size=(48, 64),
            engine="fake",
            dtype="fp32",
            device="cpu",
            sha256="0" * 64,
            checkpoint=None,
            slots=4,
            exact=True,
            schedulers=SCHEDULERS,
            costs=Costs({1: 0.01}, {1: 0.01}, {1: 0.01}),
            rag=self.rag,
            guidable=self.guidable,
        )


class FakeService:
    """`row_s`: seconds of a row. `failing`: seed -> error. `room`: images that may be under way; more are refused with 429.
    `submitted`: all requests that came. `hold`: images wait until it is set. `padding`: more bytes of a preview."""

    retry_after = 1

    def __init__(self, *names: str, row_s: float = 0.0) -> None:
        self.models: Mapping[str, Any] = {name: FakeModel(name) for name in names or CONDITIONS}
        self.row_s, self.draining, self.room, self.padding = row_s, False, 1000, b""
        self.keeps_jobs = True
        self.failing: dict[int, ApiError] = {}
        self.jobs: dict[str, Job] = {}
        self.submitted: list[GenerationRequest] = []
        self.cancelled: list[str] = []
        self.hold: asyncio.Event | None = None
        self.broken: Callable[[], Exception] | None = None  # what `submit` raises, for an error of the server itself
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        pass

    async def drain(self) -> None:
        self.draining = True
        await asyncio.gather(*self._tasks)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()

    def submit(self, request: GenerationRequest) -> Job:
        if self.broken is not None:
            raise self.broken()
        if request.model not in self.models:
            raise unknown_model(request.model, self.models)
        if self.draining:
            raise unready(self)
        model = self.models[request.model]
        if model.state != "ready":
            raise ApiError(503, "not ready", kind=SERVER, code="model_not_ready", retry_after=self.retry_after)
        if model.waiting + model.running + request.n > self.room:
            raise ApiError(429, "too many images wait", kind=LIMIT, code="queue_full", retry_after=self.retry_after)
        images = [JobImage(request.task.seed + i) for i in range(request.n)]
        job = Job(secrets.token_urlsafe(18), request, images, int(time.time()), time.monotonic(), ahead=model.waiting)
        self.jobs[job.id] = job
        self.submitted.append(request)
        task = asyncio.get_running_loop().create_task(self._run(job, model))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return job

    def job(self, id: str) -> Job:
        if id not in self.jobs:
            raise ApiError(404, "there is no such job", kind=NOT_FOUND, param="id", code="job_not_found")
        return self.jobs[id]

    def cancel(self, id: str) -> Job:
        job = self.job(id)
        for image in job.images:
            if not image.ended:
                image.phase = "cancelled"
        self.cancelled.append(id)
        job.touch()
        return job

    def metrics(self) -> bytes:
        return b"# HELP fastgen_images_total Images.\n# TYPE fastgen_images_total counter\nfastgen_images_total 0.0\n"

    async def _run(self, job: Job, model: FakeModel) -> None:
        model.waiting += len(job.images)
        for image in job.images:
            image.rows = job.request.task.num_inference_steps or 8
        job.touch()
        if self.hold is not None:
            await self.hold.wait()
        await asyncio.sleep(0)
        for index, image in enumerate(job.images):
            model.waiting -= 1
            if not image.ended:
                model.running += 1
                await self._draw(job, index)
                model.running -= 1
            job.touch()

    async def _draw(self, job: Job, index: int) -> None:
        image, task = job.images[index], job.request.task
        image.phase, begin = "running", time.monotonic()
        marks = {round((i + 1) * image.rows / (task.previews + 1)) for i in range(task.previews)}
        for row in range(1, image.rows + 1):
            if self.row_s:
                await asyncio.sleep(self.row_s)
            if image.ended:
                return
            image.row = row
            if row in marks:
                image.preview, image.preview_row = picture(task, image.seed, row / image.rows) + self.padding, row
                image.previews += 1
            if self.row_s or row in marks:
                job.touch()
                await asyncio.sleep(0)
        if (error := self.failing.get(image.seed)) is not None:
            image.phase, image.error = "failed", error
            return
        image.line = line(task, image.seed)
        image.data, image.phase = picture(task, image.seed), "done"
        image.queue_s, image.run_s = begin - job.arrival, time.monotonic() - begin


def line(task: ImageTask, seed: int) -> dict[str, Any]:
    asked = task.prompt if task.prompt is not None else ", ".join(task.labels or ())
    slug = "-".join("".join(c if c.isalnum() and c.isascii() else " " for c in asked.lower()).split())[:60] or "image"
    what = {"prompt": task.prompt} if task.prompt is not None else {"labels": list(task.labels or ())}
    return {"id": "0", "image_name": f"{slug}-{seed}.png", **what, "seed": seed, "model_sha256": "0" * 64}


def picture(task: ImageTask, seed: int, share: float = 1.0) -> bytes:
    """A file whose colour depends on the task and the seed; a preview of a `share` of the steps is paler."""
    what = msgspec.json.encode(msgspec.structs.replace(task, seed=seed, previews=0))
    colour = hashlib.sha256(what).digest()[:3]
    image = Image.new("RGB", (64, 48), tuple(round(255 - share * (255 - c)) for c in colour))
    info = PngImagePlugin.PngInfo()
    info.add_text("fastgen", str(line(task, seed)))
    file = io.BytesIO()
    options = {"pnginfo": info} if task.output_format == "png" else {"quality": task.output_compression or 90}
    image.save(file, task.output_format, **options)
    return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--row-s", type=float, default=0.1, help="seconds of a step")
    parser.add_argument("--padding", type=int, default=0, help="more bytes of a preview")
    parser.add_argument("--models", nargs="*", default=["monsters-64", "iclevr-64"])
    options = parser.parse_args()
    listener = http.bind("127.0.0.1", options.port)
    page = PAGE.read_bytes() if PAGE.exists() else b"<!doctype html><title>fastgen</title>no page yet"
    policy = security.Policy(page_policy=security.content_policy(page))
    service = FakeService(*options.models, row_s=options.row_s)
    service.padding = bytes(options.padding)
    app = create_app(service, policy, page, lambda text: print(text, flush=True))
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    asyncio.run(http.create_server(app).serve(sockets=[listener]))


if __name__ == "__main__":
    main()
