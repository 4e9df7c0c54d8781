"""Inputs of the denoising objective: clean samples and conditions of examples, from arrays computed once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastgen.generate.quantise import quantised
from fastgen.models.interface import latent_space
from fastgen.training.augment import VARIANT, color_jitter, light_variant
from fastgen.training.draws import Draws

NOISE, TIMESTEP, FLIP, CAPTION, DROPOUT, POSTERIOR = range(6)  # streams of Draws


class Space(ABC):
    """The space of the diffusion process, pixels or latents of the images `pixels` (N, H, W, 3) uint8.

    `flip` mirrors half of the examples; `jitter` is the largest relative change of brightness, contrast and saturation. The
    random numbers for both come from `draws`.
    """

    shape: tuple[int, int, int]
    vae: Any = None  # None where samples are pixels

    def __init__(self, pixels: np.ndarray, device: torch.device) -> None:
        self.pixels, self.device = pixels, device

    @abstractmethod
    def clean(self, rows: np.ndarray, draws: Draws, flip: bool = False, jitter: float = 0) -> Tensor:
        """Clean samples (b, *shape) float32 of the examples `rows` (b,)."""

    @abstractmethod
    def pictures(self, rows: np.ndarray, draws: Draws, flip: bool = False, jitter: float = 0) -> Tensor:
        """The images of which `clean` with the same arguments gives the samples: (b, 3, H, W) float32 in [-1, 1]."""

    def to_vae(self, samples: Tensor) -> Tensor:
        """Samples as the autoencoder's latents, see `models.space.Space.to_vae`."""
        return samples

    @abstractmethod
    def decode(self, samples: Tensor) -> Tensor:
        """(b, *shape) -> (b, 3, H, W), differentiable."""

    def images(self, samples: Tensor) -> np.ndarray:
        """(b, *shape) -> (b, H, W, 3) uint8."""
        return to_uint8(self.decode(samples))


