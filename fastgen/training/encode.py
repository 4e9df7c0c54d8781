"""What frozen networks say about the training data, computed once: VAE moments and text states."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from fastgen.data.cache import cached, read_array, write_array
from fastgen.training.sources import to_signed
from fastgen.training.vae import moments
from fastgen.weights import weights_hash

IMAGES, TEXTS = 16, 64  # per batch
STATISTICS = 4096  # examples that the latents' scale is measured on


@torch.no_grad()
def cached_moments(
    vae: Any, images: np.ndarray, fields: Mapping[str, Any], flip: bool, device: torch.device, progress: bool
) -> np.ndarray:
    """Moments of the latents (N, 1, 2C, h, w) float16, or (N, 2, ...) with the mirrored images' behind.

    `images` (N, H, W, 3) uint8; `fields` say where they come from.
    """
    vae.to(device)
    sides = 2 if flip else 1
    shape = tuple(moments(vae, to_signed(images[:1], device)).shape[1:])

    def encode(array: np.ndarray) -> None:
        for rows in _batches(len(images), IMAGES, "latents", progress):
            x = to_signed(images[rows], device)
            for side in range(sides):
                array[rows, side] = moments(vae, x.flip(-1) if side else x).cpu().numpy()

    def fill(folder: Path) -> None:
        write_array(folder, "moments", (len(images), sides, *shape), "float16", encode)

    return read_array(cached("moments", {**fields, "flip": flip, "vae": weights_hash(vae)}, fill), "moments")


def latent_scale(moments: np.ndarray, rows: np.ndarray) -> float:
    """1 / standard deviation of the latents: what makes them of unit variance (Rombach et al., 2022, appendix G)."""
    mean, logvar = np.split(moments[rows[:STATISTICS], 0].astype(np.float64), 2, axis=1)
    return float(1 / np.sqrt(mean.var() + np.exp(logvar).mean()))


@torch.no_grad()
def cached_states(encoder: Any, ids: np.ndarray, device: torch.device, progress: bool) -> np.ndarray:
    """Last hidden states (U, 77, D) float16 of token ids (U, 77)."""
    encoder.to(device)
    shape = (*ids.shape, encoder.config.hidden_size)

    def encode(array: np.ndarray) -> None:
        for rows in _batches(len(ids), TEXTS, "captions", progress):
            array[rows] = encoder(input_ids=torch.from_numpy(ids[rows]).to(device)).last_hidden_state.cpu().numpy()

    def fill(folder: Path) -> None:
        write_array(folder, "states", shape, "float16", encode)

    fields = {"ids": hashlib.sha256(ids.tobytes()).hexdigest(), "text_encoder": weights_hash(encoder)}
    return read_array(cached("states", fields, fill), "states")


def tokenize(tokenizer: Any, texts: Sequence[str], length: int) -> np.ndarray:
    """Token ids (N, length) int64, padded, and cut with the end token kept."""
    ids = tokenizer(list(texts), padding="max_length", truncation=True, max_length=length)["input_ids"]
    tokenizer.backend_tokenizer.no_padding()  # else the saved tokenizer.json would pad, which CLIP's does not
    tokenizer.backend_tokenizer.no_truncation()
    return np.array(ids, dtype=np.int64)


def _batches(count: int, size: int, title: str, progress: bool) -> Any:
    return tqdm(np.array_split(np.arange(count), -(-count // size)), desc=title, unit="batch", disable=not progress)
