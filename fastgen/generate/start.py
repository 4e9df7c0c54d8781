"""Where a run starts: from noise, or late in the schedule from clean latents, to which that timestep's noise is added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from fastgen.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from fastgen.generate.requests import Request
    from fastgen.generate.runner import ModelRunner
    from fastgen.generate.settings import Settings

# Fields of job.json about a start, and of a PNG's metadata if there is one.
NO_START: dict[str, Any] = dict.fromkeys(("rag_sha256", "noise_steps", "rag_top_k", "queries_sha256"))
HELP = "give --rag INDEX too (fastgen index DATA --model MODEL --out INDEX)"


class Start(Protocol):
    """Clean latents for the requests of one run."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """The fields of NO_START without noise_steps: everything that the latents depend on."""

    @property
    def texts(self) -> Sequence[str]:
        """The texts that must be encoded before the latents are known, each once."""

    def latents(self, requests: Sequence[Request]) -> np.ndarray:
        """(B, C, h, w) float32, in the scale that the UNet sees."""

    def record(self, request: Request) -> Mapping[str, Any]:
        """Fields of the manifest line about this request's start."""


class StartSource(Protocol):
    """Gives each run its start; an index of training images does."""

    def start(self, pipeline: ModelRunner, requests: Sequence[Request], *, seed: int, top_k: int) -> Start:
        """The start of one run. Raises InputError for another model's source, and for a `top_k` below 1."""


def late_start(
    source: StartSource | None,
    pipeline: ModelRunner,
    requests: Sequence[Request],
    settings: Settings,
    *,
    noise_steps: int | None = None,
    strength: float | None = None,
    rag_top_k: int | None = None,
) -> tuple[Settings, Start | None]:
    """The settings and the start of a run from `source`; without a source the same settings, and None.

    `noise_steps`, or the share `strength` of the steps, is run, see `settings.late_steps`. `rag_top_k`: each image starts from
    one of its K nearest training images (1 if None). Raises InputError for these three without a source.
    """
    if source is None:
        if (noise_steps, strength, rag_top_k) != (None, None, None):
            raise InputError(f"noise_steps, strength and rag_top_k belong to an index; {HELP}")
        return settings, None
    late = settings.late(noise_steps, strength)
    return late, source.start(pipeline, requests, seed=settings.seed, top_k=1 if rag_top_k is None else rag_top_k)
