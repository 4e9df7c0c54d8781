"""Outputs of frozen networks for the training data, computed once and cached: VAE moments and text states."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastgen.data.cache import cached, read_array, write_array
from fastgen.models.networks.autoencoder import moments
from fastgen.models.weights import weights_hash
from fastgen.training.augment import VARIANTS, light_variant
from fastgen.training.logs import say
from fastgen.training.sources import to_signed

IMAGES, TEXTS = 16, 64  # per batch
STATISTICS = 2048  # examples that the latents' scale is measured on


@torch.no_grad()
def cached_moments(
    vae: Any,
    images: np.ndarray,
    fields: Mapping[str, Any],
    flip: bool,
    device: torch.device,
    progress: bool,
    jitter: float = 0,
) -> np.ndarray:
    """Moments of the latents (N, V, S, 2C, h, w) float16 of images (N, H, W, 3) uint8.

    V = VARIANTS colour-jittered copies with `jitter`, else 1; S = 2 with `flip` (the image and its mirror image), else 1.
    `fields` identify the images in the cache key.
    """
    vae.to(device)
    variants, sides = VARIANTS if jitter else 1, 2 if flip else 1
    shape = (len(images), variants, sides, *moments(vae, to_signed(images[:1], device)).shape[1:])

    def encode(array: np.ndarray) -> None:
        for rows in _batches(len(images), IMAGES, "latents", progress):
            x = to_signed(images[rows], device)
            for variant in range(variants):
                variant_x = light_variant(x, rows, variant, jitter) if variant else x
                for side in range(sides):
                    array[rows, variant, side] = moments(vae, variant_x.flip(-1) if side else variant_x).cpu().numpy()

    def fill(folder: Path) -> None:
        if jitter:
            total = f"{math.prod(shape) * 2 / 1e9:.2g} GB in all"
            say(f"note: color_jitter: the latents of {VARIANTS} variants of every image are cached, {total}")
        write_array(folder, "moments", shape, "float16", encode)

    identity = {**fields, "flip": flip, "jitter": jitter, "variants": variants, "vae": weights_hash(vae)}
    return read_array(cached("moments", identity, fill), "moments")


@torch.no_grad()
def latent_statistics(vae: Any, images: np.ndarray, rows: np.ndarray, device: torch.device) -> Tensor:
    """Mean and standard deviation (2, C) of the latents' channels, on up to STATISTICS of the `rows` of images (N, H, W, 3)."""
    vae.to(device)
    rows = rows[np.linspace(0, len(rows) - 1, min(STATISTICS, len(rows))).astype(int)]
    parts = np.array_split(rows, -(-len(rows) // IMAGES))
    batches = [moments(vae, to_signed(images[part], device)) for part in parts]
    mean, logvar = torch.cat(batches).double().chunk(2, dim=1)
    variance = mean.var(dim=(0, 2, 3)) + logvar.exp().mean(dim=(0, 2, 3))
    return torch.stack([mean.mean(dim=(0, 2, 3)), variance.sqrt()]).float()


def latent_scale(moments: np.ndarray, rows: np.ndarray) -> float:
    """1 / standard deviation of the latents: scales them to unit variance (Rombach et al., 2022, appendix G)."""
    mean, logvar = np.split(moments[rows[:STATISTICS], 0, 0].astype(np.float64), 2, axis=1)
    return float(1 / np.sqrt(mean.var() + np.exp(logvar).mean()))


@torch.no_grad()
def cached_states(encoder: Any, ids: np.ndarray, device: torch.device, progress: bool) -> np.ndarray:
    """Last hidden states (U, 77, D) float16 of token ids (U, 77)."""
    encoder.to(device)
    shape = (*ids.shape, encoder.config.hidden_size)

    def encode(array: np.ndarray) -> None:
        for rows in _batches(len(ids), TEXTS, "captions", progress):
            array[rows] = encoder(input_ids=torch.from_numpy(ids[rows]).to(device)).last_hidden_state.cpu().numpy()

    fields = {"ids": hashlib.sha256(ids.tobytes()).hexdigest(), "text_encoder": weights_hash(encoder)}
    folder = cached("states", fields, lambda folder: write_array(folder, "states", shape, "float16", encode))
    return read_array(folder, "states")


def tokenize(tokenizer: Any, texts: Sequence[str], length: int) -> np.ndarray:
    """Token ids (N, length) int64, padded, or cut to `length` with the end token last."""
    ids = tokenizer(list(texts), padding="max_length", truncation=True, max_length=length)["input_ids"]
    tokenizer.backend_tokenizer.no_padding()  # else the saved tokenizer.json would pad, which CLIP's does not
    tokenizer.backend_tokenizer.no_truncation()
    return np.array(ids, dtype=np.int64)


def _batches(count: int, size: int, title: str, progress: bool) -> Any:
    return tqdm(np.array_split(np.arange(count), -(-count // size)), desc=title, unit="batch", disable=not progress)
