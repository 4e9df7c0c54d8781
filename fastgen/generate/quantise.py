"""Floating-point images -> 8 bits, and which of them are broken."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastgen.sampling.arrays import array_namespace

NORMALIZE = ("clamp", "min-max")  # how values become pixels


def quantised(images: Any, normalize: str = "clamp") -> tuple[Any, Any, Any, Any]:
    """Images (B, C, H, W) float32 of any array library -> pixels (B, H, W, C) uint8, and of each image the number of values
    that are not finite, the lowest and the highest value, clamped to [-1, 1]: (B,) each. All stay on the images' device.

    `normalize`: "clamp" maps [-1, 1] to 0 to 255; "min-max" maps the lowest value of a clamped image to 0 and its highest to
    255, as torchvision's `save_image(image, normalize=True)` does with one image.
    """
    xp = array_namespace(images)
    finite, axes = xp.isfinite(images), (1, 2, 3)
    broken = xp.sum(xp.astype(~finite, xp.int32), axis=axes)
    inside = xp.clip(xp.where(finite, images, xp.zeros_like(images)), -1.0, 1.0)
    low, high = xp.min(inside, axis=axes), xp.max(inside, axis=axes)
    if normalize == "min-max":
        bottom, span = low[:, None, None, None], xp.clip(high - low, 1e-5, None)[:, None, None, None]
        scaled = xp.floor((inside - bottom) / span * 255 + 0.5)
    else:
        scaled = xp.round(inside * 127.5 + 127.5)
    pixels = xp.permute_dims(xp.astype(scaled, xp.uint8), (0, 2, 3, 1))
    return pixels, broken, low, high


class ImageProblem(NamedTuple):
    """Why an image is broken: some values are not finite, or (`finite`) it is flat. `text`: the same in words."""

    finite: bool
    text: str

    def __str__(self) -> str:
        return self.text


def problem(image: np.ndarray) -> ImageProblem | None:
    """What is wrong with an image (C, H, W); None for a good one."""
    _, broken, low, high = quantised(image[None])
    return problem_of(image.size, broken[0], low[0], high[0])


def problem_of(size: int, broken: int, low: float, high: float) -> ImageProblem | None:
    """`problem` of an image of `size` values, from the numbers that `quantised` returns."""
    if broken:
        return ImageProblem(False, f"{int(broken)} of {size} values are not finite")
    if high - low < 1 / 255:
        return ImageProblem(True, f"flat: every value, clamped to [-1, 1], lies within 1/255 of {float(low):.3f}")
    return None
