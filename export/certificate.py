"""The proof: an engine against the eager fp32 reference, network by network and in whole images, with stated tolerances."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastgen.bundle import CERTIFICATES, REFERENCE, Bundle
from fastgen.engines.base import Engine
from fastgen.errors import FastgenError
from fastgen.images import problem
from fastgen.jsonfiles import write_bytes, write_json
from fastgen.pipeline import Pipeline, Settings
from fastgen.requests import Request
from fastgen.signatures import Signature

if TYPE_CHECKING:
    from fastgen.networks import Model

TIMESTEPS, SEEDS = 8, 4  # network inputs: every timestep with every seed
IMAGES, IMAGE_STEPS = 8, 20
MIN_PSNR_DB = 30.0
MAX_GREY_LEVELS = 2.0
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


@dataclass(frozen=True)
class Row:
    """One comparison with the reference. `allowed` is in the words of the tolerance that `figure` was held against."""

    what: str
    max_abs: float
    relative_l2: float
    cosine: float
    psnr_db: float | None
    allowed: str
    passed: bool


@dataclass(frozen=True)
class Certificate:
    """All comparisons of one engine, dtype and device over one bundle."""

    bundle_sha256: str
    engine: str
    dtype: str
    device: str
    versions: Mapping[str, str]
    rows: Sequence[Row]

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.rows)

    def table(self) -> str:
        """A table for the terminal, one line per comparison."""
        lines = [f"{self.engine} {self.dtype} {self.device}: {'certified' if self.passed else 'MISSED'}"]
        for row in self.rows:
            psnr = "" if row.psnr_db is None else f"  PSNR {row.psnr_db:.1f} dB"
            mark = "ok  " if row.passed else "MISS"
            lines.append(
                f"  {mark} {row.what:13s} max abs {row.max_abs:.2e}  relative {row.relative_l2:.2e}  "
                f"cosine {row.cosine:.7f}{psnr}  (allowed: {row.allowed})"
            )
        return "\n".join(lines)


def write_reference(model: Model, path: Path) -> None:
    """Run the eager fp32 reference on the certificate's inputs and store inputs and outputs in a safetensors file.

    Also stored: how far eager itself moves in bf16 (relative L2), the yardstick for engines that compute in bf16.
    Raises FastgenError when the model itself produces values that are not finite, or flat images.
    """
    from safetensors.numpy import save

    from fastgen.engines.eager import Engine as Eager

    eager = Eager(model, device="cpu", dtype="fp32")
    pipeline = Pipeline(model, eager)
    tensors: dict[str, np.ndarray] = {}
    for name, signature in model.spec.signatures.items():
        tensors |= {f"{name}.{key}": value for key, value in _inputs(pipeline, name, signature, tensors).items()}
        outputs = _run(eager, name, signature, tensors)
        if not all(np.isfinite(y).all() for y in outputs):
            raise FastgenError(f"{model.folder}: {name} itself (eager, fp32) produces values that are not finite")
        tensors |= {f"{name}.{t.name}": y for t, y in zip(signature.outputs, outputs, strict=True)}
    tensors["images"] = _images(pipeline)
    _check_images(f"{model.folder} itself (eager, fp32)", tensors["images"])
    metadata = {"eager_bf16": json.dumps(_eager_distances(model, tensors), sort_keys=True)}
    write_bytes(path, save({k: np.ascontiguousarray(v) for k, v in tensors.items()}, metadata=metadata))


def certify(engine: Engine, bundle: Bundle) -> Certificate:
    """Compare an engine with the bundle's stored reference and file the certificate in the bundle.

    Raises FastgenError when an output is not finite, or an image flat; an earlier certificate is withdrawn then.
    """
    from safetensors import safe_open

    path = bundle.folder / CERTIFICATES / f"{engine.name}-{engine.dtype}-{engine.device.replace(':', '')}.json"
    path.unlink(missing_ok=True)
    with safe_open(bundle.file(REFERENCE), framework="numpy") as file:
        reference = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        eager = json.loads(file.metadata()["eager_bf16"])
    rows = []
    for name, signature in bundle.spec.signatures.items():
        outputs = _run(engine, name, signature, reference)
        expected = [reference[f"{name}.{t.name}"] for t in signature.outputs]
        found = _flat(outputs)
        if not np.isfinite(found).all():
            raise FastgenError(f"engine {engine.name} {engine.dtype}: {name} produced values that are not finite")
        rows.append(_network_row(name, _flat(expected), found, engine.dtype, eager[name]))
    images = _images(Pipeline(bundle, engine))
    _check_images(f"engine {engine.name} {engine.dtype}", images)
    rows.append(_image_row(reference["images"], images, engine.dtype))
    certificate = Certificate(bundle.sha256, engine.name, engine.dtype, engine.device, _versions(engine), rows)
    path.parent.mkdir(exist_ok=True)
    write_json(path, dataclasses.asdict(certificate) | {"passed": certificate.passed})
    return certificate


def _inputs(
    pipeline: Pipeline, name: str, signature: Signature, done: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Inputs of one network: real prompts and the empty one for the text encoder, its states for the UNet, labels or none
    for the label UNet, timesteps over the whole schedule; noise elsewhere."""
    rng = np.random.default_rng(0)
    batch = TIMESTEPS * SEEDS
    if name == "text_encoder":
        assert pipeline.tokenizer is not None
        return {"input_ids": pipeline.tokenizer.encode([*PROMPTS, ""])[0]}
    if name != "unet":
        return signature.sample_inputs(SEEDS, rng)
    inputs = signature.sample_inputs(batch, rng)
    last = int(pipeline.spec.scheduler_config.get("num_train_timesteps", 1000)) - 1
    inputs["timestep"] = np.repeat(np.linspace(0, last, TIMESTEPS).round(), SEEDS).astype(np.float32)
    if pipeline.spec.family == "text":
        states = done["text_encoder.last_hidden_state"]  # (9, tokens, D), the last one of the empty prompt
        inputs["encoder_hidden_states"] = states[np.arange(batch) % len(states)]
    else:
        labels = np.zeros_like(inputs["class_labels"])
        for row in labels[1:]:  # the first stays unconditional
            row[rng.choice(labels.shape[1], min(3, labels.shape[1]), replace=False)] = 1
        inputs["class_labels"] = labels
    return inputs


