"""The proof: an engine against the eager fp32 reference, network by network and in whole images, with stated tolerances."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.quantisation import Quantisation, quantisation_name
from export.reference import (
    bundle_reference,
    check_finite,
    check_images,
    decode_images,
    flat,
    latents_peak,
    psnr_db,
    read_distances,
    relative_l2,
    run_network,
    sample_latents,
    whole_runs,
)
from export.task_score import ScoreRow, Task, score_rows
from fastgen.engines.base import Engine
from fastgen.errors import FastgenError, InputError
from fastgen.files.hashes import check_inside
from fastgen.files.jsonfiles import read_json, write_json
from fastgen.files.records import Name, Record, Sha256, read_record
from fastgen.generate.pipeline import Pipeline
from fastgen.models.bundle import CERTIFICATES, Bundle, plan_graph
from fastgen.models.signatures import DENOISERS, EIGHT_BITS, QUANTISED, UNET_SHALLOW, UNET_WHOLE

MIN_PSNR_DB = 30.0
# Of each picture in eight bits. An early step's error can decide where an object stands: one picture of eight becomes another
# one, at 15 to 20 dB, while the others stay near 35. A picture of noise is below 10 dB.
MIN_EACH_PSNR_DB = 12.0
MAX_GREY_LEVELS = 2.0
# An autoencoder with a codebook takes the nearest code of each latent. Where two codes are as near, the last bit of a latent
# decides between two pictures: of one latent in thousands, in fp32. A bound on the largest difference would not hold then.
MIN_CODEBOOK_PSNR_DB = 45.0
FACTORS = {"fp16": 1.5, "bf16": 1.5}  # largest distance from fp32, as a multiple of eager's in the same precision
MIN_COSINE = {"fp16": 0.9999, "bf16": 0.999, "int8": 0.995, "fp8": 0.995}
ROUNDED = "the bundle's weights are rounded to fp16; --overwrite --weights fp32 exports it without that"
UNSCORED = "the task's own score was not compared, only PSNR: give --requests and --evaluator"


@dataclass(frozen=True)
class ParityRow:
    """One comparison with the reference; `allowed` names the tolerance."""

    what: str
    max_abs: float
    relative_l2: float
    cosine: float
    psnr_db: float | None
    allowed: str
    passed: bool
    lowest_psnr_db: float | None = None  # of a picture, in eight bits: `psnr_db` is the average over pictures then


@dataclass(frozen=True)
class Certificate:
    """All comparisons of one engine, dtype and device over one bundle; `gpu`: see `Engine.gpu`."""

    bundle_sha256: str
    engine: str
    dtype: str
    device: str
    gpu: str | None
    versions: Mapping[str, str]
    rows: Sequence[ParityRow]
    scores: Sequence[ScoreRow] = ()  # of the task, where it was given
    advice: Sequence[str] = ()  # for the user

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.rows) and all(row.passed for row in self.scores)

    def table(self) -> str:
        """A table for the terminal, one line per comparison."""
        where = self.device if self.gpu is None else f"{self.device} ({self.gpu})"
        lines = [f"{self.engine} {self.dtype} {where}: {'certified' if self.passed else 'MISSED'}"]
        for row in self.rows:
            psnr = "" if row.psnr_db is None else f"  PSNR {row.psnr_db:.1f} dB"
            psnr += "" if row.lowest_psnr_db is None else f" (lowest {row.lowest_psnr_db:.1f})"
            mark = "ok  " if row.passed else "MISS"
            lines.append(
                f"  {mark} {row.what:13s} max abs {row.max_abs:.2e}  relative {row.relative_l2:.2e}  "
                f"cosine {row.cosine:.7f}{psnr}  (allowed: {row.allowed})"
            )
        lines += [row.line() for row in self.scores]
        lines += [f"  {line}" for line in self.advice]
        return "\n".join(lines)


class FiledCertificate(Record, frozen=True, forbid_unknown_fields=False):
    """What decides whether a certificate counts; its file has the fields of `Certificate` too."""

    bundle_sha256: Sha256
    engine: Name | None = None
    passed: bool = False


def certificate_name(engine: Engine) -> str:
    """The file of an engine's certificate: one per engine, dtype, device, and card where they differ."""
    card = "" if engine.gpu is None else "-" + re.sub(r"[^\w.]+", "-", engine.gpu)
    return f"{engine.name}-{engine.dtype}-{engine.device.replace(':', '')}{card}.json"


def is_certified(engine: Engine, bundle: Bundle, folders: Sequence[Path]) -> bool:
    """Whether one of the folders has a certificate of this bundle that the engine passed."""
    files = [folder / certificate_name(engine) for folder in folders]
    filed = [read_certificate(file) for file in files if os.path.lexists(file)]
    return any(certificate.bundle_sha256 == bundle.sha256 and certificate.passed for certificate in filed)


def read_certificate(file: Path) -> FiledCertificate:
    """A certificate that was filed. Raises InputError for another file."""
    try:
        return read_record(file, FiledCertificate)
    except InputError as error:
        raise InputError(f"{error}; delete it, and the engine is certified again") from None


