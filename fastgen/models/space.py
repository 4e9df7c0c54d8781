"""The space that a model denoises in: pixels, or the latents of an autoencoder. No torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastgen.errors import InputError
from fastgen.files.records import Edge, Factor, Record, Width

WRITABLE = {1: "grey", 2: "grey with transparency", 3: "RGB", 4: "RGB with transparency"}  # channels of a PNG


class Space(Record, frozen=True):
    """`shape` (C, h, w) is denoised; `image` (C, H, W) is the picture, in [-1, 1]. Both are the same in pixel space.

    In latent space (`latent`) the autoencoder's latents are z * std / scaling_factor + mean + shift_factor for a state z, each
    channel with its own mean and std where these are given (`latents_mean`, `latents_std` in diffusers).
    """

    shape: tuple[Width, Edge, Edge]
    image: tuple[Width, Edge, Edge]
    latent: bool
    scaling_factor: Factor = 1.0
    shift_factor: Factor = 0.0
    mean: tuple[Factor, ...] = ()
    std: tuple[Factor, ...] = ()

    def __post_init__(self) -> None:
        problem = f"found {list(self.shape)} with an image of {list(self.image)}"
        if not self.latent and self.shape != self.image:
            raise InputError(f"space.shape: {problem}, expected the same: this is no latent space")
        if any(pixels % edge for pixels, edge in zip(self.image[1:], self.shape[1:], strict=True)):
            raise InputError(f"space.shape: {problem}, expected edges that divide the image's")
        if self.scaling_factor == 0:
            raise InputError("space.scaling_factor: found 0, expected another number")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (0, self.shape[0]):
                found = f"found {len(values)} numbers, expected {self.shape[0]}"
                raise InputError(f"space.{name}: {found}, one for each channel")

    @property
    def pixels(self) -> int:
        """Pixels of an image."""
        return self.image[1] * self.image[2]

    @property
    def size(self) -> str:
        """`64 px`, or `96 x 64 px` (width x height)."""
        _, height, width = self.image
        return f"{height} px" if height == width else f"{width} x {height} px"

    def check_writable(self) -> None:
        """InputError for images that are no PNG: they have 1 to 4 channels."""
        if self.image[0] not in WRITABLE:
            raise InputError(f"this model's images have {self.image[0]} channels; PNG files have 1 to 4")

    def to_vae(self, z: Any, array: Callable[[np.ndarray], Any] = lambda values: values) -> Any:
        """States (B, C, h, w) -> the autoencoder's latents. `array`: NumPy -> the library of z."""
        if not self.mean and not self.std:
            x = z / self.scaling_factor
            return x + self.shift_factor if self.shift_factor else x
        return z * array(self._channels(self.std, 1.0) / np.float32(self.scaling_factor)) + array(self._offset())

    def from_vae(self, latents: Any, array: Callable[[np.ndarray], Any] = lambda values: values) -> Any:
        """The autoencoder's latents (B, C, h, w) -> states, the inverse of `to_vae`."""
        if not self.mean and not self.std:
            x = latents - self.shift_factor if self.shift_factor else latents
            return x * self.scaling_factor
        return (latents - array(self._offset())) * array(
            np.float32(self.scaling_factor) / self._channels(self.std, 1.0)
        )

    def _offset(self) -> np.ndarray:
        return self._channels(self.mean, 0.0) + np.float32(self.shift_factor)

    def _channels(self, values: tuple[float, ...], default: float) -> np.ndarray:
        """(1, C, 1, 1) float32"""
        return np.array(values or [default] * self.shape[0], np.float32).reshape(1, -1, 1, 1)
