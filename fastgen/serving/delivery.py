"""Pictures of the server on their way out: states are decoded in batches of the warmed-up sizes, and become files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastgen.errors import first_line, one_line
from fastgen.generate.decoder import Pictures
from fastgen.serving.messages import Failed, Finished, FromWorker, Preview
from fastgen.serving.picture import Picture, image_file
from fastgen.serving.preparing import metadata_of

if TYPE_CHECKING:
    from fastgen.generate.runner import ModelRunner

Array = Any


@dataclass(frozen=True)
class _Decoding:
    """States that are being decoded, without the padding; `rows` that have run of those that are previews, else None."""

    pictures: Sequence[Picture]
    rows: Sequence[int | None]
    wait: Callable[[], Pictures]


class Delivery:
    """Decodes and delivers, `sizes()` images at once. On a GPU the decoding runs beside the next step: `outcomes` then tells
    what was begun before."""

    def __init__(self, pipeline: ModelRunner, sizes: Callable[[], Sequence[int]]) -> None:
        self._pipeline, self._sizes = pipeline, sizes
        self._begun: list[_Decoding] = []
        self._failed: list[Failed] = []

    def __len__(self) -> int:
        """Decodings that were begun and not told yet; failures are told at once."""
        return len(self._begun)

    @property
    def most(self) -> int:
        """Images that are decoded together, at most."""
        return max(self._sizes())

    def begin(self, pictures: Sequence[Picture], states: Array, rows: Sequence[int | None], normalize: str) -> None:
        """Begin to decode the states (B, C, h, w) of these pictures, in parts. Where the decoder fails, each is tried alone."""
        for first in range(0, len(pictures), self.most):
            part = slice(first, first + self.most)
            try:
                self._begin(pictures[part], states[part], rows[part], normalize)
            except Exception:  # told below, of the images that bring it about
                self._begin_alone(pictures[part], states[part], rows[part], normalize)

    def outcomes(self, begun_before: int) -> Iterator[FromWorker]:
        """What became of the first `begun_before` decodings."""
        done, self._begun = self._begun[:begun_before], self._begun[begun_before:]
        failed, self._failed = self._failed, []
        yield from failed
        for decoding in done:
            found = decoding.wait()
            for picture, row, pixels, problem in zip(
                decoding.pictures, decoding.rows, found.pixels, found.problems, strict=False
            ):
                yield self._message(picture, row, pixels, problem)

    def _begin(self, pictures: Sequence[Picture], states: Array, rows: Sequence[int | None], normalize: str) -> None:
        size = min(n for n in self._sizes() if n >= len(pictures))
        wait = self._pipeline.decoder.start(self._pipeline.engine.padded(states, size), normalize, size)
        self._begun.append(_Decoding(pictures, rows, wait))

    def _begin_alone(
        self, pictures: Sequence[Picture], states: Array, rows: Sequence[int | None], normalize: str
    ) -> None:
        for i, picture in enumerate(pictures):
            try:
                self._begin([picture], states[i : i + 1], rows[i : i + 1], normalize)
            except Exception as error:
                if rows[i] is None:  # a preview may be missing
                    self._failed.append(Failed(picture.submit.id, described(error), "engine_error"))

    def _message(self, picture: Picture, row: int | None, pixels: Any, problem: Any) -> FromWorker:
        submit, now = picture.submit, time.monotonic()
        task = submit.task
        if row is not None:
            picture.previews += 1
            data = image_file(pixels, {}, task.output_format, task.output_compression)
            return Preview(submit.id, picture.previews - 1, row, data)
        if problem:
            return Failed(submit.id, str(problem), "not_finite")
        line = metadata_of(picture.run)
        data = image_file(pixels, line, task.output_format, task.output_compression)
        return Finished(submit.id, data, line, picture.begun - submit.arrival, now - picture.begun)


def described(error: BaseException) -> str:
    """What failed, on one line."""
    return one_line(f"{type(error).__name__}: {first_line(error)}")