def certify(
    engine: Engine,
    bundle: Bundle,
    networks: Sequence[str] | None = None,
    folder: Path | None = None,
    task: Task | None = None,
) -> Certificate:
    """Compare an engine with the bundle's stored reference, and write the certificate into the bundle or into `folder`.

    `networks`: by default all; whole images are compared besides. A network that the engine executes in fp32 is compared with
    fp32's tolerance, whatever the engine's precision; where the bundle stores weights in fp16, with that of fp16. `task`: whose
    score is compared too, in eight bits. Raises FastgenError when an output is not finite, or an image flat; an earlier
    certificate is deleted then.
    """
    path = (folder or bundle.folder / CERTIFICATES) / certificate_name(engine)
    if folder is None:
        check_inside(path.parent, bundle.folder)
    reference = bundle_reference(bundle)
    path.unlink(missing_ok=True)
    rows = []
    for name in networks or bundle.spec.signatures:
        signature = bundle.spec.signatures[name]
        expected = flat([reference[f"{name}.{t.name}"] for t in signature.outputs])
        outputs = flat(run_network(engine, name, signature, reference))
        rows.append(_network_row(engine, bundle, name, expected, outputs))
    if engine.splits and engine.dtype != "int8" and bundle.spec.deep_feature is not None:
        rows += _split_rows(engine, bundle, reference)
    pipeline, whole = Pipeline(bundle, engine), whole_runs(reference)
    whose = f"engine {engine.name} {engine.dtype}"
    latents = sample_latents(pipeline, whole.steps)
    check_finite(whose, latents)
    images = decode_images(pipeline, latents[: len(whole.images)])
    check_images(whose, images)
    rounded = "fp16" if engine.dtype == "fp32" and _stored_in_half(engine, bundle, "unet") else engine.dtype
    if bundle.spec.space.latent and whole.latents is not None:
        rows.append(_latents_row(whole.latents, latents, rounded))
    rows.append(_image_row(whole.images, images, rounded, codebook=_has_codebook(bundle)))
    which = engine.name, engine.dtype, engine.device, engine.gpu
    scores, advice = [], []
    if engine.dtype in EIGHT_BITS:
        scores = score_rows(engine, bundle, task) if task is not None else []
        missed = [row.what for row in rows if not row.passed] + ["images" for row in scores if not row.passed]
        advice = [line for what in dict.fromkeys(missed) for line in _advice(bundle, what, engine)]
        advice += [] if scores else [UNSCORED]
    if any(_stored_in_half(engine, bundle, name) for name in _missed(bundle, rows, scores)):
        advice.append(ROUNDED)
    certificate = Certificate(bundle.sha256, *which, _versions(engine), rows, scores, list(dict.fromkeys(advice)))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, dataclasses.asdict(certificate) | {"passed": certificate.passed})
    return certificate


def _split_rows(engine: Engine, bundle: Bundle, reference: Mapping[str, np.ndarray]) -> list[ParityRow]:
    """The networks of a split UNet against the UNet's reference. The shallow one takes the deep feature that the whole one has
    of the same inputs."""
    unet = bundle.spec.signatures["unet"]
    expected = flat([reference[f"unet.{t.name}"] for t in unet.outputs])
    inputs = [engine.array(reference[f"unet.{t.name}"]) for t in unet.inputs]
    prediction, deep = engine.run_any(UNET_WHOLE, *inputs)
    found = {UNET_WHOLE: prediction, UNET_SHALLOW: engine.run_any(UNET_SHALLOW, *inputs, deep)[0]}
    rows = []
    for name, value in found.items():
        rows.append(_network_row(engine, bundle, name, expected, flat([engine.numpy(value)])))
    return rows


def _missed(bundle: Bundle, rows: Sequence[ParityRow], scores: Sequence[ScoreRow]) -> set[str]:
    """The networks that missed; all of them where whole runs did."""
    missed = {row.what for row in rows if not row.passed} | {"images" for row in scores if not row.passed}
    names = set(bundle.spec.all_signatures)
    return missed if missed <= names else names


def _stored_in_half(engine: Engine, bundle: Bundle, network: str) -> bool:
    """Whether the engine runs a graph of this network whose weights are fp16 on disk, see `export.half_weights`."""
    executed = engine.executed(network)
    own = executed in engine.lowered_graphs and not (executed in EIGHT_BITS and engine.built_by is None)
    return bundle.weights == "fp16" and engine.source_kind == "bundle" and not own


