"""A picture of the server, from its task to its file; and the file formats."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from fastgen.files.png import png_bytes, to_image
from fastgen.generate.run import Run
from fastgen.serving.messages import Submit
from fastgen.serving.policy import Work

if TYPE_CHECKING:
    from fastgen.sampling.tables import SolverTable

QUALITY = 90  # of jpeg and webp by default


@dataclass(eq=False)
class Picture:
    """An image that was submitted. `run` and `work` are there once it is prepared, `slot` while it is denoised."""

    submit: Submit
    table: Future[SolverTable]
    run: Run = field(init=False)
    work: Work = field(init=False)
    slot: int | None = None
    begun: float = 0.0  # time.monotonic() of its first step
    due: list[int] = field(default_factory=list)  # rows after which a preview is due
    previews: int = 0  # that were sent

    @property
    def number(self) -> int:
        """Of its slot."""
        assert self.slot is not None
        return self.slot

    def preview_due(self, row: int) -> bool:
        """Whether a preview is due after `row` rows. Earlier ones that were not made are left out then."""
        due = bool(self.due) and row >= self.due[0]
        if due:
            self.due = [r for r in self.due if r > row]
        return due


def preview_rows(rows: int, previews: int) -> list[int]:
    """The rows after which previews are due: evenly spaced, before the last one, each once."""
    return sorted({math.ceil(rows * (i + 1) / (previews + 1)) for i in range(previews)} - {rows})


def image_file(pixels: np.ndarray, metadata: Mapping[str, Any], output_format: str, compression: int | None) -> bytes:
    """(H, W, channels) uint8 -> a file. PNG: with the metadata, as a job writes it. `compression`: quality of jpeg and webp."""
    if output_format == "png":
        return png_bytes(pixels, metadata)
    buffer, image = io.BytesIO(), to_image(pixels)
    quality = QUALITY if compression is None else compression
    if output_format == "jpeg":
        image.convert("RGB" if pixels.shape[-1] > 2 else "L").save(buffer, "JPEG", quality=quality)
    else:
        image.save(buffer, "WEBP", quality=quality)
    return buffer.getvalue()
