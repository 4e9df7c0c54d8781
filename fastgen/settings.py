"""How images are sampled."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastgen.errors import InputError, unknown
from fastgen.images import NORMALIZE
from fastgen.tables import SolverTable


@dataclass(frozen=True)
class Settings:
    """How images are sampled. `guidance_interval` limits guidance to the steps lo <= i < hi. `normalize`: how values become
    pixels, see `images.quantised`."""

    scheduler: str
    num_inference_steps: int
    guidance_scale: float
    guidance_interval: tuple[int, int] | None = None
    seed: int = 0
    normalize: str = "clamp"

    def __post_init__(self) -> None:
        if self.normalize not in NORMALIZE:
            raise unknown("normalize", self.normalize, NORMALIZE)
        if not self.scheduler or ":" in self.scheduler:
            raise InputError(f"scheduler is {self.scheduler!r}, expected a name such as ddim (steps are given apart)")
        if self.num_inference_steps < 1:
            raise InputError(f"num_inference_steps is {self.num_inference_steps}, expected at least 1")
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0):
            raise InputError(f"guidance_scale is {self.guidance_scale}, expected a finite number, 0 or more")

    @property
    def solver(self) -> str:
        """The key of the solver table."""
        return f"{self.scheduler}:{self.num_inference_steps}"

    @property
    def guided(self) -> bool:
        return self.guidance_scale != 1.0

    def check_interval(self, table: SolverTable) -> None:
        """InputError for a guidance interval outside the table's rows."""
        lo, hi = self.guidance_interval or (0, len(table))
        if not 0 <= lo < hi <= len(table):
            raise InputError(
                f"guidance_interval is {lo} {hi}, expected 0 <= LO < HI <= {len(table)}, the solver's rows"
            )
