"""A model of Triton's Python backend around the server's worker: requests join the running batch at any step.

Triton runs each instance in a process of its own. There a thread is the worker, as `fastgen serve` has it in a process: it is
spoken to over the same connection, with the same messages. Every image is one response (decoupled), sent when it is done.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
import numpy as np
import triton_python_backend_utils as pb_utils

from fastgen.errors import InputError, Say, one_line, unknown
from fastgen.files.jsonfiles import brief
from fastgen.serving.answers import dump
from fastgen.serving.errors import ApiError
from fastgen.serving.messages import (
    Cancel,
    Failed,
    Finished,
    FromWorker,
    Loading,
    Ready,
    Refused,
    Stop,
    Submit,
    ToWorker,
    Unready,
    decode_from_worker,
    encode,
)
from fastgen.serving.wire import Call, read_call
from fastgen.serving.worker import WorkerOptions, serve_model

if TYPE_CHECKING:
    from fastgen.generate.runner import ModelRunner

BUNDLE = "bundle"  # folder of the bundle, beside model.py
MAX_IMAGES = 256  # that wait or run; more are refused
LISTS = ("labels", "guidance_interval")  # inputs with any number of values, or two
END_S = 30.0  # for the thread to end its step
PARAMETERS: Mapping[str, Callable[[str], Any]] = {
    "engine": str,
    "device": str,
    "dtype": str,
    "threads": int,
    "max_images": int,
}


@dataclass
class Images:
    """The images of one request that have not ended: `left` of them."""

    sender: Any  # InferenceResponseSender
    left: int


class TritonPythonModel:
    """What Triton calls. `check`: see `WorkerOptions`. Triton's thread calls `initialize`, `execute` and `finalize`; a second
    one makes the images, a third one sends them, and a fourth one writes to the second, so that nobody waits for a step."""

    check: ClassVar[Callable[[ModelRunner, Say], None] | None] = None

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the bundle beside model.py and make a first image. Raises TritonModelException with one line."""
        try:
            given = _parameters(json.loads(args["model_config"]), args)
        except InputError as error:
            raise pb_utils.TritonModelException(one_line(str(error))) from None
        self._most = given.pop("max_images", MAX_IMAGES)
        folder = Path(args["model_repository"]) / args["model_version"] / BUNDLE
        options = WorkerOptions(folder, args["model_name"], check=type(self).check, **given)
        self._connection, theirs = Pipe()
        self._lock, self._numbers = threading.Lock(), itertools.count(1)
        self._images: dict[int, Images] = {}
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._ended: str | None = None  # why nothing more can be made
        self._worker = threading.Thread(target=_work, args=(theirs, options), daemon=True)
        self._worker.start()
        ready = self._until_ready(options.name)
        self._service: Any = SimpleNamespace(
            models={options.name: SimpleNamespace(info=ready)}, retry_after=1, keeps_jobs=True
        )
        self._exact = ready.exact
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._read, self._write)]
        for thread in self._threads:
            thread.start()

    def execute(self, requests: list[Any]) -> None:
        """Begin with the images of these requests; the responses come later. What is wrong is an error response at once."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._begin(read_call(dump(_fields(request)), self._service), sender)
            except InputError as error:
                _refuse(sender, one_line(str(error)), pb_utils.TritonError.INVALID_ARG)
            except ApiError as error:
                kinds = pb_utils.TritonError
                _refuse(sender, error.message, kinds.INVALID_ARG if error.status < 429 else kinds.UNAVAILABLE)

    def finalize(self) -> None:
        """End the threads. Requests that are still there get an error."""
        self._send(Stop())
        for thread in (self._worker, *self._threads):
            thread.join(END_S)
        self._connection.close()

    def _until_ready(self, name: str) -> Ready:
        while True:
            try:
                message = decode_from_worker(self._connection.recv_bytes())
            except EOFError:
                raise pb_utils.TritonModelException("the model could not be loaded; the log has the reason") from None
            match message:
                case Loading(line):
                    print(f"{name}: {line}", file=sys.stderr)
                case Unready(text, _):
                    raise pb_utils.TritonModelException(text)
                case Ready():
                    return message

    def _begin(self, call: Call, sender: Any) -> None:
        request, now = call.request, time.monotonic()
        deadline = None if request.deadline_s is None else now + request.deadline_s
        with self._lock:
            if self._ended is not None:
                raise ApiError(503, self._ended)
            if len(self._images) + request.n > self._most:
                raise ApiError(503, f"the model is busy: {len(self._images)} images wait or run; try again")
            numbers = list(itertools.islice(self._numbers, request.n))
            images = Images(sender, request.n)
            self._images |= dict.fromkeys(numbers, images)
        for i, number in enumerate(numbers):
            task = msgspec.structs.replace(request.task, seed=request.task.seed + i)
            self._send(Submit(number, task, request.key, now + i * 1e-6, deadline))

    def _send(self, message: ToWorker) -> None:
        self._outbox.put(encode(message))

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # the worker has ended; the reader tells the requests
            while (data := self._outbox.get()) is not None:
                self._connection.send_bytes(data)

    def _read(self) -> None:
        """Send what the worker says, until it ends."""
        try:
            while True:
                self._received(decode_from_worker(self._connection.recv_bytes()))
                self._cancel()
        except (EOFError, OSError):
            with self._lock:
                self._ended = "the model has ended; the log has the reason"
                left = list(self._images)
            for number in left:
                self._answer(number, _error(self._ended, pb_utils.TritonError.UNAVAILABLE))
            self._outbox.put(None)

    def _received(self, message: FromWorker) -> None:
        error = pb_utils.TritonError
        match message:
            case Finished(number, data, line, queue_s, run_s):
                about = {**line, "queue_s": queue_s, "run_s": run_s, "exact": self._exact}
                seed = pb_utils.Tensor("seed", np.array([line["seed"]], np.int64))
                tensors = [_text("image", data), seed, _text("metadata", dump(about))]
                self._answer(number, pb_utils.InferenceResponse(output_tensors=tensors))
            case Refused(number, text, _):
                self._answer(number, _error(text, error.INVALID_ARG))
            case Failed(number, text, code):
                self._answer(number, _error(text, error.UNAVAILABLE if code == "deadline" else error.INTERNAL))

    def _answer(self, number: int, response: Any) -> None:
        """The response of an image; with the last one the request ends."""
        with self._lock:
            images = self._images.pop(number, None)
            if images is None:  # it was cancelled
                return
            images.left -= 1
        images.sender.send(response, flags=0 if images.left else pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _cancel(self) -> None:
        """Give up the images of clients that have left."""
        with self._lock:
            gone = {number: images for number, images in self._images.items() if images.sender.is_cancelled()}
            for number in gone:
                del self._images[number]
        for number in gone:
            self._send(Cancel(number))
        for images in {id(images): images for images in gone.values()}.values():
            images.sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _work(connection: Any, options: WorkerOptions) -> None:
    """The worker's thread. However it ends, the reader sees the end of the connection."""
    try:
        serve_model(connection, options)
    finally:
        connection.close()


