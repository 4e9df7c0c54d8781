"""Model folder -> bundle: ONNX graphs, tokenizer, solver tables, the certificate's reference; written whole or not at all."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.certificate import IMAGE_STEPS, Certificate, certify, write_reference
from export.onnx import export_onnx
from fastgen import __version__
from fastgen.bundle import CERTIFICATES, FORMAT_VERSION, MANIFEST, REFERENCE, TABLES, is_bundle, read_bundle
from fastgen.engines import create_engine, engine_class, engine_names, missing_packages
from fastgen.errors import FastgenError, InputError
from fastgen.jsonfiles import write_json
from fastgen.spec import sha256_file

if TYPE_CHECKING:
    from fastgen.networks import Model


def export(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    solvers: Sequence[str] = (),
    engines: Sequence[str] | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> list[Certificate]:
    """Export a model folder to a bundle and certify engines on it; or, given a bundle, certify more engines.

    `solvers`: further tables to store, `NAME:STEPS[:NOISE_STEPS]`. `engines`: which to certify, by default every installed
    engine that runs bundles. A bundle of the same weights and solvers at `out` is kept and only certified; another one is
    replaced with `overwrite`. Returns the certificates; the caller decides what a miss means.
    Raises InputError for a folder that is neither, or an `out` that must not be replaced.
    """
    out = Path(out)
    names = list(engines) if engines else _installed_bundle_engines()
    if not is_bundle(model):
        _write_bundle(Path(model), out, solvers, overwrite, say)
    elif Path(model).resolve() != out.resolve():
        raise InputError(f"{model} is a bundle already; to certify engines on it give it as --out too")
    certificates = []
    for name in names:
        say(f"certifying {name} against eager fp32")
        bundle = read_bundle(out)
        certificates.append(certify(create_engine(name, bundle), bundle))
    return certificates


def _installed_bundle_engines() -> list[str]:
    names = [n for n in engine_names() if engine_class(n).source_kind == "bundle" and not missing_packages(n)]
    if not names:
        raise InputError(f"no engine for bundles is installed: {engine_class('ort').install}")
    return names


def _write_bundle(
    model_folder: Path, out: Path, solvers: Sequence[str], overwrite: bool, say: Callable[[str], None]
) -> None:
    from fastgen.networks import load_model

    model = load_model(model_folder)
    if out.exists() and not _replaceable(out, model, solvers, overwrite, say):
        return
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    try:
        partial.mkdir(parents=True)
        for name, module in model.networks().items():
            say(f"exporting {name}")
            export_onnx(module, model.spec.signatures[name], partial / name / "model.onnx")
        _copy_configs(model, model_folder, partial)
        say("compiling solver tables")
        _write_tables(model, partial / TABLES, solvers)
        say("running the eager fp32 reference")
        write_reference(model, partial / REFERENCE)
        _write_manifest(model, partial)
    except OSError as error:
        raise FastgenError(f"{partial}: cannot be written: {error.strerror or error}") from None
    replaced = out.with_name(f".{out.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if out.exists():
        out.rename(replaced)
    partial.rename(out)
    shutil.rmtree(replaced, ignore_errors=True)


def _replaceable(out: Path, model: Model, solvers: Sequence[str], overwrite: bool, say: Callable[[str], None]) -> bool:
    """Whether a new bundle takes the place of `out`; False when `out` is the same bundle already."""
    if out.is_dir() and not any(out.iterdir()):
        return True
    if not is_bundle(out):
        raise InputError(f"{out}: exists and is not a bundle; choose another --out")
    if overwrite:
        return True
    held = read_bundle(out)
    same = held.spec.sha256 == model.spec.sha256 and held.spec.sampling == model.spec.sampling
    if not same:
        raise InputError(f"{out}: holds a bundle of other weights or defaults; choose another --out, or --overwrite")
    missing = [key for key in solvers if key not in held.solver_keys()]
    if missing:
        raise InputError(f"{out}: holds a bundle without solver {missing[0]}; --overwrite exports it again")
    say(f"{out} holds these weights already")
    return False


def _copy_configs(model: Model, folder: Path, partial: Path) -> None:
    """Component configs under the names that optimum expects, the tokenizer, model_index.json and labels.json."""
    sources = {"unet": "unet", "text_encoder": "text_encoder", "vae_decoder": "vae", "vae_encoder": "vae"}
    for name in model.networks():
        shutil.copyfile(folder / sources[name] / "config.json", partial / name / "config.json")
    for name in ("scheduler", "tokenizer"):
        if (folder / name).is_dir():
            shutil.copytree(folder / name, partial / name)
    if model.family == "text" and not (partial / "tokenizer" / "tokenizer.json").exists():
        model.tokenizer.save_pretrained(partial / "tokenizer")
    for name in ("model_index.json", "labels.json"):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, partial / name)


def _write_tables(model: Model, path: Path, solvers: Sequence[str]) -> None:
    from fastgen.solver import common_tables, compile_key, save_tables

    config: Any = model.scheduler_config
    tables = dict(common_tables(config))
    default = model.sampling
    own = f"{default.scheduler}:{default.num_inference_steps}"
    for key in (own, f"{default.scheduler}:{IMAGE_STEPS}", *solvers):
        if key not in tables:
            tables[key] = compile_key(key, config)
    path.parent.mkdir(exist_ok=True)
    save_tables(path, tables)


def _write_manifest(model: Model, partial: Path) -> None:
    """bundle.json, the last file: it lists every other with its size and hash."""
    spec = model.spec
    files = sorted(f for f in partial.rglob("*") if f.is_file() and f.name != MANIFEST and CERTIFICATES not in f.parts)
    packages = ("torch", "diffusers", "transformers", "onnx", "onnxscript")
    sampling = spec.sampling
    manifest = {
        "format_version": FORMAT_VERSION,
        "family": spec.family,
        "source_sha256": spec.sha256,
        "versions": {"fastgen": __version__} | {p: importlib.metadata.version(p) for p in packages},
        "sampling": {
            "scheduler": sampling.scheduler,
            "num_inference_steps": sampling.num_inference_steps,
            "guidance_scale": sampling.guidance_scale,
        },
        "scheduler_config": dict(spec.scheduler_config),
        "scaling_factor": spec.scaling_factor,
        "objects": spec.objects,
        "signatures": {name: s.to_json() for name, s in spec.signatures.items()},
        "files": {
            f.relative_to(partial).as_posix(): {"bytes": f.stat().st_size, "sha256": sha256_file(f)} for f in files
        },
    }
    write_json(partial / MANIFEST, manifest)
