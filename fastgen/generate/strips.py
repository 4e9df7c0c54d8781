"""Denoising strips: the state x_t at some timesteps of an image's run, side by side, clamped or decoded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastgen.errors import InputError
from fastgen.files.png import image_grid
from fastgen.generate.decoder import Pictures
from fastgen.sampling.tables import SolverTable

if TYPE_CHECKING:
    from fastgen.engines.base import Array

MOST = 64  # frames of a strip
PADDING = 2
MOST_LOG_SIGMA = 2.0  # a network that gets log(sigma) / 4, or a share of the way, gets no more at the first step


@dataclass(frozen=True)
class StripPlan:
    """Which states of a run a strip shows. For each of `timesteps` it is the state after row `rows[j]` (-1: the first state),
    which is at the timestep `nearest[j]`. Times `scales[j]` it is x_t = alpha x0 + sigma noise: solvers in the space of sigmas
    divide that by alpha."""

    timesteps: tuple[int, ...]
    rows: tuple[int, ...]
    nearest: tuple[float, ...]
    scales: tuple[float, ...]

    @classmethod
    def of(cls, table: SolverTable, timesteps: Sequence[int], num_train_timesteps: int) -> StripPlan:
        """0 is the final image. Raises InputError for timesteps that training never saw, none at all, or too many."""
        if not 1 <= len(timesteps) <= MOST:
            raise InputError(f"strip holds {len(timesteps)} timesteps, expected 1 to {MOST}")
        times = table.timesteps
        if (
            times.min() < 0
            or times.max() > num_train_timesteps
            or (times.max() <= MOST_LOG_SIGMA and (times % 1).any())
        ):
            raise InputError(
                f"strip: solver {table.key} has no training timesteps: the network gets {times[0]:g} to {times[-1]:g}, a "
                "function of the noise level"
            )
        for timestep in timesteps:
            if not 0 <= timestep < num_train_timesteps:
                raise InputError(
                    f"strip: timestep {timestep} is out of range, expected 0 (the final image) to {num_train_timesteps - 1}"
                )
        rows, state_times = (
            len(table),
            np.append(table.timesteps, 0.0),
        )  # row i sees state i - 1; the final state is at 0
        # Of several states at one timestep the last, as a corrector's replaces its predictor's.
        states = [rows - int(np.argmin(np.abs(state_times[::-1] - t))) if t else rows for t in timesteps]
        nearest, scales = state_times[states].tolist(), np.append(table.scale, 1.0)[states].tolist()
        return cls(tuple(timesteps), tuple(i - 1 for i in states), tuple(nearest), tuple(scales))

    def to_json(self) -> dict[str, Any]:
        """For the strip's metadata."""
        return {"timesteps": list(self.timesteps), "nearest": list(self.nearest), "state": "x_t"}


class Frames:
    """Keeps the states that the strips of a batch of `count` images show."""

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
        """Begin to `decode` the states, and return a function that waits for the `final` pictures and adds their strips."""
        waits = {row: decode(x) for row, x in self._states.items() if row != self._last}

        def wait() -> Pictures:
            pictures = final()
            images = {row: ready().pixels for row, ready in waits.items()} | {self._last: pictures.pixels}
            columns = [images[row] for row in self._plan.rows]
            strips = [image_grid(frames, len(frames), PADDING) for frames in zip(*columns, strict=True)]
            return dataclasses.replace(pictures, strips=strips)

        return wait


def parse_timesteps(text: str) -> list[int]:
    """`900,500,200,0` -> numbers. Raises InputError."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and len(word) < 10 for word in words):
        raise InputError(f"strip is {text!r}, expected training timesteps such as 900,500,200,0")
    return [int(word) for word in words]
