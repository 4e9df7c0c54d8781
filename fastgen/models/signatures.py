"""One declaration per network: names, dtypes and symbolic shapes of its inputs and outputs.

ONNX dynamic axes, sample inputs, engine shapes and buffers derive from it. The names are optimum's, so that its pipelines load
our bundles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

BATCH = "batch"
EXACT = ("text_encoder",)  # networks that stay fp32: they run once per prompt, and all images depend on them


@dataclass(frozen=True)
class TensorSpec:
    """One input or output. `shape` holds ints and, for the batch axis, the string "batch". Integer tensors are ids in
    [0, `high`)."""

    name: str
    dtype: str  # "float32" | "int64"
    shape: tuple[int | str, ...]
    high: int = 0

    def with_batch(self, batch: int) -> tuple[int, ...]:
        return tuple(batch if axis == BATCH else int(axis) for axis in self.shape)

    def sample(self, batch: int, rng: np.random.Generator) -> np.ndarray:
        """A random input of this shape: ids for integers, N(0, 1) for floats."""
        shape = self.with_batch(batch)
        if self.dtype == "int64":
            return rng.integers(0, self.high, shape, dtype=np.int64)
        return rng.standard_normal(shape).astype(self.dtype)


@dataclass(frozen=True)
class Signature:
    """The interface of one network."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def sample_inputs(self, batch: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {t.name: t.sample(batch, rng) for t in self.inputs}

    def to_json(self) -> dict[str, Any]:
        def rows(tensors: tuple[TensorSpec, ...]) -> list[dict[str, Any]]:
            return [{"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "high": t.high} for t in tensors]

        return {"inputs": rows(self.inputs), "outputs": rows(self.outputs)}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Signature:
        def tensors(rows: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
            return tuple(TensorSpec(r["name"], r["dtype"], tuple(r["shape"]), r["high"]) for r in rows)

        return Signature(tensors(value["inputs"]), tensors(value["outputs"]))


def network_dtype(network: str, dtype: str) -> str:
    """The precision ("fp32", "fp16", "bf16") that `network` is executed in by an engine of precision `dtype`."""
    return "fp32" if network in EXACT else dtype


def text_signatures(
    *, latents: tuple[int, int, int], image_size: int, tokens: int, width: int, pooled: int, vocabulary: int
) -> dict[str, Signature]:
    """The text family: `latents` is (channels, height, width) of the VAE's space, `image_size` in pixels, `tokens` the
    prompt's length, `width` and `pooled` the text encoder's state and pooled widths."""
    latent, image = (BATCH, *latents), (BATCH, 3, image_size, image_size)
    moments = (BATCH, 2 * latents[0], *latents[1:])
    states = (BATCH, tokens, width)
    return {
        "text_encoder": Signature(
            (TensorSpec("input_ids", "int64", (BATCH, tokens), vocabulary),),
            (
                TensorSpec("last_hidden_state", "float32", states),
                TensorSpec("pooler_output", "float32", (BATCH, pooled)),
            ),
        ),
        "unet": Signature(
            (
                TensorSpec("sample", "float32", latent),
                TensorSpec("timestep", "float32", (BATCH,)),
                TensorSpec("encoder_hidden_states", "float32", states),
            ),
            (TensorSpec("out_sample", "float32", latent),),
        ),
        "vae_decoder": Signature(
            (TensorSpec("latent_sample", "float32", latent),), (TensorSpec("sample", "float32", image),)
        ),
        "vae_encoder": Signature(
            (TensorSpec("sample", "float32", image),), (TensorSpec("latent_parameters", "float32", moments),)
        ),
    }


def label_signatures(*, channels: int, image_size: int, num_labels: int) -> dict[str, Signature]:
    """The label family: pixels (channels, image_size, image_size) in [-1, 1], conditioned on a multi-hot (num_labels,)."""
    image = (BATCH, channels, image_size, image_size)
    return {
        "unet": Signature(
            (
                TensorSpec("sample", "float32", image),
                TensorSpec("timestep", "float32", (BATCH,)),
                TensorSpec("class_labels", "float32", (BATCH, num_labels)),
            ),
            (TensorSpec("out_sample", "float32", image),),
        )
    }