def _parameters(config: Mapping[str, Any], args: Mapping[str, str]) -> dict[str, Any]:
    """The parameters of config.pbtxt, and the instance's GPU as the device. Raises InputError. Names in capitals are
    Triton's own."""
    given: dict[str, Any] = {}
    for name, value in config.get("parameters", {}).items():
        if name.isupper():
            continue
        if name not in PARAMETERS:
            raise unknown("parameter", name, PARAMETERS)
        text = value["string_value"]
        try:
            given[name] = PARAMETERS[name](text)
        except ValueError:
            raise InputError(f"parameter {name}: found {brief(text)}, expected a whole number") from None
    if args["model_instance_kind"] == "GPU":
        given.setdefault("device", f"cuda:{args['model_instance_device_id']}")
    return given


def _fields(request: Any) -> dict[str, Any]:
    """The request's tensors as the fields of the HTTP API, which have the same names. Raises InputError."""
    fields: dict[str, Any] = {}
    for tensor in request.inputs():
        name, values = tensor.name(), tensor.as_numpy().reshape(-1).tolist()
        try:
            values = [value.decode() if isinstance(value, bytes) else value for value in values]
        except UnicodeDecodeError:
            raise InputError(f"{name}: is not UTF-8") from None
        if name not in LISTS and len(values) != 1:
            raise InputError(f"{name}: found {len(values)} values, expected one")
        if any(isinstance(value, float) and not math.isfinite(value) for value in values):
            raise InputError(f"{name}: found {values[0]}, expected a finite number")
        fields[name] = values if name in LISTS else values[0]
    return fields


def _text(name: str, data: bytes) -> Any:
    return pb_utils.Tensor(name, np.array([data], np.object_))


def _error(text: str, code: Any) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(text, code))


def _refuse(sender: Any, text: str, code: Any) -> None:
    sender.send(_error(text, code), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
