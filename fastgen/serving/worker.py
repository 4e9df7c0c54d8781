"""The process of one model: it takes images from the service, advances them together, and sends back files.

Between two steps it reads what the service says, so that images join, are cancelled, and pings are answered there.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgen.errors import FastgenError, InputError, Say, one_line
from fastgen.serving import messages
from fastgen.serving.batch import Batcher
from fastgen.serving.messages import Cancel, Loading, Ping, Pong, Ready, Stop, Submit, Unready

if TYPE_CHECKING:
    from fastgen.generate.runner import ModelRunner
    from fastgen.serving.warm import Warm

IDLE_S = 0.5  # between two looks at the connection while there is nothing to do
WAITING_S = 0.002  # while a solver table is being read
REPORT_S = 0.02  # between two reports of progress


@dataclass(frozen=True)
class WorkerOptions:
    """What to serve and how. `model`: a bundle or model folder. `exact`: None decides by the device; see `warm.warm_up`.
    `max_wait_s`: an image that has waited for so long goes first. `check`: is called with the loaded model, and with what
    tells the user a line; it raises FastgenError for a model that must not be served."""

    model: Path
    name: str
    engine: str | None = None
    device: str | None = None
    dtype: str | None = None
    threads: int | None = None
    checkpoint: str | None = None
    allow_pickle: bool = False
    rag: Path | None = None
    exact: bool | None = None
    max_wait_s: float = 30.0
    before: Ready | None = None  # what an earlier worker measured
    check: Callable[[ModelRunner, Say], None] | None = None
    load: dict[str, Any] = field(default_factory=dict)  # more arguments of `fastgen.load`


def run_worker(connection: Connection, options: WorkerOptions) -> None:
    """Serve one model until the service ends, or says so: a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the service, which ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    serve_model(connection, options)


def serve_model(connection: Connection, options: WorkerOptions) -> None:
    """Load a model, say that it is ready, and make the images that are asked for, until the other end says stop or is gone.
    What goes wrong before it is ready is told there."""
    worker = Worker(connection)
    try:
        batcher, ready = _load(options, worker.say)
    except FastgenError as error:
        worker.send(Unready(one_line(str(error), error.longest), error.exit_code))
        return
    except (BrokenPipeError, EOFError):
        return
    worker.send(ready)
    worker.serve(batcher)


def _load(options: WorkerOptions, say: Say) -> tuple[Batcher, Ready]:
    from fastgen.generate.pipeline import load
    from fastgen.models.find import find_model
    from fastgen.serving.opening import Opened, run_all
    from fastgen.serving.preparing import Preparer
    from fastgen.serving.ready import example_task, first_image, ready_of

    say("loading the model")
    found = find_model(options.model, options.checkpoint)
    pipeline = load(
        found,
        options.engine,
        device=options.device,
        dtype=options.dtype,
        threads=options.threads,
        checkpoint=options.checkpoint,
        allow_pickle=options.allow_pickle,
        **options.load,
    )
    if options.check is not None:
        options.check(pipeline, say)
    preparer = Preparer(pipeline, options.rag)
    warm, known = _warm(pipeline, options, say)
    later = known and pipeline.engine.static_shapes and pipeline.engine.threadsafe
    if known and not later:
        run_all(pipeline, warm)
    opened = Opened(pipeline, warm, later=later)
    batcher = Batcher(pipeline, preparer, warm, max_wait_s=options.max_wait_s, opened=opened, say=say)
    say("making a first image")
    first_image(batcher, example_task(pipeline))
    return batcher, ready_of(pipeline, warm, preparer)


def _warm(pipeline: ModelRunner, options: WorkerOptions, say: Say) -> tuple[Warm, bool]:
    """The sizes to use, and whether an earlier process has measured them."""
    from fastgen.serving.remembered import Memory, key_of
    from fastgen.serving.warm import warm_of, warm_up

    condition = pipeline.spec.condition
    guided = condition.guidable and not condition.guidance_width
    exact = not pipeline.on_gpu if options.exact is None else options.exact
    if (before := options.before) is not None:
        return warm_of(before.costs, before.slots, before.exact), True
    try:
        memory = Memory()
    except InputError as error:
        say(f"{error}; the times of its steps are measured at every start")
        return warm_up(pipeline, guided=guided, exact=exact, say=say), False
    key = key_of(pipeline, guided, exact, options.threads)
    if (warm := memory.recall(key)) is not None:
        return warm, True
    if not memory.writable:
        say(f"{memory.folder}: cannot be written; the times of its steps are measured at every start")
        return warm_up(pipeline, guided=guided, exact=exact, say=say), False
    with memory.timed_alone():
        warm = warm_up(pipeline, guided=guided, exact=exact, say=say)
    if warm.steady:
        try:
            memory.remember(key, warm)
        except FastgenError as error:  # such as a full disk
            say(f"{error}; the times of its steps are measured again at the next start")
    else:
        say("the machine is busy: the times of its steps are measured again at the next start")
    return warm, False


class Worker:
    """The connection to the service, and the loop over steps."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._running = True

    def send(self, message: messages.FromWorker) -> None:
        self._connection.send_bytes(messages.encode(message))

    def say(self, text: str) -> None:
        """Tell the user a line, or a table."""
        for line in text.splitlines():
            self.send(Loading(line))

    def serve(self, batcher: Batcher) -> None:
        """Take messages and run steps until the service says stop or is gone."""
        reported = time.monotonic()
        try:
            while self._running:
                self._receive(batcher)
                for outcome in batcher.advance(time.monotonic()):
                    self.send(outcome)
                now = time.monotonic()
                if now - reported >= REPORT_S or not batcher.busy:
                    reported = now
                    if (tick := batcher.report()) is not None:
                        self.send(tick)
        except (BrokenPipeError, ConnectionResetError, EOFError):
            return  # the service has ended

    def _receive(self, batcher: Batcher) -> None:
        """All messages that have come; waits for one where there is nothing to do."""
        wait = 0.0 if batcher.busy else WAITING_S if batcher.preparing else IDLE_S
        while self._connection.poll(wait):
            wait = 0.0
            match messages.decode_to_worker(self._connection.recv_bytes()):
                case Submit() as submit:
                    batcher.submit(submit)
                case Cancel(id):
                    batcher.cancel(id)
                case Ping(number):
                    self.send(Pong(number))
                case Stop():
                    self._running = False
