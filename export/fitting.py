"""How much of a model computes in eight bits: as much as its pictures bear, found by making them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import numpy as np

from export.calibration import Span
from export.certificate import MIN_PSNR_DB, pictures_pass
from export.quantisation import Layer, Quantisation
from export.reference import decode_images, latents_peak, sample_latents, whole_runs
from export.sensitivity import UNSIGNED, Rounding, chosen, eight_bits, predicted_error
from fastgen.engines.eager.engine import Engine as Eager
from fastgen.errors import Say
from fastgen.generate.pipeline import Pipeline

if TYPE_CHECKING:
    from fastgen.models.folder import Model

# The most that eight bits may change in a network's output at first, relative L2. The certificate allows .1 (cosine .995), with
# what the precision around the layers adds; a decoder's output is the picture itself. Guidance multiplies the difference of two
# outputs, and with it their errors: the UNet's budget is for a guidance scale up to `GUIDANCE`, and falls with larger ones.
BUDGETS = {"unet": 0.04, "vae_decoder": 0.02}
GUIDANCE = 3.0
TRIES = 4
TIGHTER = 1.5  # by this factor falls the budget of a network that spoils the pictures
MARGIN_DB = 1.0  # of the average picture above the certificate's bound: engines round in other ways, and in bf16 around


def budget(network: str, guidance_scale: float) -> float:
    """The most that eight bits may change in this network's output at first, relative L2."""
    return BUDGETS[network] / (max(1.0, guidance_scale / GUIDANCE) if network == "unet" else 1.0)


def fit(
    model: Model,
    tables: Mapping[str, Sequence[Layer]],
    spans: Mapping[str, Mapping[str, Span]],
    reference: Mapping[str, np.ndarray],
    say: Say,
    dtype: str = "int8",
    rounding: Rounding = UNSIGNED,
) -> dict[str, Quantisation]:
    """Choose the layers that compute in eight bits, for each network that `tables` has the layers of.

    Eager makes the certificate's images in eight bits. Where they are too far from the `reference`, the network that spoils
    them gets a smaller budget, and they are made again. The last of `TRIES` choices is not tried: the certificate decides.
    `reference`: see `reference.read_reference`; `spans`: see `calibration.Calibration`; `rounding`: of the format `dtype`.
    """
    limits = {name: budget(name, model.spec.sampling.guidance_scale) for name in tables}
    for last in (False,) * (TRIES - 1) + (True,):
        found = {}
        for name, limit in limits.items():
            table = chosen(tables[name], limit)
            found[name] = Quantisation(limit, predicted_error(table), tuple(table))
        if last:
            break
        spoiler, average = _spoiler(model, found, spans, reference, rounding)
        if spoiler is None:
            say(f"{dtype}: images at {average:.1f} dB")
            break
        limits[spoiler] /= TIGHTER
        what = f"{dtype}: images at {average:.1f} dB are not near enough"
        say(f"{what}; {spoiler} may change by {limits[spoiler]:.3f} at most now")
    return found


def _spoiler(
    model: Model,
    found: Mapping[str, Quantisation],
    spans: Mapping[str, Mapping[str, Span]],
    reference: Mapping[str, np.ndarray],
    rounding: Rounding,
) -> tuple[str | None, float]:
    """The network that spoils the pictures, None where they are near enough, and the average PSNR that says so."""
    whole, pipeline = whole_runs(reference), Pipeline(model, Eager(model, device="cpu", dtype="fp32"))
    modules = model.networks()

    def in_eight_bits(name: str) -> AbstractContextManager[None]:
        return eight_bits(modules[name], found[name].layers, spans[name], rounding) if name in found else nullcontext()

    def pictures() -> tuple[bool, float]:
        images = decode_images(pipeline, latents[: len(whole.images)])
        return _near(np.clip(whole.images, -1, 1), np.clip(images, -1, 1))

    with in_eight_bits("unet"):
        latents = sample_latents(pipeline, whole.steps)
    if model.spec.space.latent and whole.latents is not None:
        near, psnr = _near(whole.latents, latents, latents_peak(whole.latents))
        if not near:
            return "unet", psnr
    with in_eight_bits("vae_decoder"):
        near, psnr = pictures()
    if near:
        return None, psnr
    decoder = "vae_decoder" in found and pictures()[0]  # whether fp32 decodes these latents well enough
    return "vae_decoder" if decoder else "unet", psnr


def _near(expected: np.ndarray, values: np.ndarray, peak: float = 1.0) -> tuple[bool, float]:
    """Whether images are as near as `fit` wants them, and their average PSNR in dB. `peak`: see `reference.psnr_db`."""
    passed, average, _ = pictures_pass(expected, values, peak)
    return passed and average >= MIN_PSNR_DB + MARGIN_DB, average
