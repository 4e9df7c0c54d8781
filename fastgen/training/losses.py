"""The terms of the denoising loss: the error of the prediction, and errors of the clean sample that it implies.

`unet.train.loss` of a preset has the weights of the terms, `unet.train.loss_from_epoch` the epochs at which they start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastgen.errors import FastgenError, InputError
from fastgen.presets import Training
from fastgen.training.sources import Space
from fastgen.training.tasks import loss_weights

# Loss term -> its weight unless the preset says otherwise.
TERMS = {"mse": 1.0, "lpips": 0.0, "kl": 0.0, "latent_perceptual": 0.0}
LATENTS_ONLY = ("kl", "latent_perceptual")
UP_BLOCKS = 2  # of the VAE decoder that latent_perceptual runs, behind its middle block
LPIPS_SIZE = 32  # px, the smallest image that its VGG-16 can see


@dataclass(frozen=True)
class Objective:
    """The weight of each term, and the epoch at which it starts."""

    weights: Mapping[str, float] = field(default_factory=lambda: dict(TERMS))
    from_epoch: Mapping[str, float] = field(default_factory=dict)
    min_snr_gamma: float = 0  # 0: every timestep weighs the same
    lpips: nn.Module | None = None

    def active(self, epoch: float) -> dict[str, float]:
        """The weights of the terms that count at this epoch, which may be a fraction."""
        return {name: w for name, w in self.weights.items() if w > 0 and self.from_epoch.get(name, 0) <= epoch}


@dataclass(frozen=True)
class Denoised:
    """The inputs of the terms for a micro-batch of b examples. Tensors are float32."""

    prediction: Tensor  # (b, C, h, w), of the network
    target: Tensor  # (b, C, h, w), of the prediction
    x0: Tensor  # (b, C, h, w), clean samples
    alphas_cumprod: Tensor  # (b,), at the examples' timesteps
    prediction_type: str
    implied_x0: Callable[[], Tensor]  # the clean samples that the prediction implies
    images: Callable[[], Tensor]  # of the examples: (b, 3, H, W) in [-1, 1]
    space: Space

    @cached_property
    def x0_hat(self) -> Tensor:
        """(b, C, h, w)."""
        return self.implied_x0()


def objective_of(recipe: Training, *, latents: bool, image_size: int) -> Objective:
    """The objective of a recipe, checked before training; LPIPS is loaded where it has a weight.

    Raises InputError for unknown terms, negative weights, terms that need latents where there are none, an objective
    without a term in the first epoch, and a missing package; FastgenError when LPIPS cannot be loaded.
    """
    where = "unet.train.loss"
    weights = loss_weights(recipe.loss, TERMS)
    loss_weights(recipe.loss_from_epoch, TERMS)
    for table, values in ((where, weights), (f"{where}_from_epoch", recipe.loss_from_epoch)):
        for name, value in values.items():
            if not 0 <= value < float("inf"):
                raise InputError(f"{table}.{name} = {value}: expected 0 or more")
    for name in LATENTS_ONLY:
        if weights[name] > 0 and not latents:
            reason = "looks at the autoencoder's latents, and this model works on pixels; use lpips, or mse alone"
            raise InputError(f"{where}.{name} = {weights[name]}: {reason}")
    objective = Objective(weights, dict(recipe.loss_from_epoch), recipe.min_snr_gamma)
    if not objective.active(0):
        reason = "no term counts in the first epoch, so nothing would be learned"
        raise InputError(f"{where} = {dict(recipe.loss)}: {reason}")
    if weights["lpips"] == 0:
        return objective
    if image_size < LPIPS_SIZE:
        reason = f"needs images of at least {LPIPS_SIZE} px, not {image_size}"
        raise InputError(f"{where}.lpips = {weights['lpips']}: {reason}")
    return replace(objective, lpips=load_lpips(weights["lpips"]))


def refuse_unet_keys(recipe: Training, name: str) -> None:
    """InputError for a key of another network's recipe that its training would ignore."""
    known = ("loss",) if name == "vae" else ()
    default = Training(steps=1)
    for key in ("loss", "loss_from_epoch", "min_snr_gamma", "timestep_shift", "color_jitter"):
        if (value := getattr(recipe, key)) != getattr(default, key) and key not in known:
            raise InputError(f"{name}.train.{key} = {value!r}: belongs to unet.train; {name} is trained without it")


def load_lpips(weight: float) -> nn.Module:
    """LPIPS with VGG-16 features (Zhang et al., 2018), frozen: its authors' package, which loads its weights itself."""
    place = f"unet.train.loss.lpips = {weight}"
    try:
        import lpips
    except (ImportError, RuntimeError, OSError) as error:  # RuntimeError: a torchvision built for another torch
        missing = isinstance(error, ImportError) and error.name == "lpips"
        problem = ": pip install lpips" if missing else f", which cannot be imported here: {error}"
        raise InputError(f"{place} needs the package lpips{problem}") from None
    try:
        return lpips.LPIPS(net="vgg", verbose=False).eval().requires_grad_(False)
    except (RuntimeError, OSError) as error:  # its backbone's weights are downloaded at the first use
        raise FastgenError(f"{place}: the weights of LPIPS cannot be loaded: {error}") from None


