"""The reference of certificates: inputs for every network, eager's fp32 outputs for them, whole runs of the sampling loop, and
the distance from fp32 of eager itself in fp16 and bf16."""

from __future__ import annotations

import copy
import importlib.metadata
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
from msgspec import Meta

from fastgen.engines.machine import cpu
from fastgen.errors import FastgenError, InputError, one_line
from fastgen.files.jsonfiles import read_bytes, write_bytes, write_json
from fastgen.files.records import Name, Record, read_record
from fastgen.generate.conditions import token_ids
from fastgen.generate.pipeline import Pipeline
from fastgen.generate.quantise import problem
from fastgen.generate.requests import Request
from fastgen.generate.run import Run
from fastgen.generate.settings import Settings
from fastgen.models.bundle import REFERENCE, Bundle
from fastgen.models.bundle_record import AGAIN
from fastgen.models.condition import CLASS, POOLED, STATES, Condition
from fastgen.models.signatures import Signature
from fastgen.models.space import Space
from fastgen.sampling.tables import format_key

if TYPE_CHECKING:
    from fastgen.engines.base import Engine
    from fastgen.models.folder import Model

TIMESTEPS = 16  # inputs of the denoiser, each with another timestep, noise and condition
ROWS = 2  # inputs of the autoencoder's networks
IMAGES = 8  # requests that are sampled
IMAGE_STEPS = (5, 10, 20)  # they take the first of these numbers of steps that the model's solver can do
DECODED_PIXELS = 2**17  # of the pictures that are decoded, which are two at least
OLD_STEPS = 20  # of whole runs that an older fastgen stored, as pictures alone, under the name `images`
MAX_REFERENCE_BYTES = 2**33  # images of 2048 px in float32 take a tenth of it
_LATENTS = re.compile(r"latents\.([1-9]\d{0,3})")
PROMPTS = (
    "A small purple monster with one big eye.",
    "Red dragon with wings, horns and a long tail, holding an axe.",
    "Green slime with three eyes. The monster is attacking.",
    "Gray and white eagle with spiked armor and trident.",
    "A blue robot with a sword and a shield. The monster is idling.",
    "Yellow insect with many legs and big teeth. The monster is moving.",
    "A skeleton knight in black armor. The monster is dying.",
    "Brown tree monster with a face and twisted branches.",
)


class WholeRuns(NamedTuple):
    """What the certificate's requests come to after `steps` steps. `latents`: the final states (8, C, h, w) of all requests;
    None in a reference that an older fastgen stored. `images`: the pictures (N, channels, H, W) of the first N requests,
    nominally in [-1, 1]; of a model without a latent space the states themselves. All are float32."""

    steps: int
    latents: np.ndarray | None
    images: np.ndarray


class Distances(Record, frozen=True):
    """What `write_distances` files: by network the distance of eager in `dtype` from fp32."""

    dtype: Literal["fp16", "bf16"]
    device: Name
    versions: dict[Name, Name]
    relative_l2: dict[Name, Annotated[float, Meta(ge=0, le=1e6)]]


