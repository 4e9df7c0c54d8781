"""The batch sizes of a warmed-up model that may be used: the smallest ones at once, the others when they have been opened."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from fastgen.serving.warm import TEXT_ROWS, Warm, denoiser_forward

if TYPE_CHECKING:
    from fastgen.generate.runner import ModelRunner

Kind = Literal["guided", "plain", "decode"]
Failure = Callable[[str, BaseException], Any]  # what could not be opened, and why


class _Task(NamedTuple):
    """A network at one size. `kind`: None for the text encoder, which has no sizes to choose from."""

    kind: Kind | None
    size: int


class Opened:
    """The sizes of each kind that may be used now, ascending.

    An engine that loads a network for every size takes some tenths of a second for each. With `later`, those beside the
    smallest are run once on a thread of their own, the largest first, while images are made already, which takes an engine that
    is `threadsafe`; without it all are open.
    """

    def __init__(self, pipeline: ModelRunner, warm: Warm, *, later: bool) -> None:
        self._pipeline = pipeline
        self._sizes: dict[Kind, tuple[int, ...]] = {"guided": warm.guided, "plain": warm.plain, "decode": warm.decode}
        self._waiting: list[_Task] = []
        self._opening: tuple[_Task, Future[Any]] | None = None
        self._pool: ThreadPoolExecutor | None = None
        if later:
            self._waiting = list(self._order())
            self._sizes = {kind: sizes[:1] for kind, sizes in self._sizes.items()}
            self._pool = ThreadPoolExecutor(1)

    def __getitem__(self, kind: Kind) -> tuple[int, ...]:
        return self._sizes[kind]

    @property
    def complete(self) -> bool:
        """Nothing more is to be opened."""
        return not self._waiting and self._opening is None

    def proceed(self, failed: Failure) -> None:
        """Take what has been opened, and begin with the next one. Never waits. `failed` is told of a size that cannot be
        opened; it is not used then."""
        if self._pool is None:
            return
        if self._opening is not None:
            task, opening = self._opening
            if not opening.done():
                return
            self._opening = None
            if (error := opening.exception()) is not None:
                failed(f"{task.kind or 'text_encoder'} at size {task.size}", error)
            elif task.kind is not None:
                self._sizes[task.kind] = tuple(sorted({*self._sizes[task.kind], task.size}))
        if self._waiting:
            task = self._waiting.pop(0)
            self._opening = task, self._pool.submit(run_once, self._pipeline, task.kind, task.size)
        else:
            self._pool.shutdown()
            self._pool = None

    def _order(self) -> Iterator[_Task]:
        """The largest size of each kind, so that a full step is one forward; what a single image needs; the others."""
        kinds: list[Kind] = [kind for kind, sizes in self._sizes.items() if sizes]
        first = [_Task(kind, self._sizes[kind][-1]) for kind in kinds]
        first += [_Task(kind, self._sizes[kind][0]) for kind in kinds]
        if self._pipeline.spec.condition.text is not None:
            first += [_Task(None, rows) for rows in TEXT_ROWS]
        rest = [_Task(kind, size) for kind in kinds for size in self._sizes[kind][:0:-1]]
        yield from dict.fromkeys((*first, *rest))


def run_once(pipeline: ModelRunner, kind: Kind | None, size: int) -> None:
    """One forward of a network at a size. `kind`: None for the text encoder."""
    if kind is None:
        pipeline.engine.probe("text_encoder", size)
    elif kind != "decode":
        denoiser_forward(pipeline.engine, size, guided=kind == "guided")()
    elif pipeline.spec.space.latent:
        pipeline.engine.probe("vae_decoder", size)


def run_all(pipeline: ModelRunner, warm: Warm) -> None:
    """One forward of every network at every size."""
    sizes: dict[Kind | None, tuple[int, ...]] = {"guided": warm.guided, "plain": warm.plain, "decode": warm.decode}
    if pipeline.spec.condition.text is not None:
        sizes[None] = TEXT_ROWS
    for kind, of_kind in sizes.items():
        for size in of_kind[::-1]:  # the largest first: a runtime may size its memory by it
            run_once(pipeline, kind, size)