def _run(engine: Engine, name: str, signature: Signature, tensors: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    inputs = [engine.array(tensors[f"{name}.{t.name}"]) for t in signature.inputs]
    return [engine.numpy(y) for y in engine.run(name, *inputs)]


def _images(pipeline: Pipeline) -> np.ndarray:
    """(8, 3, H, W): the certificate's requests with the model's default solver at 20 steps."""
    spec = pipeline.spec
    objects = list(spec.objects or ())
    requests = []
    for i in range(IMAGES):
        labels = (
            tuple(objects[(5 * i + 7 * j) % len(objects)] for j in range(min(1 + i % 3, len(objects))))
            if objects
            else None
        )
        labels = None if labels is None else tuple(dict.fromkeys(labels))
        prompt = PROMPTS[i] if labels is None else None
        requests.append(Request(str(i), f"{i}.png", prompt=prompt, labels=labels, seed=i))
    settings = Settings(spec.sampling.scheduler, IMAGE_STEPS, spec.sampling.guidance_scale)
    encoder = pipeline.encoder(requests, settings.guided)
    return pipeline.sample_batch(requests, encoder, pipeline.source.table(settings.solver), settings)


def _eager_distances(model: Model, reference: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Relative L2 distance of eager bf16 from eager fp32, network by network."""
    import copy

    from fastgen.engines.eager import Engine as Eager

    eager = Eager(copy.deepcopy(model), device="cpu", dtype="bf16")
    distances = {}
    for name, signature in model.spec.signatures.items():
        outputs = _run(eager, name, signature, reference)
        expected = [reference[f"{name}.{t.name}"] for t in signature.outputs]
        distances[name] = _relative_l2(_flat(expected), _flat(outputs))
    return distances


def _network_row(name: str, expected: np.ndarray, found: np.ndarray, dtype: str, eager_distance: float) -> Row:
    cosine, relative = _cosine(expected, found), _relative_l2(expected, found)
    error = np.abs(expected - found)
    if dtype == "fp32":
        floor = 3e-4 if name.startswith("vae") else 1e-4
        passed = bool((error <= floor + 1e-2 * np.abs(expected)).all())
        allowed = f"abs <= {floor:g} + 1e-2 relative"
    else:
        least, factor = (0.9999, 1.5) if dtype == "fp16" else (0.999, 3.0)
        passed = cosine >= least and relative <= factor * eager_distance
        allowed = f"cosine >= {least}, relative <= {factor} x eager's {eager_distance:.2e}"
    return Row(name, float(error.max()), relative, cosine, None, allowed, passed)


def _check_images(whose: str, images: np.ndarray) -> None:
    for i, image in enumerate(images):
        if why := problem(image):
            raise FastgenError(f"{whose}: whole image {i}: {why}")


def _image_row(expected: np.ndarray, found: np.ndarray, dtype: str) -> Row:
    expected, found = np.clip(expected, -1, 1), np.clip(found, -1, 1)
    levels = float(np.abs(expected - found).max()) * 127.5
    psnr = 10 * math.log10(4 / max(float(np.mean((expected - found) ** 2)), 1e-20))
    if dtype == "fp32":
        allowed, passed = f"{MAX_GREY_LEVELS:g}/255", levels <= MAX_GREY_LEVELS
    else:
        allowed, passed = f"PSNR >= {MIN_PSNR_DB:g} dB", psnr >= MIN_PSNR_DB
    flat = expected.reshape(-1), found.reshape(-1)
    return Row("images", levels / 127.5, _relative_l2(*flat), _cosine(*flat), psnr, allowed, passed)


def _flat(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([array.reshape(-1) for array in arrays])


def _relative_l2(expected: np.ndarray, found: np.ndarray) -> float:
    return float(np.linalg.norm(expected - found) / np.linalg.norm(expected))


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def _versions(engine: Engine) -> dict[str, str]:
    packages = ["fastgen-diffusion", "numpy", *type(engine).packages]
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed as a distribution"
    return found | {"python": platform.python_version(), "machine": platform.machine()}
