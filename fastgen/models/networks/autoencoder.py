"""Autoencoders of diffusers as two networks: latents -> image, and image -> moments of the latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

EXACT_LOGVAR = -30.0  # log-variance of the latents of an autoencoder without a distribution


class VaeDecoder(nn.Module):
    """Unscaled latents (B, C, h, w) -> image (B, channels, H, W), nominally in [-1, 1]."""

    vae: Any

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: Tensor) -> Tensor:
        return self.vae.decode(latent_sample, return_dict=False)[0]


class VaeEncoder(nn.Module):
    """Image (B, channels, H, W) in [-1, 1] -> moments of the latents (B, 2C, h, w): mean and log-variance, unscaled."""

    vae: Any

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, sample: Tensor) -> Tensor:
        return moments(self.vae, sample)


@torch.no_grad()
def standardise(vae: Any, mean: Tensor, std: Tensor) -> None:
    """Replace the latents z of an AutoencoderKL by (z - mean) / std, channel by channel; mean and std (C,).

    Its 1x1 convolutions after the encoder and before the decoder take this up, so that it reconstructs as before, and whoever
    knows only `scaling_factor` needs to know nothing else. Raises ValueError for an autoencoder without them.
    """
    after, before = vae.quant_conv, vae.post_quant_conv
    if after is None or before is None:
        raise ValueError("the autoencoder has no quant_conv and post_quant_conv")
    channels = len(mean)
    after.weight[:channels] /= std[:, None, None, None]
    after.bias[:channels] = (after.bias[:channels] - mean) / std
    after.bias[channels:] -= 2 * std.log()  # of the log-variance
    before.bias += before.weight[:, :, 0, 0] @ mean
    before.weight *= std[None, :, None, None]


def moments(vae: Any, x: Tensor) -> Tensor:
    """Mean and log-variance of the latents (B, 2C, h, w) of an AutoencoderKL, AutoencoderTiny or VQModel."""
    hidden = vae.encoder(x)
    if getattr(vae, "quant_conv", None) is not None:
        hidden = vae.quant_conv(hidden)
    if type(vae).__name__ == "AutoencoderKL":
        return hidden
    return torch.cat([hidden, torch.full_like(hidden, EXACT_LOGVAR)], dim=1)
