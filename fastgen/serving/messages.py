"""What the service and a worker process say to each other: typed records in MessagePack, one image at a time.

All times are `time.monotonic()`, which processes of one machine share.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Format = Literal["png", "jpeg", "webp"]


class Message(msgspec.Struct, frozen=True, tag=True):
    """Base class: the class's name travels with the fields."""


class ImageTask(msgspec.Struct, frozen=True):
    """One image: what to draw and how. None: the model's default. Fields as in `generate.requests.Request`, `settings.Settings`
    and `start.late_start`."""

    seed: int
    prompt: str | None = None
    labels: tuple[str, ...] | None = None
    scheduler: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[int, int] | None = None
    normalize: str = "clamp"
    rag: bool = False  # start from the nearest image of the server's index
    noise_steps: int | None = None
    strength: float | None = None
    rag_top_k: int | None = None
    previews: int = 0  # pictures on the way, evenly spaced
    output_format: Format = "png"
    output_compression: int | None = None  # quality of jpeg and webp, 0 to 100


# From the service.


class Submit(Message, frozen=True):
    """Make this image. `key`: of the fair share. `deadline`: give up then."""

    id: int
    task: ImageTask
    key: str
    arrival: float
    deadline: float | None = None


class Cancel(Message, frozen=True):
    """Forget this image; nothing more is said of it."""

    id: int


class Ping(Message, frozen=True):
    """Answer with Pong between two steps."""

    number: int


class Stop(Message, frozen=True):
    """End the process."""


# From the worker.


class Condition(msgspec.Struct, frozen=True):
    """What a model's requests hold. `kind`: see `models.condition.Condition.kind`. `names`: its labels or classes, in their
    order. `one`: takes exactly one of them."""

    kind: str
    takes: str
    names: tuple[str, ...] = ()
    one: bool = False
    tokens: int | None = None  # of a prompt


class Costs(msgspec.Struct, frozen=True):
    """Seconds of a step by images in it, measured. `guided`: with two rows per image. `decode`: of the pictures."""

    guided: dict[int, float]
    plain: dict[int, float]
    decode: dict[int, float]


class Loading(Message, frozen=True):
    """A line about what the worker does before it is ready."""

    line: str


class Ready(Message, frozen=True):
    """The model is loaded, its buckets are compiled, and one image was made.

    `defaults`: scheduler, num_inference_steps, guidance_scale. `slots`: images in a step, at most. `exact`: every picture has
    the bytes that `fastgen generate` gives for it alone, measured here. `schedulers`: names that clients may give.
    """

    condition: Condition
    defaults: dict[str, Any]
    size: tuple[int, int]  # height, width
    engine: str
    dtype: str
    device: str
    sha256: str
    checkpoint: str | None
    slots: int
    exact: bool
    schedulers: tuple[str, ...]
    costs: Costs
    rag: bool  # there is an index
    guidable: bool  # takes guidance scales other than 1


class Unready(Message, frozen=True):
    """The worker cannot serve this model; the process ends. `exit_code`: 2 for the user's input."""

    message: str
    exit_code: int


class Accepted(Message, frozen=True):
    """The image has a place. `rows`: evaluations of the denoiser, `guided` of them with guidance. `tokens`: of a prompt that
    was truncated."""

    id: int
    rows: int
    guided: int
    tokens: int | None = None


class Begun(Message, frozen=True):
    """These images take part in a step for the first time. It is said before the step: one of them may kill the process."""

    ids: tuple[int, ...]


class Refused(Message, frozen=True):
    """The image cannot be made: the request is wrong. `param`: the field."""

    id: int
    message: str
    param: str | None


class Tick(Message, frozen=True):
    """One step has run, or several short ones. `positions`: rows that have run of each image in it. `used`, `padding`: rows of
    the denoiser since the last Tick. `costs`: renewed measurements, now and then."""

    positions: dict[int, int]
    steps: int
    seconds: float
    used: int
    padding: int
    running: int
    waiting: int
    costs: Costs | None = None


class Preview(Message, frozen=True):
    """The clean image as predicted after `row` rows, number `index` (from 0) of the image's previews."""

    id: int
    index: int
    row: int
    data: bytes


class Finished(Message, frozen=True):
    """An image file, and its manifest line. `queue_s`: waited for its first step; `run_s`: from then to the end."""

    id: int
    data: bytes
    line: dict[str, Any]
    queue_s: float
    run_s: float


class Failed(Message, frozen=True):
    """This image could not be made; others are not concerned. `code`: `not_finite`, `engine_error` or `deadline`."""

    id: int
    message: str
    code: str


class Pong(Message, frozen=True):
    number: int


ToWorker = Submit | Cancel | Ping | Stop
FromWorker = Loading | Ready | Unready | Accepted | Begun | Refused | Tick | Preview | Finished | Failed | Pong

encode = msgspec.msgpack.Encoder().encode
decode_to_worker = msgspec.msgpack.Decoder(ToWorker).decode
decode_from_worker = msgspec.msgpack.Decoder(FromWorker).decode