def write_reference(model: Model, path: Path) -> None:
    """Run the eager fp32 reference on a CPU and store its inputs and outputs in a safetensors file.

    Raises FastgenError when the model itself produces values that are not finite, or flat images.
    """
    from safetensors.numpy import save

    from fastgen.engines.eager.engine import Engine as Eager

    eager = Eager(model, device="cpu", dtype="fp32")
    pipeline = Pipeline(model, eager)
    tensors: dict[str, np.ndarray] = {}
    steps, space, whose = image_steps(model), model.spec.space, f"{model.folder} itself (eager, fp32)"
    for name, signature in model.spec.signatures.items():
        tensors |= {f"{name}.{key}": value for key, value in _inputs(pipeline, name, signature, tensors).items()}
        outputs = run_network(eager, name, signature, tensors)
        if not all(np.isfinite(y).all() for y in outputs):
            raise FastgenError(f"{model.folder}: {name} itself (eager, fp32) produces values that are not finite")
        tensors |= {f"{name}.{t.name}": y for t, y in zip(signature.outputs, outputs, strict=True)}
        if name == "unet":  # the decoder, which comes later, gets final states
            tensors[f"latents.{steps}"] = images = sample_latents(pipeline, steps)
            check_finite(whose, images)
    if space.latent:
        tensors[f"images.{steps}"] = images = decode_images(pipeline, images[: max(2, DECODED_PIXELS // space.pixels)])
    check_images(whose, images)
    write_bytes(path, save({key: np.ascontiguousarray(value) for key, value in tensors.items()}))


def read_reference(path: Path) -> dict[str, np.ndarray]:
    """`NETWORK.TENSOR`, `latents.STEPS` and `images.STEPS` -> the inputs, fp32 outputs, final states and pictures that
    `write_reference` stored. Raises InputError."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return load(read_bytes(path, "a reference", MAX_REFERENCE_BYTES))
    except (SafetensorError, ValueError, KeyError, TypeError) as error:  # KeyError: a dtype that NumPy lacks
        raise InputError(f"{path}: cannot be read: {one_line(str(error), 80)}; {AGAIN}") from None


def bundle_reference(bundle: Bundle) -> dict[str, np.ndarray]:
    """A bundle's reference, verified. Raises InputError for tensors that are missing, of other shapes than the networks'
    signatures say, or not finite, and for ids that the text encoder does not know."""
    path = bundle.file(REFERENCE)
    tensors = read_reference(path)
    for name, signature in bundle.spec.signatures.items():
        shape = np.shape(tensors.get(f"{name}.{signature.inputs[0].name}", ()))
        rows = shape[0] if shape else 1
        for tensor in (*signature.inputs, *signature.outputs):
            _check_tensor(path, tensors, f"{name}.{tensor.name}", tensor.with_batch(max(rows, 1)), tensor.dtype)
        for tensor in signature.inputs:
            ids = tensors[f"{name}.{tensor.name}"]
            if tensor.dtype == "int64" and not ((ids >= 0) & (ids < tensor.high)).all():
                raise InputError(f"{path}: {name}.{tensor.name}: found an id out of 0 to {tensor.high - 1}; {AGAIN}")
    space, steps = bundle.spec.space, _steps(tensors)
    if "images" in tensors:
        _check_tensor(path, tensors, "images", (IMAGES, *space.image), "float32")
        return tensors
    _check_tensor(path, tensors, f"latents.{steps}", (IMAGES, *space.shape), "float32")
    if space.latent:
        count = min(max(len(tensors.get(f"images.{steps}", ())), 1), IMAGES)
        _check_tensor(path, tensors, f"images.{steps}", (count, *space.image), "float32")
    return tensors


def is_current(bundle: Bundle) -> bool:
    """Whether the reference has what `write_reference` stores today: an older fastgen decoded noise. Raises InputError."""
    tensors, space = bundle_reference(bundle), bundle.spec.space
    if not space.latent:
        return "images" not in tensors
    name = f"vae_decoder.{bundle.spec.signatures['vae_decoder'].inputs[0].name}"
    return "images" not in tensors and np.array_equal(tensors[name], _decoded(space, tensors))


def whole_runs(tensors: Mapping[str, np.ndarray]) -> WholeRuns:
    """The whole runs of a reference, also of one that an older fastgen stored."""
    if "images" in tensors:
        return WholeRuns(OLD_STEPS, None, tensors["images"])
    steps = _steps(tensors)
    latents = tensors[f"latents.{steps}"]
    return WholeRuns(steps, latents, tensors.get(f"images.{steps}", latents))


def _steps(tensors: Mapping[str, np.ndarray]) -> int:
    """The steps of a reference's whole runs."""
    return next((int(match[1]) for name in tensors if (match := _LATENTS.fullmatch(name))), IMAGE_STEPS[0])


def _check_tensor(path: Path, tensors: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...], dtype: str) -> None:
    value = tensors.get(name)
    if value is None:
        raise InputError(f"{path}: {name} is missing; {AGAIN}")
    if (value.shape, value.dtype) != (shape, np.dtype(dtype)):
        raise InputError(f"{path}: {name}: found {value.dtype} {value.shape}, expected {dtype} {shape}; {AGAIN}")
    if not np.isfinite(value).all():
        raise InputError(f"{path}: {name}: found numbers that are not finite; {AGAIN}")


def write_distances(model: Model, reference: Path, dtype: str, path: Path) -> None:
    """Measure the distance (relative L2) of eager in `dtype` from the fp32 reference, network by network, on a GPU if there is
    one: engines that compute in `dtype` are compared with it. Raises FastgenError when a network overflows."""
    import torch

    from export.emulated import fast_products
    from fastgen.engines.eager.engine import Engine as Eager

    tensors = read_reference(reference)
    eager = Eager(copy.deepcopy(model), device="cuda" if torch.cuda.is_available() else "cpu", dtype=dtype)
    distances = {}
    for name, signature in model.spec.signatures.items():
        with fast_products(dtype, cpu()) if eager.device == "cpu" else nullcontext():
            outputs = flat(run_network(eager, name, signature, tensors))
        if not np.isfinite(outputs).all():
            other = "bf16" if dtype == "fp16" else "fp32"
            raise FastgenError(f"{model.folder}: {name} overflows in {dtype} (eager itself); use --dtype {other}")
        distances[name] = relative_l2(flat([tensors[f"{name}.{t.name}"] for t in signature.outputs]), outputs)
    device = torch.cuda.get_device_name() if eager.device == "cuda" else "cpu"
    versions = {package: importlib.metadata.version(package) for package in ("torch", "diffusers")}
    write_json(path, {"dtype": dtype, "device": device, "versions": versions, "relative_l2": distances})


def distances_name(dtype: str) -> str:
    """The bundle file that `write_distances` fills."""
    return f"{REFERENCE.partition('.')[0]}.{dtype}.json"


def read_distances(bundle: Bundle, dtype: str) -> tuple[Mapping[str, float], str]:
    """Eager's distance from fp32 in `dtype` per network, and the device it was measured on.

    Raises InputError when the bundle was exported without it.
    """
    name = distances_name(dtype)
    if name not in bundle.files:
        option = "" if dtype == "bf16" else f" --dtype {dtype}"
        raise InputError(
            f"{bundle.folder}: does not say how far eager itself moves in {dtype}; "
            f"`fastgen export MODEL --out {bundle.folder}{option}`, with the model folder, adds it"
        )
    path = bundle.file(name)
    distances = read_record(path, Distances)
    if missing := [network for network in bundle.spec.signatures if network not in distances.relative_l2]:
        raise InputError(f"{path}: relative_l2.{missing[0]} is missing; {AGAIN}")
    return distances.relative_l2, distances.device


def run_network(engine: Engine, name: str, signature: Signature, tensors: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """An engine's outputs for the reference's inputs of one network."""
    inputs = [engine.array(tensors[f"{name}.{t.name}"]) for t in signature.inputs]
    return [engine.numpy(y) for y in engine.run_any(name, *inputs)]


def image_steps(model: Model) -> int:
    """The number of steps of the certificate's requests, see IMAGE_STEPS."""
    return possible_steps(model, IMAGE_STEPS)


def possible_steps(model: Model, counts: Sequence[int]) -> int:
    """The first of these numbers of steps that the model's own solver can do, else the last."""
    from fastgen.sampling.schedulers import make_scheduler
    from fastgen.sampling.stability import refuse_unstable

    name = model.sampling.scheduler
    for steps in counts[:-1]:
        try:  # also of the model's own solver, which has tables where its steps are too coarse
            refuse_unstable(model.table(format_key(name, steps)), make_scheduler(name, model.scheduler_config))
        except InputError:
            continue
        return steps
    return counts[-1]


def sample_latents(pipeline: Pipeline, steps: int) -> np.ndarray:
    """(8, C, h, w) float32: the final states of the certificate's requests with the model's default solver."""
    spec = pipeline.spec
    settings = Settings(spec.sampling.scheduler, steps, spec.sampling.guidance_scale)
    run = Run(pipeline, sample_requests(spec.condition), settings)
    batches = run.batches(max(IMAGES, min(pipeline.buckets(settings) or [1])))
    return np.concatenate([pipeline.engine.numpy(run.latents(batch)) for batch in batches])


def decode_images(pipeline: Pipeline, latents: np.ndarray) -> np.ndarray:
    """(N, channels, H, W) float32, nominally in [-1, 1], of final states (N, C, h, w)."""
    engine = pipeline.engine
    return engine.numpy(pipeline.decoder.decode(engine.array(latents)))


def check_finite(whose: str, latents: np.ndarray) -> None:
    """FastgenError for final states with values that are not finite."""
    for i, state in enumerate(latents):
        if not np.isfinite(state).all():
            raise FastgenError(f"{whose}: whole image {i}: values that are not finite")


def check_images(whose: str, images: np.ndarray) -> None:
    """FastgenError for values that are not finite, and for flat images."""
    for i, image in enumerate(images):
        if why := problem(image):
            raise FastgenError(f"{whose}: whole image {i}: {why}")


def flat(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([array.reshape(-1) for array in arrays])


def relative_l2(expected: np.ndarray, outputs: np.ndarray) -> float:
    return float(np.linalg.norm(expected - outputs) / max(float(np.linalg.norm(expected)), 1e-30))


def psnr_db(expected: np.ndarray, values: np.ndarray, peak: float = 1.0) -> float:
    """Peak signal-to-noise ratio, in dB, of values most of which are in [-peak, peak]."""
    return 10 * math.log10(4 / max(float(np.mean(((expected - values) / peak) ** 2)), 1e-20))


def latents_peak(expected: np.ndarray) -> float:
    """What counts as an image's 1 in final latents: two standard deviations of them."""
    return 2 * max(float(expected.std()), 1e-6)


def sample_requests(condition: Condition) -> list[Request]:
    """Prompts; one to three labels each, or a class; what the model takes."""
    names, requests = list(condition.names or ()), []
    for i in range(IMAGES):
        count = min(1 + i % 3, len(names)) if condition.labels is not None else 1
        labels = tuple(dict.fromkeys(names[(5 * i + 7 * j) % len(names)] for j in range(count))) if names else None
        if condition.number:
            labels = (str(i / IMAGES),)
        prompt = PROMPTS[i] if condition.text is not None else None
        requests.append(Request(str(i), f"{i}.png", prompt, labels, seed=i))
    return requests


def _inputs(
    pipeline: Pipeline, name: str, signature: Signature, tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Inputs of one network: for the text encoder PROMPTS and the empty prompt; for a UNet timesteps over the whole schedule,
    with the text encoder's states out of `tensors`, multi-hot labels, or classes; for a VAE decoder final states of whole runs,
    as their size is the model's own and eight bits are calibrated for it; else noise."""
    rng, batch = np.random.default_rng(0), TIMESTEPS
    if name == "text_encoder":
        ids = token_ids(pipeline.tokenizers, [*PROMPTS, ""])[0]
        return {tensor.name: rows for tensor, rows in zip(signature.inputs, ids, strict=True)}
    if name == "vae_decoder":
        return {tensor.name: _decoded(pipeline.spec.space, tensors) for tensor in signature.inputs}
    if name != "unet":
        return signature.sample_inputs(ROWS, rng)
    inputs = signature.sample_inputs(batch, rng)
    inputs["timestep"] = _timesteps(pipeline)
    for key, output in ((STATES, "last_hidden_state"), (POOLED, "pooler_output")):
        if key in inputs and pipeline.spec.condition.text is not None:
            rows = tensors[f"text_encoder.{output}"]  # 9 rows, the last one of the empty prompt
            inputs[key] = rows[np.arange(batch) % len(rows)]
    if pipeline.spec.condition.labels is not None:
        labels = np.zeros_like(inputs[CLASS])
        for row in labels[1:]:  # the first stays unconditional
            row[rng.choice(labels.shape[1], min(3, labels.shape[1]), replace=False)] = 1
        inputs[CLASS] = labels
    return inputs


def _decoded(space: Space, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """(ROWS, C, h, w) float32: what the VAE decoder of a reference gets."""
    return np.asarray(space.to_vae(tensors[f"latents.{_steps(tensors)}"][:ROWS]), np.float32)


def _timesteps(pipeline: Pipeline) -> np.ndarray:
    """(TIMESTEPS,) float32: over the whole schedule. Where timesteps are no whole numbers, as with EDM or flow matching, those
    that the model's own solver takes."""
    spec = pipeline.spec
    model: Any = pipeline.source
    logarithmic = model.unet.config.get("time_embedding_type") == "fourier"  # of 0 it has none
    table = pipeline.source.table(format_key(spec.sampling.scheduler, IMAGE_STEPS[-1]))
    last = int(spec.scheduler_config.get("num_train_timesteps", 1000)) - 1
    spread = np.linspace(0, last, TIMESTEPS).round()
    if (table.timesteps % 1).any() or logarithmic:
        spread = table.timesteps[np.linspace(0, len(table) - 1, TIMESTEPS).astype(int)]
    return spread.astype(np.float32)