def evaluate(objective: Objective, active: Mapping[str, float], batch: Denoised) -> tuple[Tensor, dict[str, Tensor]]:
    """(weighted loss (b,), {term: its values before the weight (b,)}) of the terms `active`, with their weights.

    mse is weighted by min-SNR-gamma. The terms on the clean sample are multiplied by a = alphas_cumprod: the squared error of
    x0_hat = (x_t - sqrt(1 - a) eps) / sqrt(a) grows as 1 / a, so x0_hat is only a guess where x_t is nearly all noise. At
    zero terminal SNR these terms are 0.
    """
    terms = {name: _TERMS[name](batch, objective) for name in active}  # (b,)
    total = torch.stack([active[name] * value for name, value in terms.items()]).sum(0)
    return total, terms


def min_snr_weights(alphas_cumprod: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Weights (b,) of the squared error (Hang et al., Efficient Diffusion Training via Min-SNR Weighting, 2023).

    They are min(SNR, gamma) for the clean sample, divided by SNR for noise and by SNR + 1 for velocity, written in
    a = alphas_cumprod, SNR = a / (1 - a), so that all are finite at a = 0 and a = 1. At zero terminal SNR the last
    timestep weighs nothing for velocity: it is learned from its neighbours.
    """
    a = alphas_cumprod
    if prediction_type == "epsilon":
        return (gamma * (1 - a) / a).clamp(max=1)
    if prediction_type == "v_prediction":
        return torch.minimum(a, gamma * (1 - a))
    return (a / (1 - a)).clamp(max=gamma)


def _mse(batch: Denoised, objective: Objective) -> Tensor:
    error = functional.mse_loss(batch.prediction, batch.target, reduction="none").mean(dim=(1, 2, 3))
    if objective.min_snr_gamma == 0:
        return error
    return error * min_snr_weights(batch.alphas_cumprod, objective.min_snr_gamma, batch.prediction_type)


def _lpips(batch: Denoised, objective: Objective) -> Tensor:
    assert objective.lpips is not None
    with _without_fp16(batch.x0):
        distance = objective.lpips(batch.space.decode(batch.x0_hat).float(), batch.images())  # (b, 1, 1, 1)
    return distance.float().flatten() * batch.alphas_cumprod


def _kl(batch: Denoised, objective: Objective) -> Tensor:
    return moments_kl(batch.x0_hat) * batch.alphas_cumprod


def _latent_perceptual(batch: Denoised, objective: Objective) -> Tensor:
    space = batch.space
    with _without_fp16(batch.x0):
        predicted = decoder_features(space.vae, space.to_vae(batch.x0_hat))
        with torch.no_grad():
            true = decoder_features(space.vae, space.to_vae(batch.x0))
    return feature_distance(predicted, true) * batch.alphas_cumprod


_TERMS: dict[str, Callable[[Denoised, Objective], Tensor]] = {
    "mse": _mse,
    "lpips": _lpips,
    "kl": _kl,
    "latent_perceptual": _latent_perceptual,
}


def moments_kl(x: Tensor) -> Tensor:
    """KL(N(m, s^2) || N(0, 1)) = (m^2 + s^2 - 1 - ln s^2) / 2, where m and s^2 are the mean and the variance over space of
    one channel of one example of x (b, C, h, w); averaged over the channels: (b,).

    It keeps the predicted latents at unit variance, to which the autoencoder's latents are scaled. The latents of a real
    image are not at its minimum, so its weight should be small.
    """
    mean, variance = x.mean(dim=(2, 3)), x.var(dim=(2, 3), correction=0).clamp(min=1e-6)  # (b, C)
    return 0.5 * (mean**2 + variance - 1 - variance.log()).mean(dim=1)


def decoder_features(vae: Any, z: Tensor) -> list[Tensor]:
    """Features (b, D, H, W) of unscaled latents z (b, C, h, w) in an AutoencoderKL's decoder: the outputs of its middle block
    and of its first UP_BLOCKS up blocks."""
    decoder = vae.decoder
    hidden = decoder.conv_in(z if vae.post_quant_conv is None else vae.post_quant_conv(z))
    features = []
    for block in (decoder.mid_block, *decoder.up_blocks[:UP_BLOCKS]):
        hidden = block(hidden, None)
        features.append(hidden)
    return features


def feature_distance(predicted: list[Tensor], true: list[Tensor]) -> Tensor:
    """Squared distance (b,) of the feature vectors, each scaled to length 1, averaged over pixels and layers.

    Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric, 2018, eq. 1 without learned
    weights, on the autoencoder's own features as in Berrada et al., Boosting Latent Diffusion with Perceptual
    Objectives, 2024.
    """
    layers = []
    for pair in zip(predicted, true, strict=True):
        a, b = (functional.normalize(x.float(), dim=1, eps=1e-6) for x in pair)
        layers.append((a - b).square().sum(dim=1).mean(dim=(1, 2)))  # (b,)
    return torch.stack(layers).mean(0)


def _without_fp16(x: Tensor) -> AbstractContextManager[None]:
    """Keeps autocast to bf16, but turns off autocast to fp16, in which the decoder overflows on a bad x0_hat."""
    device = x.device.type
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    return torch.autocast(device, dtype=dtype, enabled=enabled and dtype is not torch.float16)
