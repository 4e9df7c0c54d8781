"""What diffusers' pipelines do besides running their networks: a folder is sampled as its own pipeline would."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from pathlib import Path
from typing import Any

from fastgen.errors import InputError

TEXT = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
XL = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline")
CONSISTENCY = ("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline")
OTHERS = ("DiTPipeline", "DDPMPipeline", "DDIMPipeline", "PNDMPipeline", "LDMPipeline", "ConsistencyModelPipeline")
STATISTICS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")  # of an autoencoder's latents
RUN = (*TEXT, *XL, *CONSISTENCY, *OTHERS)
# Pipeline -> (steps, guidance scale) that it takes where nothing is said; others take those of `defaults`.
DEFAULTS = {
    **dict.fromkeys(XL, (50, 5.0)),
    **dict.fromkeys(CONSISTENCY, (4, 8.5)),
    "DiTPipeline": (50, 4.0),
    "DDPMPipeline": (1000, 1.0),
    "ConsistencyModelPipeline": (1, 1.0),
}


def check_pipeline(name: str | None, folder: Path) -> None:
    """InputError for a pipeline of diffusers that samples in another way than fastgen: with perturbed attention, in stages,
    from an image. A name that diffusers does not have is somebody's own, whose networks say what it is."""
    import diffusers

    if name is not None and name not in RUN and hasattr(diffusers, name):
        raise InputError(f"{folder}: is a {name}, which samples in a way of its own; fastgen runs {', '.join(RUN)}")


def repaired_scheduler(name: str | None, config: dict[str, Any]) -> dict[str, Any]:
    """The scheduler config as Stable Diffusion's pipeline changes it when it is made: steps_offset 1, and no clipping, where
    the class has these options."""
    import diffusers

    if name not in TEXT:
        return config
    options = inspect.signature(getattr(diffusers, str(config.get("_class_name")), dict)).parameters
    return config | {key: value for key, value in (("steps_offset", 1), ("clip_sample", False)) if key in options}


def repair_size(name: str | None, unet: Any) -> None:
    """Set the sample_size of a UNet that diffusers before 0.9 wrote to 64, as Stable Diffusion's pipelines do."""
    from packaging.version import InvalidVersion, Version

    try:
        old = Version(str(unet.config.get("_diffusers_version", "1"))) < Version("0.9.0.dev0")
    except InvalidVersion:
        old = False
    size = unet.config.get("sample_size")
    if name in TEXT and old and isinstance(size, int) and size < 64:
        unet.register_to_config(sample_size=64)


def latent_statistics(name: str | None, vae: Any | None) -> Collection[str]:
    """Which statistics of the autoencoder's config count: those that the pipeline uses; all of them for somebody's own."""
    both = vae is not None and vae.config.get("latents_mean") is not None and vae.config.get("latents_std") is not None
    if name in XL:
        return ("scaling_factor", "latents_mean", "latents_std") if both else ("scaling_factor",)
    return ("scaling_factor",) if name in RUN else STATISTICS


def given_statistics(vae: Any) -> set[str]:
    """The statistics that an autoencoder's config has a value for."""
    return {key for key in STATISTICS if vae.config.get(key)}


def defaults(name: str | None, *, text: bool) -> tuple[int, float]:
    """(steps, guidance scale) where fastgen.json says nothing."""
    return DEFAULTS.get(str(name), (50, 7.5 if text else 1.0))
