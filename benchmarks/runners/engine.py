"""This package's engines, through its public API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

import fastgen
from fastgen.engines import engine_class


class Engine:
    """One engine. Image i comes from seed i, whatever the batch."""

    build_s = 0.0
    note: str | None = None

    def __init__(self, opening: Mapping[str, Any]) -> None:
        name = opening["name"]
        folder = opening["bundle"] if engine_class(name).source_kind == "bundle" else opening["model"]
        options = {} if opening["graphs"] is None else {"graphs": opening["graphs"]}
        self.pipeline = fastgen.load(
            folder, name, device=opening["device"], dtype=opening["dtype"], threads=opening["threads"], **options
        )
        self.dtype = self.pipeline.engine.dtype
        self.versions: dict[str, str] = {}

    def generate(self, job: Mapping[str, Any], latents: np.ndarray) -> np.ndarray:
        """(count, H, W, 3) uint8. `latents` are not needed: they are the noise of the same seeds."""
        given = {kind: job[kind] for kind in ("prompts", "labels") if kind in job}
        count, batch = job["count"], job["batch"]
        images = self.pipeline.generate(**given, seeds=range(count), batch_size=batch, num_inference_steps=job["steps"])
        return np.stack([np.asarray(image) for image in images])


def open_runner(opening: Mapping[str, Any]) -> Engine:
    return Engine(opening)
