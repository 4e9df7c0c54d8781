"""The figure of an image: what differs from a plain or transparent background."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

TOLERANCE = 24  # of 255, in any channel: what JPEG does to a plain background stays below it
OPAQUE = 16  # of 255, the least alpha of the figure's pixels
PLAIN = 0.5  # the least share of the border's pixels that have the background's colour


class FigureBox(NamedTuple):
    box: tuple[int, int, int, int]  # left, upper, right, lower, as Pillow counts
    background: tuple[int, int, int]


def find_figure(image: Image.Image, white: tuple[int, int, int] = (255, 255, 255)) -> FigureBox | None:
    """The smallest box around the figure of an RGB or RGBA image, and the colour around it.

    Transparent pixels are the background, with `white` as its colour; without such pixels the background is the colour of most
    of the border, within TOLERANCE. None where the border has no such colour, or all of the image is background.
    """
    pixels = np.asarray(image)  # (H, W, 3 or 4) uint8
    if pixels.shape[2] == 4 and (pixels[..., 3] < OPAQUE).any():
        return _boxed(pixels[..., 3] >= OPAQUE, white)
    pixels = pixels[..., :3]
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])  # (n, 3)
    colour = np.median(border, axis=0).round().astype(np.uint8)
    if _near(border, colour).mean() < PLAIN:
        return None
    return _boxed(~_near(pixels, colour), (int(colour[0]), int(colour[1]), int(colour[2])))


def _near(pixels: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Whether each pixel (..., 3) has the colour: (...)."""
    low, high = np.maximum(colour, TOLERANCE) - TOLERANCE, np.minimum(colour, 255 - TOLERANCE) + TOLERANCE
    return ((pixels >= low) & (pixels <= high)).all(axis=-1)


def _boxed(figure: np.ndarray, background: tuple[int, int, int]) -> FigureBox | None:
    rows, columns = np.flatnonzero(figure.any(axis=1)), np.flatnonzero(figure.any(axis=0))
    if not len(rows):
        return None
    return FigureBox((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1), background)
