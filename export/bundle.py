"""Model folder -> bundle: ONNX graphs, tokenizer, solver tables, the certificate's reference; written whole or not at all."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.certificate import IMAGE_STEPS, Certificate, certify, write_reference
from fastgen import __version__
from fastgen.bundle import FORMAT_VERSION, MANIFEST, REFERENCE, TABLES, is_bundle, read_bundle
from fastgen.engines import check_installed, create_engine, engine_class, engine_names, missing_packages
from fastgen.errors import FastgenError, InputError
from fastgen.jsonfiles import write_json
from fastgen.spec import Spec, sha256_file
from fastgen.tables import parse_key

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
    names = _bundle_engines(engines)
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


def _bundle_engines(asked: Sequence[str] | None) -> list[str]:
    """The engines to certify: those asked for, if they run bundles and are installed, else all that do and are."""
    for name in asked or ():
        if engine_class(name).source_kind != "bundle":
            raise InputError(f"engine {name} runs model folders and is the reference itself; it is not certified")
        check_installed(name)
    names = [n for n in engine_names() if engine_class(n).source_kind == "bundle" and not missing_packages(n)]
    if not names:
        raise InputError(f"no engine for bundles is installed: {engine_class('ort').install}")
    return list(dict.fromkeys(asked)) if asked else names


def _write_bundle(
    model_folder: Path, out: Path, solvers: Sequence[str], overwrite: bool, say: Callable[[str], None]
) -> None:
    from fastgen.networks import load_model

    for key in solvers:
        parse_key(key)
    model = load_model(model_folder)
    if os.path.lexists(out) and not _replaceable(out, model, solvers, overwrite, say):
        return
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    try:
        partial.mkdir(parents=True)
        _fill(partial, model, solvers, say)
        _replace(out, partial)
    except OSError as error:
        raise FastgenError(f"{out}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _fill(partial: Path, model: Model, solvers: Sequence[str], say: Callable[[str], None]) -> None:
    from export.onnx import export_onnx

    for name, file in _config_files(model).items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, partial / name)
    if model.family == "text" and not (partial / "tokenizer" / "tokenizer.json").exists():
        model.tokenizer.backend_tokenizer.save(str(partial / "tokenizer" / "tokenizer.json"))
    say("compiling solver tables")  # first: a solver that does not exist is the quickest thing to find out
    _write_tables(model, partial / TABLES, solvers, say)
    for name, module in model.networks().items():
        say(f"exporting {name}")
        export_onnx(module, model.spec.signatures[name], partial / name / "model.onnx")
    say("running the eager fp32 reference")
    write_reference(model, partial / REFERENCE)
    _write_manifest(model, partial)


def _replace(out: Path, partial: Path) -> None:
    """Put `partial` at `out`; whatever is there is gone only when the new bundle is in its place."""
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
    configs = {name: sha256_file(file) for name, file in _config_files(model).items()}
    other = [name for name, sha256 in configs.items() if held.files.get(name, {}).get("sha256") != sha256]
    other += [f.name for f in fields(Spec) if getattr(held.spec, f.name) != getattr(model.spec, f.name)]
    if other:
        raise InputError(f"{out}: holds another bundle ({other[0]} differs); choose another --out, or --overwrite")
    missing = [key for key in solvers if key not in held.solver_keys()]
    if missing:
        raise InputError(f"{out}: holds a bundle without solver {missing[0]}; --overwrite exports it again")
    say(f"{out} holds these weights already")
    return False


def _config_files(model: Model) -> dict[str, Path]:
    """Name in the bundle -> file of the model folder: component configs under the names that optimum expects, the
    tokenizer, the conditioner's config, model_index.json and labels.json."""
    assert model.folder is not None
    sources = {"vae_decoder": "vae", "vae_encoder": "vae"}
    files = {f"{n}/config.json": model.folder / sources.get(n, n) / "config.json" for n in model.networks()}
    files |= {f"tokenizer/{f.name}": f for f in sorted((model.folder / "tokenizer").glob("*")) if f.is_file()}
    names = ("scheduler/scheduler_config.json", "conditioner/config.json", "model_index.json", "labels.json")
    return files | {name: model.folder / name for name in names if (model.folder / name).is_file()}


def _write_tables(model: Model, path: Path, solvers: Sequence[str], say: Callable[[str], None]) -> None:
    from fastgen.solver import common_tables, compile_key, save_tables

    config: Any = model.scheduler_config
    skipped: list[str] = []
    tables = dict(common_tables(config, on_skip=lambda key, error: skipped.append(key)))
    if skipped:
        more = f", ... ({len(skipped)} in all)" if len(skipped) > 6 else ""
        say(f"not stored, as their schedulers cannot do them: {', '.join(skipped[:6])}{more}")
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
    files = sorted(f for f in partial.rglob("*") if f.is_file())
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