class ConditionSource(Protocol):
    """Conditions of examples, as the denoiser takes them: multi-hot labels, class ids, text states, or nothing."""

    def of(self, rows: np.ndarray, draws: Draws, dropout: float) -> tuple[Tensor, ...]:
        """Tensors (b, ...); a share `dropout` of the rows is the unconditional one."""

    def pair(self, rows: np.ndarray) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(conditional, unconditional) of the examples, without random choices, for previews."""


class PixelSpace(Space):
    """Images themselves, scaled to [-1, 1]."""

    def __init__(self, images: np.ndarray, device: torch.device) -> None:
        super().__init__(images, device)
        self.shape = (3, images.shape[1], images.shape[2])

    def clean(self, rows: np.ndarray, draws: Draws, flip: bool = False, jitter: float = 0) -> Tensor:
        x = to_signed(self.pixels[rows], self.device)  # (b, 3, H, W)
        if jitter:
            x = color_jitter(x, draws, jitter)
        return flip_some(x, draws) if flip else x

    pictures = clean

    def decode(self, samples: Tensor) -> Tensor:
        return samples


class LatentSpace(Space):
    """Scaled VAE latents, sampled from cached moments (N, V, S, 2C, h, w) of V colour-jittered copies of each image (copy 0 is
    the image itself); S = 2 where the moments of the mirror images are cached too, else 1."""

    def __init__(self, moments: np.ndarray, images: np.ndarray, vae: Any, device: torch.device) -> None:
        super().__init__(images, device)
        self.moments, self.vae = moments, vae
        self._space = latent_space(vae, moments.shape[4:], images.shape[1:3])
        self.shape = (moments.shape[3] // 2, *moments.shape[4:])

    def clean(self, rows: np.ndarray, draws: Draws, flip: bool = False, jitter: float = 0) -> Tensor:
        side = draws.integers(FLIP, 2) if flip else 0
        moments = torch.from_numpy(self.moments[rows, self._variant(draws, jitter), side]).to(self.device).float()
        mean, logvar = moments.chunk(2, dim=1)  # (b, C, h, w) each
        latents = mean + torch.exp(0.5 * logvar) * draws.normal(POSTERIOR, self.shape)
        return self._space.from_vae(latents, self._tensor)

    def pictures(self, rows: np.ndarray, draws: Draws, flip: bool = False, jitter: float = 0) -> Tensor:
        x = to_signed(self.pixels[rows], self.device)  # (b, 3, H, W)
        if jitter:
            x = light_variant(x, rows, self._variant(draws, jitter), jitter)
        return flip_some(x, draws) if flip else x

    def decode(self, samples: Tensor) -> Tensor:
        return self.vae.decode(self.to_vae(samples), return_dict=False)[0]

    def to_vae(self, samples: Tensor) -> Tensor:
        return self._space.to_vae(samples, self._tensor)

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device)

    def _variant(self, draws: Draws, jitter: float) -> np.ndarray | int:
        return draws.integers(VARIANT, self.moments.shape[1]) if jitter else 0


class LabelSource:
    """Multi-hot vectors (N, num_labels); all zero is the unconditional one."""

    def __init__(self, multi_hot: np.ndarray, device: torch.device) -> None:
        self.multi_hot, self.device = multi_hot, device

    def of(self, rows: np.ndarray, draws: Draws, dropout: float) -> tuple[Tensor, ...]:
        mask = (draws.uniform(DROPOUT) >= dropout).astype(np.float32)  # (b,)
        return (torch.from_numpy(self.multi_hot[rows] * mask[:, None]).to(self.device),)

    def pair(self, rows: np.ndarray) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        labels = torch.from_numpy(self.multi_hot[rows]).to(self.device)
        return (labels,), (torch.zeros_like(labels),)


class ClassSource:
    """Class ids (N,) int64; `null_class` is the unconditional one."""

    def __init__(self, classes: np.ndarray, null_class: int, device: torch.device) -> None:
        self.classes, self.null_class, self.device = classes, null_class, device

    def of(self, rows: np.ndarray, draws: Draws, dropout: float) -> tuple[Tensor, ...]:
        ids = np.where(draws.uniform(DROPOUT) < dropout, self.null_class, self.classes[rows])
        return (torch.from_numpy(ids).to(self.device),)

    def pair(self, rows: np.ndarray) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        ids = torch.from_numpy(self.classes[rows]).to(self.device)
        return (ids,), (torch.full_like(ids, self.null_class),)


class NoCondition:
    """Of a model that is conditioned on nothing."""

    def of(self, rows: np.ndarray, draws: Draws, dropout: float) -> tuple[Tensor, ...]:
        return ()

    def pair(self, rows: np.ndarray) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return (), ()


class CaptionSource:
    """Cached text states (U, 77, D) of the distinct captions, row 0 of which is the empty prompt, the unconditional one."""

    def __init__(self, states: np.ndarray, choices: Sequence[np.ndarray], device: torch.device) -> None:
        self.states, self.choices, self.device = states, choices, device  # choices[example]: its rows of `states`

    def of(self, rows: np.ndarray, draws: Draws, dropout: float) -> tuple[Tensor, ...]:
        return self._states(np.where(draws.uniform(DROPOUT) < dropout, 0, draw_captions(self.choices, rows, draws)))

    def pair(self, rows: np.ndarray) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        first = np.array([self.choices[row][0] for row in rows])
        return self._states(first), self._states(np.zeros_like(first))

    def _states(self, captions: np.ndarray) -> tuple[Tensor, ...]:
        return (torch.from_numpy(self.states[captions]).to(self.device).float(),)  # (b, 77, D)


def draw_captions(choices: Sequence[np.ndarray], rows: np.ndarray, draws: Draws) -> np.ndarray:
    """A random caption of each of `rows` (b,), as an index (b,) int64; `choices[row]` has the indices of a row's captions."""
    counts = np.array([len(choices[row]) for row in rows])
    return np.array([choices[row][i] for row, i in zip(rows, draws.integers(CAPTION, counts), strict=True)])


def to_signed(images: np.ndarray, device: torch.device) -> Tensor:
    """(b, H, W, 3) uint8 -> (b, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(images)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(images: Tensor) -> np.ndarray:
    """(b, 3, H, W) in [-1, 1] -> (b, H, W, 3) uint8."""
    return quantised(images.float())[0].cpu().numpy()


def flip_some(x: Tensor, draws: Draws) -> Tensor:
    """Mirror a random half of the images (b, 3, H, W)."""
    mask = torch.from_numpy(draws.integers(FLIP, 2) == 1).to(x.device)
    return torch.where(mask[:, None, None, None], x.flip(-1), x)


def stack_rows(*rows: np.ndarray) -> Image.Image:
    """Rows of images, each (n, H, W, 3) uint8, as one picture."""
    return Image.fromarray(np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0))
