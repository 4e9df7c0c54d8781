"""One declaration per network: names, dtypes and symbolic shapes of its inputs and outputs.

ONNX dynamic axes, sample inputs, engine shapes and buffers derive from it. The names are optimum's, so that its pipelines load
our bundles.
"""

from __future__ import annotations

import numpy as np

from fastgen.files.records import Extent, Name, Record
from fastgen.models.condition import BATCH, Condition, Dtype, Shape
from fastgen.models.space import Space

EXACT = ("text_encoder",)  # networks that stay fp32: they run once per prompt, and all images depend on them
EIGHT_BITS = ("int8", "fp8")  # precisions that only networks of QUANTISED are executed in
UNET_WHOLE, UNET_SHALLOW = "unet_whole", "unet_shallow"  # the UNet split for caching of deep features
DENOISERS = ("unet", UNET_WHOLE, UNET_SHALLOW)
QUANTISED = ("unet", "vae_decoder")  # networks of which there are graphs in eight bits: all that runs for every image


class TensorSpec(Record, frozen=True):
    """One input or output. `shape` holds ints and, for the batch axis, the string "batch". Integer tensors are ids in
    [0, `high`)."""

    name: Name
    dtype: Dtype
    shape: Shape
    high: Extent = 0

    def with_batch(self, batch: int) -> tuple[int, ...]:
        return tuple(batch if axis == BATCH else int(axis) for axis in self.shape)

    def sample(self, batch: int, rng: np.random.Generator) -> np.ndarray:
        """A random input of this shape: ids for integers, N(0, 1) for floats."""
        shape = self.with_batch(batch)
        if self.dtype == "int64":
            return rng.integers(0, self.high, shape, dtype=np.int64)
        return rng.standard_normal(shape).astype(self.dtype)


class Signature(Record, frozen=True):
    """The interface of one network."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def sample_inputs(self, batch: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {t.name: t.sample(batch, rng) for t in self.inputs}


def network_dtype(network: str, dtype: str) -> str:
    """The precision ("fp32", "fp16", "bf16", "int8", "fp8") that `network` is executed in by an engine of precision `dtype`."""
    return "fp32" if network in EXACT or (dtype in EIGHT_BITS and network not in QUANTISED) else dtype


def model_signatures(condition: Condition, space: Space) -> dict[str, Signature]:
    """The networks of a model: the denoiser "unet", and where it has them text encoder and autoencoder.

    The autoencoder's encoder gives the moments of the latents, mean and log-variance (B, 2C, h, w); of an autoencoder without
    a distribution the log-variance is constant and low.
    """
    state: Shape = (BATCH, *space.shape)
    image: Shape = (BATCH, *space.image)
    signatures = {}
    if (text := condition.text) is not None:
        ids = tuple(
            TensorSpec("input_ids" if i == 0 else f"input_ids_{i + 1}", "int64", (BATCH, tokens), vocabulary)
            for i, (tokens, vocabulary) in enumerate(zip(text.tokens, text.vocabulary, strict=True))
        )
        states = TensorSpec("last_hidden_state", "float32", (BATCH, text.tokens[0], text.width))
        signatures["text_encoder"] = Signature(
            ids, (states, TensorSpec("pooler_output", "float32", (BATCH, text.pooled)))
        )
    inputs = (TensorSpec("sample", "float32", state), TensorSpec("timestep", "float32", (BATCH,)))
    conditions = tuple(TensorSpec(*tensor) for tensor in condition.inputs)
    signatures["unet"] = Signature((*inputs, *conditions), (TensorSpec("out_sample", "float32", state),))
    if space.latent:
        moments: Shape = (BATCH, 2 * space.shape[0], *space.shape[1:])
        signatures["vae_decoder"] = Signature(
            (TensorSpec("latent_sample", "float32", state),), (TensorSpec("sample", "float32", image),)
        )
        signatures["vae_encoder"] = Signature(
            (TensorSpec("sample", "float32", image),), (TensorSpec("latent_parameters", "float32", moments),)
        )
    return signatures


def split_signatures(unet: Signature, deep: tuple[int, int, int]) -> dict[str, Signature]:
    """The two networks of a UNet that is split, see `networks.split_unet`. `deep`: (C, h, w) of the deep feature, which is the
    last output of the one and the last input of the other."""
    shape: Shape = (BATCH, *deep)
    given, taken = TensorSpec("out_deep_feature", "float32", shape), TensorSpec("deep_feature", "float32", shape)
    return {
        UNET_WHOLE: Signature(unet.inputs, (*unet.outputs, given)),
        UNET_SHALLOW: Signature((*unet.inputs, taken), unet.outputs),
    }
