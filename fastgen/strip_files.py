"""Strips as files of a job: one for each image, and an overview."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont

from fastgen.images import fit_text, read_metadata, read_pixels, save_image
from fastgen.names import STRIP_FOLDER
from fastgen.strips import PADDING, StripPlan

if TYPE_CHECKING:
    from fastgen.buckets import Batch
    from fastgen.jobs.writing import Writer
    from fastgen.pictures import Pictures

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

    def present(self, index: int) -> bool:
        """Whether the strip of image `index` is there, and shows these timesteps."""
        try:
            return read_metadata(self.files[index]).get("strip") == self.plan.to_json()
        except (OSError, KeyError, json.JSONDecodeError):
            return False

    def submit(self, writer: Writer, batch: Batch, pictures: Pictures, lines: Sequence[dict[str, Any]]) -> None:
        """Have the strips of a batch written, with their images' manifest lines; of pictures only."""
        rows = zip(self.files[batch.rows], pictures.strips or (), pictures.problems, lines[batch.rows], strict=True)
        for file, strip, problem, line in rows:
            if problem is None:
                writer.submit(file, strip, {**line, "strip": self.plan.to_json()})


def save_strip_sheet(path: Path, files: Sequence[Path], captions: Sequence[str], plan: StripPlan) -> None:
    """The first 16 strips below one another on white, timesteps above, what was asked for above each."""
    strips = [read_pixels(file) for file in files[:SHEET]]
    height, width, _ = strips[0].shape
    cell = width // len(plan.wanted)
    scale = math.ceil(96 / cell)  # so that the text can be read
    font = ImageFont.load_default(max(10, min(16, cell * scale // 8)))
    line = int(font.size * 1.4)  # type: ignore[union-attr]
    sheet = Image.new("RGB", (width * scale, line + len(strips) * (height * scale + line)), "white")
    draw = ImageDraw.Draw(sheet)
    for j, (wanted, shown) in enumerate(zip(plan.wanted, plan.shown, strict=True)):
        text = "final" if not wanted else f"t={wanted}" if shown == wanted else f"t={wanted} ({shown:g})"
        draw.text((j * cell * scale + PADDING, 0), fit_text(text, font, cell * scale), fill="black", font=font)
    for i, strip in enumerate(strips):
        top = line + i * (height * scale + line)
        draw.text((PADDING, top), fit_text(captions[i], font, width * scale - PADDING), fill="black", font=font)
        resized = Image.fromarray(strip).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        sheet.paste(resized, (0, top + line))
    save_image(path, sheet)
