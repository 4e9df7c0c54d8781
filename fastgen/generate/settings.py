"""How images are sampled."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from fastgen.errors import InputError, unknown
from fastgen.generate.quantise import NORMALIZE
from fastgen.sampling.defaults import Sampling
from fastgen.sampling.tables import format_key

# The default share of the steps that a late start runs: the 60 of 70 at which a sweep of 20 to 60 was best.
STRENGTH = 6 / 7


@dataclass(frozen=True)
class Settings:
    """How images are sampled. `guidance_interval` (lo, hi): only the steps lo <= i < hi are guided.

    `noise_steps`: a late start from clean latents (start.py) that runs this many of the steps, the least noisy ones.
    `normalize`: how values become pixels, see `quantise.quantised`. `cache_interval` K: only every K-th evaluation runs the
    whole UNet, see feature_cache.py; 1: all do. Raises InputError for a value out of range.
    """

    scheduler: str
    num_inference_steps: int
    guidance_scale: float
    guidance_interval: tuple[int, int] | None = None
    seed: int = 0
    noise_steps: int | None = None
    normalize: str = "clamp"
    cache_interval: int = 1

    def __post_init__(self) -> None:
        if self.normalize not in NORMALIZE:
            raise unknown("normalize", self.normalize, NORMALIZE)
        if not self.scheduler or ":" in self.scheduler:
            raise InputError(f"scheduler is {self.scheduler!r}, expected a name such as ddim (steps are given apart)")
        if self.num_inference_steps < 1:
            raise InputError(f"num_inference_steps is {self.num_inference_steps}, expected at least 1")
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0):
            raise InputError(f"guidance_scale is {self.guidance_scale}, expected a finite number, 0 or more")
        if self.cache_interval < 1:
            raise InputError(f"cache_interval is {self.cache_interval}, expected at least 1")
        if self.noise_steps is not None and not 1 <= self.noise_steps <= self.num_inference_steps:
            expected = f"expected 1 to {self.num_inference_steps}, the number of inference steps"
            raise InputError(f"noise_steps is {self.noise_steps}, {expected}")

    @classmethod
    def of(
        cls,
        default: Sampling,
        *,
        scheduler: str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[int, int] | None = None,
        seed: int = 0,
        normalize: str = "clamp",
        cache_interval: int = 1,
    ) -> Settings:
        """Settings of a run that starts from noise; for None the model's `default`."""
        return cls(
            scheduler or default.scheduler,
            default.num_inference_steps if num_inference_steps is None else num_inference_steps,
            default.guidance_scale if guidance_scale is None else guidance_scale,
            guidance_interval,
            seed,
            normalize=normalize,
            cache_interval=cache_interval,
        )

    @property
    def solver(self) -> str:
        """The key of the solver table."""
        return format_key(self.scheduler, self.num_inference_steps, self.noise_steps)

    @property
    def guided(self) -> bool:
        return self.guidance_scale != 1.0

    def late(self, noise_steps: int | None = None, strength: float | None = None) -> Settings:
        """The same settings with a late start. Raises InputError as `late_steps` does."""
        return replace(self, noise_steps=late_steps(self.num_inference_steps, noise_steps, strength))


def late_steps(num_inference_steps: int, noise_steps: int | None = None, strength: float | None = None) -> int:
    """How many of the steps a late start runs: `noise_steps`, or the share `strength` of all, by default 6/7.

    Raises InputError when both are given, or a share outside (0, 1].
    """
    if noise_steps is not None and strength is not None:
        raise InputError("noise_steps and strength say the same thing twice; give one of them")
    if noise_steps is not None:
        return noise_steps
    share = STRENGTH if strength is None else strength
    if not 0 < share <= 1:
        raise InputError(f"strength is {share}, expected a share of the steps, more than 0 and at most 1")
    return max(1, round(share * num_inference_steps))
