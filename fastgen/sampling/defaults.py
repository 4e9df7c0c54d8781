"""How a model generates unless told otherwise: part of its preset, of its folder and of its bundle."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from fastgen.files.records import Name, Record, Steps


class Sampling(Record, frozen=True):
    """A solver's name and number of steps, and the guidance scale (1: no guidance)."""

    scheduler: Name = "ddim"
    num_inference_steps: Steps = 50
    guidance_scale: Annotated[float, Meta(ge=0, le=1000)] = 1.0