def _network_row(engine: Engine, bundle: Bundle, name: str, expected: np.ndarray, outputs: np.ndarray) -> ParityRow:
    """One network's outputs against the reference, with the tolerance of the precision that was executed. Raises FastgenError
    for outputs that are not finite."""
    if not np.isfinite(outputs).all():
        raise FastgenError(f"engine {engine.name} {engine.dtype}: {name} produced values that are not finite")
    dtype = engine.executed(name)
    cosine, relative = _cosine(expected, outputs), relative_l2(expected, outputs)
    error = np.abs(expected - outputs)
    if dtype == "fp32" and _stored_in_half(engine, bundle, name):
        passed, allowed = cosine >= MIN_COSINE["fp16"], f"cosine >= {MIN_COSINE['fp16']}, as its weights are in fp16"
    elif dtype == "fp32":
        floor = 3e-4 if name.startswith("vae") else 1e-4
        passed = bool((error <= floor + 1e-2 * np.abs(expected)).all())
        allowed = f"abs <= {floor:g} + 1e-2 relative"
    elif dtype in EIGHT_BITS:  # no eager computes in it
        passed, allowed = cosine >= MIN_COSINE[dtype], f"cosine >= {MIN_COSINE[dtype]}"
    else:
        distances, device = read_distances(bundle, dtype)
        distance, factor, least = distances["unet" if name in DENOISERS else name], FACTORS[dtype], MIN_COSINE[dtype]
        passed = cosine >= least and relative <= factor * distance
        allowed = f"cosine >= {least}, relative <= {factor} x eager's {distance:.2e} in {dtype} on {device}"
    return ParityRow(name, float(error.max()), relative, cosine, None, allowed, passed)


def _advice(bundle: Bundle, what: str, engine: Engine) -> list[str]:
    """What to say where eight bits missed: the layers that change most, and the precision that would do."""
    dtype, graph = engine.dtype, plan_graph(engine.dtype) if engine.built_by else engine.dtype
    networks = [name for name in QUANTISED if name in bundle.spec.signatures and what in (name, "images")]
    lines = []
    for name in networks:
        table = read_record(bundle.file(quantisation_name(name, graph)), Quantisation)
        worst = ", ".join(f"{layer.name} ({layer.error:.3f})" for layer in table.worst())
        lines.append(f"{name}: the layers in {dtype} that change it most: {worst}")
        distance = read_distances(bundle, "bf16")[0][name]
        fits = distance <= math.sqrt(1 - MIN_COSINE[dtype] ** 2)
        lines.append(f"{name}: {'bf16' if fits else 'fp32'} would pass: eager's distance in bf16 is {distance:.2e}")
    return lines


def _has_codebook(bundle: Bundle) -> bool:
    """Whether the bundle's autoencoder rounds latents to the codes of a codebook (VQ)."""
    name = "vae_decoder/config.json"
    config = read_json(bundle.file(name)) if name in bundle.files else None
    return isinstance(config, dict) and config.get("_class_name") == "VQModel"


def _latents_row(expected: np.ndarray, latents: np.ndarray, dtype: str) -> ParityRow:
    """Final latents, held to what images are held to: two standard deviations of them count as an image's 1."""
    return _whole_row("latents", expected, latents, dtype, peak=latents_peak(expected))


def _image_row(expected: np.ndarray, images: np.ndarray, dtype: str, *, codebook: bool = False) -> ParityRow:
    return _whole_row("images", np.clip(expected, -1, 1), np.clip(images, -1, 1), dtype, codebook=codebook)


def _whole_row(
    what: str, expected: np.ndarray, values: np.ndarray, dtype: str, *, peak: float = 1.0, codebook: bool = False
) -> ParityRow:
    """What whole runs come to against the reference; most values are in [-peak, peak]."""
    max_abs, lowest = float(np.abs(expected - values).max()), None
    psnr = psnr_db(expected, values, peak)
    if dtype in EIGHT_BITS:
        passed, psnr, lowest = pictures_pass(expected, values, peak)
        allowed = f"PSNR >= {MIN_PSNR_DB:g} dB on average, >= {MIN_EACH_PSNR_DB:g} dB each"
    elif dtype == "fp32" and codebook:
        allowed, passed = f"PSNR >= {MIN_CODEBOOK_PSNR_DB:g} dB, as a codebook rounds", psnr >= MIN_CODEBOOK_PSNR_DB
    elif dtype == "fp32":
        allowed, passed = f"{MAX_GREY_LEVELS:g}/255", max_abs / peak * 127.5 <= MAX_GREY_LEVELS
        allowed += "" if peak == 1.0 else f" of {2 * peak:.3g}, four standard deviations"
    else:
        allowed, passed = f"PSNR >= {MIN_PSNR_DB:g} dB", psnr >= MIN_PSNR_DB
    pair = expected.reshape(-1), values.reshape(-1)
    return ParityRow(what, max_abs, relative_l2(*pair), _cosine(*pair), psnr, allowed, passed, lowest)


def pictures_pass(expected: np.ndarray, values: np.ndarray, peak: float = 1.0) -> tuple[bool, float, float]:
    """Whether whole runs in eight bits are near enough to fp32's, and the average and the lowest PSNR of a picture in dB."""
    each = [psnr_db(a, b, peak) for a, b in zip(expected, values, strict=True)]
    average, lowest = float(np.mean(each)), min(each)
    return average >= MIN_PSNR_DB and lowest >= MIN_EACH_PSNR_DB, average, lowest


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-30))


def _versions(engine: Engine) -> dict[str, str]:
    versions = {}
    for package in ("fastgen-diffusion", "numpy", *type(engine).packages):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # TensorRT's distributions have other names than its modules
            versions[package] = str(getattr(sys.modules.get(package), "__version__", "not installed as a distribution"))
    return versions | {"python": platform.python_version(), "machine": platform.machine()}
