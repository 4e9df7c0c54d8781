"""Strips as files of a job: one for each image, and an overview."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from fastgen.errors import InputError
from fastgen.files.names import STRIP_FOLDER
from fastgen.files.outputs import software
from fastgen.files.png import read_metadata, read_pixels, save_image, sheet
from fastgen.generate.job_record import without_bundle
from fastgen.generate.strips import PADDING, StripPlan

if TYPE_CHECKING:
    from fastgen.engines.batches import Batch
    from fastgen.generate.decoder import Pictures
    from fastgen.generate.writer import Writer

SHEET = 16  # strips in the overview


@dataclass(frozen=True)
class StripFiles:
    """The strips of a job: one file for each image."""

    plan: StripPlan
    files: list[Path]

    @classmethod
    def beside(cls, files: Sequence[Path], out: Path, plan: StripPlan) -> StripFiles:
        """Strips of the images `files` below `out`."""
        return cls(plan, [out / STRIP_FOLDER / file.relative_to(out) for file in files])

    def present(self, index: int, line: Mapping[str, Any]) -> bool:
        """Whether the strip of image `index`, which has this manifest line, exists and shows these timesteps. InputError for a
        file that is no strip of this image."""
        file = self.files[index]
        if not os.path.lexists(file):
            return False
        metadata = without_bundle(read_metadata(file) or {})
        strip = metadata.pop("strip", None)
        if file.is_symlink() or strip is None or metadata != without_bundle(line):
            raise InputError(f"{file}: is no strip of this job; move it away, or choose another --out")
        return strip == self.plan.to_json()

    def submit(self, writer: Writer, batch: Batch, pictures: Pictures, lines: Sequence[dict[str, Any]]) -> None:
        """Hand the strips of a batch to the writer, with the manifest lines of their images; broken images have none."""
        rows = zip(self.files[batch.rows], pictures.strips or (), pictures.problems, lines[batch.rows], strict=True)
        for file, strip, problem, line in rows:
            if problem is None:
                writer.submit(file, strip, {**line, "strip": self.plan.to_json()})


def save_strip_sheet(path: Path, files: Sequence[Path], captions: Sequence[str], plan: StripPlan) -> None:
    """The first 16 strips below one another: timesteps above the columns, a caption above each row."""
    rows = [_frames(read_pixels(file), len(plan.timesteps)) for file in files[:SHEET]]
    size = rows[0][0].width
    heads = [
        "final" if not t else f"t={t}" if nearest == t else f"t={t} ({nearest:g})"
        for t, nearest in zip(plan.timesteps, plan.nearest, strict=True)
    ]
    save_image(path, sheet(rows, cell=size * math.ceil(96 / size), heads=heads, titles=captions), software("job"))


def _frames(strip: np.ndarray, count: int) -> list[Image.Image]:
    """The frames that stand side by side in a strip."""
    if count == 1:
        return [Image.fromarray(strip)]
    size = strip.shape[0] - 2 * PADDING
    lefts = range(PADDING, strip.shape[1] - PADDING, size + PADDING)
    return [Image.fromarray(strip[PADDING:-PADDING, x : x + size]) for x in lefts]
