"""Denoising strips: the state x_t of an image's run at some timesteps, side by side, as it is (clamped, or decoded)."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fastgen.errors import InputError
from fastgen.images import fit_text, image_grid, read_metadata, read_pixels, save_image
from fastgen.names import STRIP_FOLDER
from fastgen.pictures import Pictures
from fastgen.tables import SolverTable

if TYPE_CHECKING:
    from fastgen.buckets import Batch
    from fastgen.engines.base import Array
    from fastgen.jobs.writing import Writer

MOST = 64  # frames of a strip
PADDING = 2
SHEET = 16  # strips in the overview


@dataclass(frozen=True)
class StripPlan:
    """Which states of a run a strip shows: `rows[j]` is the row after which the state stands nearest to timestep `wanted[j]`
    (-1: the state that the run starts from), namely at `shown[j]`. Times `scales[j]` it is x_t = alpha x0 + sigma noise, which
    solvers in the space of sigmas divide by alpha."""

    wanted: tuple[int, ...]
    rows: tuple[int, ...]
    shown: tuple[float, ...]
    scales: tuple[float, ...]

    @classmethod
    def of(cls, table: SolverTable, wanted: Sequence[int], num_train_timesteps: int) -> StripPlan:
        """0 is the final image. Raises InputError for timesteps that training never saw, none at all, or too many."""
        if not 1 <= len(wanted) <= MOST:
            raise InputError(f"strip holds {len(wanted)} timesteps, expected 1 to {MOST}")
        for timestep in wanted:
            if not 0 <= timestep < num_train_timesteps:
                raise InputError(
                    f"strip: timestep {timestep} is out of range, expected 0 (the final image) to {num_train_timesteps - 1}"
                )
        stands = np.append(table.timesteps, 0.0)  # state i - 1 is what row i sees; the final state is at 0
        scales = np.append(table.scale, 1.0)
        # of states at the same timestep the last: a predictor's is replaced by its corrector's
        nearest = [len(table) - int(np.argmin(np.abs(stands[::-1] - t))) if t else len(table) for t in wanted]
        return cls(
            tuple(wanted),
            tuple(i - 1 for i in nearest),
            tuple(float(stands[i]) for i in nearest),
            tuple(float(scales[i]) for i in nearest),
        )

    def to_json(self) -> dict[str, Any]:
        """For the strip's metadata."""
        return {"timesteps": list(self.wanted), "nearest": list(self.shown), "state": "x_t"}


class Frames:
    """Keeps the states that a strip shows while a batch of `count` images runs."""

    def __init__(self, plan: StripPlan, count: int) -> None:
        self._plan, self._count = plan, count
        self._states: dict[int, Array] = {}
        self._last = -1

    def keep(self, row: int, x: Array) -> None:
        """The state x (B, C, h, w) after this row, which may be overwritten later."""
        if row in self._plan.rows:
            self._states[row] = self._plan.scales[self._plan.rows.index(row)] * x[: self._count]
        self._last = row

    def start(
        self, decode: Callable[[Array], Callable[[], Pictures]], final: Callable[[], Pictures]
    ) -> Callable[[], Pictures]:
        """Begin to `decode` the states; the call that is returned waits for the `final` pictures, with their strips."""
        waits = {row: decode(x) for row, x in self._states.items() if row != self._last}

        def wait() -> Pictures:
            pictures = final()
            frames = {row: ready().pixels for row, ready in waits.items()} | {self._last: pictures.pixels}
            columns = [frames[row] for row in self._plan.rows]
            strips = [_strip([column[i] for column in columns]) for i in range(self._count)]
            return dataclasses.replace(pictures, strips=strips)

        return wait


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


def parse_timesteps(text: str) -> list[int]:
    """`900,500,200,0` -> numbers. Raises InputError."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and len(word) < 10 for word in words):
        raise InputError(f"strip is {text!r}, expected training timesteps such as 900,500,200,0")
    return [int(word) for word in words]


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


def _strip(frames: Sequence[np.ndarray]) -> np.ndarray:
    """Frames (H, W, 3) side by side."""
    return image_grid(frames, columns=len(frames), padding=PADDING)
