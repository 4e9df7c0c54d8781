"""The autoencoder's objective: reconstruction, edges, and a little KL divergence (Rombach et al., 2022, appendix G)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastgen.models.networks.autoencoder import moments
from fastgen.training.draws import Draws
from fastgen.training.previews import preview_rows
from fastgen.training.sources import POSTERIOR, flip_some, stack_rows, to_signed, to_uint8
from fastgen.training.tasks import Task, loss_weights

LOSS = {"l1": 1.0, "l2": 1.0, "edges": 1.0, "kl": 1e-6}


class Autoencoding(nn.Module):
    """AutoencoderKL with its noise as an argument."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (b, 3, H, W) in [-1, 1], noise (b, C, h, w) -> reconstruction, mean, log-variance."""
        mean, logvar = moments(self.vae, x).float().chunk(2, dim=1)  # (b, C, h, w) each
        latents = mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * noise
        return self.vae.decode(latents, return_dict=False)[0], mean, logvar.clamp(-30, 20)


class VaeTask(Task):
    """`loss` weighs the mean absolute and squared error, the absolute error of the differences between neighbouring
    pixels, and the KL divergence from N(0, 1) per pixel of the image."""

    name = "vae"

    def __init__(
        self,
        vae: Any,
        images: np.ndarray,
        rows: tuple[np.ndarray, np.ndarray],
        device: torch.device,
        *,
        flip: bool,
        loss: Mapping[str, float],
    ) -> None:
        super().__init__(Autoencoding(vae), rows)
        self.images, self.device, self.flip = images, device, flip
        self.weights = loss_weights(loss, LOSS)
        scale = 2 ** (len(vae.config.block_out_channels) - 1)
        self.shape = (int(vae.config.latent_channels), images.shape[1] // scale, images.shape[2] // scale)

    def losses(self, module: nn.Module, rows: np.ndarray, draws: Draws) -> Tensor:
        x = to_signed(self.images[rows], self.device)  # (b, 3, H, W)
        if self.flip and module.training:
            x = flip_some(x, draws)
        reconstruction, mean, logvar = module(x, draws.normal(POSTERIOR, self.shape))
        error = reconstruction.float() - x
        vertical, horizontal = error.diff(dim=2).abs(), error.diff(dim=3).abs()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar)
        terms = {
            "l1": error.abs().flatten(1).mean(1),
            "l2": error.square().flatten(1).mean(1),
            "edges": vertical.flatten(1).mean(1) + horizontal.flatten(1).mean(1),
            "kl": kl.flatten(1).sum(1) / x[0].numel(),
        }
        return torch.stack([self.weights[name] * value for name, value in terms.items()]).sum(0)  # (b,)

    def figures(self, module: nn.Module) -> dict[str, float]:
        x, reconstruction = self._reconstructions(module, self.validation_rows[:64])
        return {"psnr_db": float(-10 * ((reconstruction - x) / 2).square().mean().log10())}

    def preview(self, module: nn.Module) -> Image.Image:
        """Top: validation images; bottom: their reconstructions."""
        rows = preview_rows(self.validation_rows)
        return stack_rows(self.images[rows], to_uint8(self._reconstructions(module, rows)[1]))

    def _reconstructions(self, module: nn.Module, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        x = to_signed(self.images[rows], self.device)
        zero = torch.zeros((len(rows), *self.shape), device=self.device)
        return x, module(x, zero)[0].float().clamp(-1, 1)
