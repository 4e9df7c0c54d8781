"""How a model generates unless told otherwise: part of its preset, of its folder and of its bundle."""

from __future__ import annotations

from dataclasses import dataclass

from fastgen.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """A solver's name and number of steps, and the guidance scale (1: no guidance). Raises InputError."""

    scheduler: str = "ddim"
    num_inference_steps: int = 50
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.num_inference_steps >= 1:
            raise InputError(f"sampling.num_inference_steps = {self.num_inference_steps!r}: expected at least 1")
        if not self.guidance_scale >= 0:
            raise InputError(f"sampling.guidance_scale = {self.guidance_scale!r}: expected 0 or more")
