"""One served model: the images that its worker makes, for which jobs, and what happens to them when the worker dies."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from fastgen.errors import Say
from fastgen.models.find import name_of
from fastgen.serving import messages
from fastgen.serving.errors import LIMIT, SERVER, ApiError
from fastgen.serving.jobs import GenerationRequest, Job, JobImage, Phase
from fastgen.serving.keeper import Keeper
from fastgen.serving.link import Target
from fastgen.serving.messages import Cancel, FromWorker, Ready, Submit
from fastgen.serving.metrics import Metrics
from fastgen.serving.policy import Backlog
from fastgen.serving.worker import WorkerOptions

LATE_S = 2.0  # after an image's deadline, for a worker that hangs
SUSPECT = 2  # deaths of workers that an image was sent to, after which it is a suspect also where it had not begun


@dataclass(eq=False)
class InFlight:
    """An image that a worker makes, or will."""

    submit: Submit
    job: Job
    image: JobImage
    guided: int = 0  # of its rows
    sent: bool = False  # to the present worker
    deaths: int = 0  # of workers that it was sent to
    suspect: bool = False  # it may have killed a worker


class ModelServer:
    """A model, served by a worker process: implements `interface.ModelView` and `keeper.Owner`. Everything runs on the event
    loop's thread. `numbers` gives the next number of an image."""

    def __init__(
        self, options: WorkerOptions, metrics: Metrics, *, target: Target, numbers: Callable[[], int], say: Say
    ) -> None:
        self.options, self._metrics, self._numbers = options, metrics, numbers
        self.name, self.created = options.name, int(time.time())
        self.info: Ready | None = None
        self._keeper = Keeper(options, target, self, say)
        self._images: dict[int, InFlight] = {}
        self._backlog = Backlog()
        self._done_s, self._busy_since = 0.0, 0.0  # estimated work since then, while there was always some
        self._costs: messages.Costs | None = None
        metrics.declare(self.name)

    @property
    def state(self) -> str:
        return self._keeper.state

    @property
    def command(self) -> str:
        """What `fastgen generate --model` calls it."""
        return name_of(self.options.model)

    @property
    def waiting(self) -> int:
        return sum(flight.image.phase == "waiting" for flight in self._images.values())

    @property
    def running(self) -> int:
        return sum(flight.image.phase == "running" for flight in self._images.values())

    @property
    def busy(self) -> bool:
        """There are images that have not ended."""
        return bool(self._images)

    @property
    def slots(self) -> int:
        return self.info.slots if self.info else 0

    @property
    def pid(self) -> int | None:
        """Of the worker process."""
        return self._keeper.pid

    @property
    def retry_after(self) -> int:
        """Whole seconds after which a client may try again while the model is not ready."""
        return self._keeper.retry_after

    async def start(self) -> None:
        """Start the worker, and wait until it is ready. Raises FastgenError for what it says instead."""
        await self._keeper.start()

    def submit(self, job: Job) -> None:
        """Begin with a job's images. Raises ApiError where the model is not ready, or they could not end in time."""
        self._check_ready()
        request = job.request
        seconds = self._expected(request) * request.n
        if request.deadline_s is not None and seconds > request.deadline_s:
            text = f"deadline_s: found {request.deadline_s:g}, but the images alone take about {seconds:.2g} s"
            raise ApiError(400, text, param="deadline_s", code="invalid_value")
        wait = self._backlog.retry_after(request.key, seconds, self.options.max_wait_s, request.deadline_s)
        if wait is not None:
            raise ApiError(
                429,
                f"the model is busy: this request would wait longer than allowed; try again in {wait} s",
                kind=LIMIT,
                code="busy",
                retry_after=wait,
            )
        job.ahead, job.wait_s = self.waiting, round(self._backlog.predicted(request.key, seconds), 1)
        deadline = None if request.deadline_s is None else job.arrival + request.deadline_s
        if not self._images:
            self._done_s, self._busy_since = 0.0, time.monotonic()
        for offset, image in enumerate(job.images):
            task = msgspec.structs.replace(request.task, seed=image.seed)
            submit = Submit(self._numbers(), task, request.key, job.arrival + offset * 1e-6, deadline)
            self._images[submit.id] = InFlight(submit, job, image)
            self._backlog.add(submit.id, request.key, seconds / request.n)
        self._dispatch()

    def cancel(self, job: Job) -> None:
        """Give up the images of a job that have not ended."""
        for id in [id for id, flight in self._images.items() if flight.job is job]:
            self._end(id, "cancelled")

    def refuse(self, error: Callable[[], ApiError], *, begun: bool = False) -> None:
        """Give up the jobs of which no image has begun, or with `begun` all."""
        for id, flight in list(self._images.items()):
            if begun or all(image.phase == "waiting" for image in flight.job.images):
                self._end(id, "failed", error())
                if flight.sent:
                    self._keeper.send(Cancel(id))

    async def stop(self) -> None:
        """End the worker; images that are not done are cancelled."""
        for id in list(self._images):
            self._end(id, "cancelled")
        await self._keeper.stop()

    def estimate(self) -> None:
        """Tell the jobs that wait how many images are before them, and for how long they will wait about."""
        ahead, seen = 0, set()
        for flight in self._images.values():
            job = flight.job
            if id(job) not in seen:
                seen.add(id(job))
                place = ahead if flight.image.phase == "waiting" else 0
                wait = round(self._backlog.predicted(job.request.key, 0.0), 1)
                if (job.ahead, job.wait_s) != (place, wait):
                    job.ahead, job.wait_s = place, wait
                    job.touch()
            ahead += flight.image.phase == "waiting"

    # What the worker says.

    def received(self, message: FromWorker) -> None:
        match message:
            case Ready():
                self.info, self._costs = message, message.costs
                self._done_s, self._busy_since = 0.0, time.monotonic()
                self._metrics.describe(self.name, message.sha256, message.engine, message.dtype, message.exact)
                self._dispatch()
            case messages.Tick():
                self._ticked(message)
            case messages.Accepted(id, rows, guided, tokens):
                if (flight := self._images.get(id)) is not None:
                    flight.image.rows, flight.guided, flight.image.tokens = rows, guided, tokens
                    self._backlog.progress(id, self._seconds(rows, guided))
                    flight.job.touch()
            case messages.Begun(ids):
                for flight in (self._images[id] for id in ids if id in self._images):
                    flight.image.phase = "running"
                    flight.job.touch()
            case messages.Refused(id, text, param):
                self._end(id, "failed", ApiError(400, text, param=param, code="invalid_value"))
            case messages.Preview(id, index, row, data):
                self._previewed(id, index, row, data)
            case messages.Finished():
                self._finished(message)
            case messages.Failed(id, text, code):
                status = 504 if code == "deadline" else 500
                self._end(id, "failed", ApiError(status, text, kind=SERVER, code=code))

    def _ticked(self, tick: messages.Tick) -> None:
        self._metrics.steps.labels(self.name).inc(tick.steps)
        self._metrics.rows.labels(self.name, "used").inc(tick.used)
        self._metrics.rows.labels(self.name, "padding").inc(tick.padding)
        for _ in range(tick.steps):
            self._metrics.step_seconds.labels(self.name).observe(tick.seconds / tick.steps)
        if tick.costs is not None:
            self._costs = tick.costs
        for id, row in tick.positions.items():
            if (flight := self._images.get(id)) is not None:
                flight.image.row, flight.image.phase = row, "running"
                left = flight.image.rows - row
                self._done_s += self._backlog.progress(id, self._seconds(left, min(left, flight.guided)))
                flight.job.touch()
        if tick.steps:
            now = time.monotonic()
            if len(self._images) >= self.slots:  # fewer images do not show what the server can do
                self._backlog.observe(self._done_s, now - self._busy_since)
            self._done_s, self._busy_since = 0.0, now

    def _previewed(self, id: int, index: int, row: int, data: bytes) -> None:
        if (flight := self._images.get(id)) is None:
            return
        image = flight.image
        if not any(other.previews for other in flight.job.images):
            self._metrics.preview_seconds.labels(self.name).observe(time.monotonic() - flight.job.arrival)
        image.preview, image.preview_row, image.previews, image.phase = data, row, index + 1, "running"
        flight.job.touch()

    def _finished(self, done: messages.Finished) -> None:
        if (flight := self._images.get(done.id)) is None:
            return
        self._keeper.made_a_picture()
        image = flight.image
        image.data, image.line, image.row = done.data, done.line, image.rows
        image.queue_s, image.run_s = done.queue_s, done.run_s
        self._metrics.images.labels(self.name).inc()
        self._metrics.queue_seconds.labels(self.name).observe(done.queue_s)
        self._done_s += self._backlog.progress(done.id, 0.0)
        self._end(done.id, "done")

    def _end(self, id: int, phase: Phase, error: ApiError | None = None) -> None:
        """An image has ended; what the worker still says of it is not heard."""
        flight = self._images.pop(id, None)
        if flight is None:
            return
        self._backlog.remove(id)
        flight.image.phase, flight.image.error, flight.image.preview = phase, error, None
        if phase == "cancelled" and flight.sent:
            self._keeper.send(Cancel(id))
        if flight.job.ended:
            flight.job.ended_at = time.monotonic()
            self._count(flight.job)
        flight.job.touch()
        self._dispatch()

    def _count(self, job: Job) -> None:
        errors = [image.error for image in job.images if image.error is not None]
        outcome = "ok"
        if errors:
            outcome = "deadline" if errors[0].code == "deadline" else "rejected" if errors[0].status < 500 else "failed"
        elif any(image.phase == "cancelled" for image in job.images):
            outcome = "cancelled"
        self._metrics.requests.labels(self.name, outcome).inc()
        self._metrics.request_seconds.labels(self.name).observe(time.monotonic() - job.arrival)

    # Sending images, and what they cost.

    def _dispatch(self) -> None:
        """Send what the worker has not got. While there are suspects, one of them at a time and nothing else: that tells which
        image kills the worker."""
        if not self._keeper.can_work:
            return
        suspects = [flight for flight in self._images.values() if flight.suspect]
        flights = suspects[:1] or list(self._images.values())
        if suspects and any(flight.sent for flight in self._images.values()):
            return
        for flight in flights:
            if not flight.sent:
                flight.sent = True
                self._keeper.send(flight.submit)

    def _expected(self, request: GenerationRequest) -> float:
        """The server's seconds of one image of a request, before the worker has said how many rows it has."""
        assert self.info is not None
        task, defaults = request.task, self.info.defaults
        steps = task.num_inference_steps or int(defaults["num_inference_steps"])
        scale = defaults["guidance_scale"] if task.guidance_scale is None else task.guidance_scale
        return self._seconds(steps, steps if scale != 1.0 else 0)

    def _seconds(self, rows: int, guided: int) -> float:
        """The server's seconds of so many rows of one image, in a full batch."""
        assert self._costs is not None
        plain, both = (
            costs[max(costs)] / max(costs) for costs in (self._costs.plain, self._costs.guided or self._costs.plain)
        )
        return (rows - guided) * plain + guided * both + min(s / n for n, s in self._costs.decode.items())

    def _check_ready(self) -> None:
        if self.state == "failed":
            raise ApiError(503, f"model {self.name} has failed: its worker died too often", kind=SERVER, code="failed")
        if self.state != "ready":
            text = f"model {self.name} is {self.state}"
            raise ApiError(503, text, kind=SERVER, code="model_not_ready", retry_after=self.retry_after)

    # Life and death of the worker.

    def died(self, again: bool) -> None:
        """Images that the worker was making are tried again, one at a time, by the next one."""
        sent = [flight for flight in self._images.values() if flight.sent]
        for flight in sent:
            flight.sent = False
        if len(sent) == 1 and sent[0].suspect:
            text = "the engine crashed twice while it made this image, once with nothing else"
            self._end(sent[0].submit.id, "failed", ApiError(500, text, kind=SERVER, code="engine_crashed"))
        else:
            begun = [flight for flight in sent if flight.image.phase == "running"]
            for flight in sent:
                flight.deaths += 1
                flight.suspect = flight.suspect or flight.deaths >= SUSPECT or flight in (begun or sent)
                image = flight.image
                image.phase, image.row, image.preview, image.previews = "waiting", 0, None, 0
        if again:
            self._metrics.restarts.labels(self.name).inc()
            return
        for id in list(self._images):
            error = ApiError(500, "the engine crashes again and again", kind=SERVER, code="engine_crashed")
            self._end(id, "failed", error)

    def looked(self, now: float) -> None:
        """Give up images whose deadline has passed while the worker hangs or starts, and tell jobs of their place."""
        for id, flight in list(self._images.items()):
            if flight.submit.deadline is not None and now > flight.submit.deadline + LATE_S:
                self._end(id, "failed", ApiError(504, "the deadline has passed", kind=SERVER, code="deadline"))
        self.estimate()

    def longest_step(self) -> float:
        if self._costs is None:
            return 0.0
        return max([*self._costs.guided.values(), *self._costs.plain.values(), *self._costs.decode.values()])
