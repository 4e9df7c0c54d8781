"""Colour jitter of training images."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastgen.training.draws import Draws

BRIGHTNESS, CONTRAST, SATURATION, VARIANT = range(6, 10)  # further streams of Draws
VARIANTS = 4  # colour-jittered copies cached per image; copy 0 is the original
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def color_jitter(x: Tensor, draws: Draws, amount: float) -> Tensor:
    """Multiplies brightness, contrast and saturation, in this order, of images (b, 3, H, W) in [-1, 1] by factors drawn for
    each image from [1 - amount, 1 + amount]; the arithmetic of torchvision's ColorJitter."""
    low = max(0.0, 1 - amount)

    def factors(stream: int) -> Tensor:
        values = low + (1 + amount - low) * draws.uniform(stream)
        return torch.from_numpy(values.astype(np.float32)).to(x.device)[:, None, None, None]  # (b, 1, 1, 1)

    x = ((x + 1) / 2 * factors(BRIGHTNESS)).clamp(0, 1)
    x = torch.lerp(grey(x).mean(dim=(2, 3), keepdim=True), x, factors(CONTRAST)).clamp(0, 1)
    x = torch.lerp(grey(x), x, factors(SATURATION)).clamp(0, 1)
    return 2 * x - 1


def light_variant(x: Tensor, rows: np.ndarray, variant: np.ndarray | int, amount: float) -> Tensor:
    """Colour-jittered copy number `variant` (b,), in [0, VARIANTS), of the images x (b, 3, H, W) of the examples `rows` (b,).

    Copy 0 is the image itself; the factors of the others depend on the example and the number alone.
    """
    draws = Draws(0, 0, rows * VARIANTS + variant, 1, x.device)
    mask = torch.from_numpy(np.broadcast_to(variant, rows.shape) > 0).to(x.device)
    return torch.where(mask[:, None, None, None], color_jitter(x, draws, amount), x)


def grey(x: Tensor) -> Tensor:
    """(b, 3, H, W) -> (b, 1, H, W)."""
    return (x * x.new_tensor(LUMA)[:, None, None]).sum(dim=1, keepdim=True)
