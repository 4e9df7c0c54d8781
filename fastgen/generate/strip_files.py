"""Strips as files of a job: one for each image, and an overview."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from fastgen.errors import InputError
from fastgen.files.names import STRIP_FOLDER
from fastgen.files.png import sheet
from fastgen.files.store import Store
from fastgen.generate.job_record import without_bundle
from fastgen.generate.strips import PADDING, StripPlan

if TYPE_CHECKING:
    from fastgen.engines.batches import Batch
    from fastgen.generate.decoder import Pictures
    from fastgen.generate.writer import Writer

IN_STRIP_SHEET = 16  # strips in the overview, at most


@dataclass(frozen=True)
class StripFiles:
    """The strips of a job: one file for each image."""

    plan: StripPlan
    files: Sequence[str]

    @classmethod
    def beside(cls, files: Sequence[str], plan: StripPlan) -> StripFiles:
        """Strips of the images `files`."""
        return cls(plan, [f"{STRIP_FOLDER}/{file}" for file in files])

    def is_strip_of(self, store: Store, file: str, metadata: Mapping[str, Any], line: Mapping[str, Any]) -> bool:
        """Whether a strip that is there shows these timesteps. InputError for a file that is no strip of the image with this
        manifest line."""
        fields = dict(without_bundle(metadata))
        strip = fields.pop("strip", None)
        if store.is_link(file) or strip is None or fields != without_bundle(line):
            raise InputError(f"{store.place(file)}: is no strip of this job; move it away, or choose another --out")
        return strip == self.plan.to_json()

    def submit(self, writer: Writer, batch: Batch, pictures: Pictures, lines: Sequence[dict[str, Any]]) -> None:
        """Hand the strips of a batch to the writer, with the manifest lines of their images; broken images have none."""
        rows = zip(self.files[batch.rows], pictures.strips or (), pictures.problems, lines[batch.rows], strict=True)
        for file, strip, problem, line in rows:
            if problem is None:
                writer.submit(file, strip, {**line, "strip": self.plan.to_json()})


def strip_sheet(strips: Sequence[np.ndarray], captions: Sequence[str], plan: StripPlan) -> Image.Image:
    """Strips (H, W, 3) uint8 below one another: timesteps above the columns, a caption above each row."""
    rows = [_frames(strip, len(plan.timesteps)) for strip in strips]
    size = rows[0][0].width
    heads = [
        "final" if not t else f"t={t}" if nearest == t else f"t={t} ({nearest:g})"
        for t, nearest in zip(plan.timesteps, plan.nearest, strict=True)
    ]
    return sheet(rows, cell=size * math.ceil(96 / size), heads=heads, titles=captions)


def _frames(strip: np.ndarray, count: int) -> list[Image.Image]:
    """The frames that stand side by side in a strip."""
    if count == 1:
        return [Image.fromarray(strip)]
    size = strip.shape[0] - 2 * PADDING
    lefts = range(PADDING, strip.shape[1] - PADDING, size + PADDING)
    return [Image.fromarray(strip[PADDING:-PADDING, x : x + size]) for x in lefts]
