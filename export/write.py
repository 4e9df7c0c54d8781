"""Writing a bundle: whole or not at all, and adding what a bundle of the same weights lacks without ever breaking it."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.extend import add_files, sweep
from export.reference import IMAGE_STEPS, distances_name, write_distances, write_reference
from fastgen import __version__
from fastgen.errors import InputError, Say
from fastgen.files.folders import new_folder, scratch_folder
from fastgen.files.hashes import record_files, sha256_file
from fastgen.files.jsonfiles import infinity_as_text, read_json, write_json
from fastgen.generate.settings import late_steps
from fastgen.models.bundle import (
    FORMAT_VERSION,
    LOWERED,
    MANIFEST,
    REFERENCE,
    TABLES,
    Bundle,
    graph_name,
    is_bundle,
    read_bundle,
)
from fastgen.models.signatures import network_dtype
from fastgen.models.spec import Spec
from fastgen.sampling.tables import format_key, parse_key

if TYPE_CHECKING:
    from fastgen.models.folder import Model
    from fastgen.sampling.defaults import Sampling

PACKAGES = ("torch", "diffusers", "transformers", "onnx", "onnxscript")


@dataclass(frozen=True)
class Wanted:
    """What a bundle shall hold besides the model itself: solver tables, and graphs in `dtype` besides fp32."""

    solvers: Sequence[str] = ()
    dtype: str = "fp32"

    def graphs(self, model: Model) -> dict[str, str]:
        """Network -> precision, of all graphs in less than fp32."""
        dtypes = {name: network_dtype(name, self.dtype) for name in model.networks()}
        return {name: dtype for name, dtype in dtypes.items() if dtype != "fp32"}

    def distances(self) -> list[str]:
        """Precisions in which eager's own distance is needed: engines on a CPU compute in bf16 unasked."""
        return list(dict.fromkeys(["bf16", *([self.dtype] if self.dtype in LOWERED else [])]))


def write_bundle(
    model_folder: Path, out: Path, wanted: Wanted, overwrite: bool, say: Say, checkpoint: str | None = None
) -> None:
    """Make `out` the bundle of this model folder: written anew, extended by what it lacks, or left as it is."""
    from fastgen.models.folder import load_model

    for key in wanted.solvers:
        parse_key(key)
    model = load_model(model_folder, checkpoint)
    held = _held(out, model, wanted, overwrite)
    if held is None:
        with new_folder(out, existing="replace", alone=True) as partial:
            _fill(partial, out, model, wanted, say)
    else:
        with scratch_folder(out, alone=True) as partial:
            _extend(held, partial, model, wanted, say)


def _fill(partial: Path, out: Path, model: Model, wanted: Wanted, say: Say) -> None:
    from export.onnx import export_onnx

    for name, file in _config_files(model).items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, partial / name)
    if model.family == "text" and not (partial / "tokenizer" / "tokenizer.json").exists():
        model.tokenizer.backend_tokenizer.save(str(partial / "tokenizer" / "tokenizer.json"))
    say("compiling solver tables")  # first: a solver that does not exist is the quickest thing to find out
    _write_tables(model, partial / TABLES, wanted.solvers, say)
    for name, module in model.networks().items():
        say(f"exporting {name}")
        export_onnx(module, model.spec.signatures[name], partial / graph_name(name, "fp32"))
    if (stored := _stored_reference(out, model)) is not None:
        say("keeping the stored eager fp32 reference of these weights")
        shutil.copyfile(stored, partial / REFERENCE)
    else:
        say("running the eager fp32 reference")
        write_reference(model, partial / REFERENCE)
    _fill_lowered(partial, model, wanted.graphs(model), wanted.distances(), partial / REFERENCE, say)
    write_json(partial / MANIFEST, _manifest(model.spec) | {"files": record_files(partial)})  # the last file


def _fill_lowered(
    folder: Path, model: Model, graphs: dict[str, str], distances: Sequence[str], reference: Path, say: Say
) -> None:
    """Write graphs of these networks in these precisions, and eager's own distances in these, into `folder`."""
    from export.onnx import export_onnx

    for name, dtype in graphs.items():
        say(f"exporting {name} in {dtype}")
        export_onnx(model.networks()[name], model.spec.signatures[name], folder / graph_name(name, dtype), dtype)
    for dtype in distances:
        say(f"running eager in {dtype}")
        write_distances(model, reference, dtype, folder / distances_name(dtype))


def _extend(held: Bundle, partial: Path, model: Model, wanted: Wanted, say: Say) -> None:
    """Add what is missing. Files are moved in before bundle.json lists them: until then the old bundle is whole."""
    out = held.folder
    sweep(held)
    graphs = {name: dtype for name, dtype in wanted.graphs(model).items() if graph_name(name, dtype) not in held.files}
    distances = [dtype for dtype in wanted.distances() if distances_name(dtype) not in held.files]
    if not graphs and not distances:
        say(f"{out} holds these weights already")
        return
    say(f"{out} holds these weights already, but not all in {', '.join(dict.fromkeys([*graphs.values(), *distances]))}")
    _fill_lowered(partial, model, graphs, distances, held.file(REFERENCE), say)
    add_files(held, partial)


def _held(out: Path, model: Model, wanted: Wanted, overwrite: bool) -> Bundle | None:
    """The bundle at `out` that is to be kept; None when a new one is to be written. Raises InputError for anything else."""
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return None
    if not is_bundle(out):
        raise InputError(f"{out}: exists and is not a bundle; choose another --out")
    if overwrite:
        return None
    held = read_bundle(out)
    if other := _differences(held, model):
        raise InputError(f"{out}: holds another bundle ({other[0]} differs); choose another --out, or --overwrite")
    missing = [key for key in wanted.solvers if key not in held.solver_keys()]
    if missing:
        raise InputError(f"{out}: holds a bundle without solver {missing[0]}; --overwrite exports it again")
    return held


def _differences(held: Bundle, model: Model) -> list[str]:
    """What of a model is not as in the bundle: config files and fields of its spec, the weights' hash among them."""
    configs = {name: sha256_file(file) for name, file in _config_files(model).items()}
    other = [name for name, sha256 in configs.items() if held.files.get(name, {}).get("sha256") != sha256]
    return other + [
        f.name for f in fields(Spec) if f.compare and getattr(held.spec, f.name) != getattr(model.spec, f.name)
    ]


def _stored_reference(out: Path, model: Model) -> Path | None:
    """The reference of the bundle that is being replaced, if the same model made it with the same versions."""
    if not is_bundle(out) or read_json(out / MANIFEST).get("format_version") != FORMAT_VERSION:
        return None
    held = read_bundle(out)
    same = read_json(out / MANIFEST).get("versions") == _versions() and not _differences(held, model)
    return held.file(REFERENCE) if same else None


def _config_files(model: Model) -> dict[str, Path]:
    """Name in the bundle -> file of the model folder: component configs under the names that optimum expects, the
    tokenizer, the conditioner's config, model_index.json and labels.json."""
    assert model.folder is not None
    sources = {"vae_decoder": "vae", "vae_encoder": "vae"}
    files = {f"{n}/config.json": model.folder / sources.get(n, n) / "config.json" for n in model.networks()}
    files |= {f"tokenizer/{f.name}": f for f in sorted((model.folder / "tokenizer").glob("*")) if f.is_file()}
    names = ("scheduler/scheduler_config.json", "conditioner/config.json", "model_index.json", "labels.json")
    return files | {name: model.folder / name for name in names if (model.folder / name).is_file()}


def _write_tables(model: Model, path: Path, solvers: Sequence[str], say: Say) -> None:
    from fastgen.sampling.compile import TableCompiler
    from fastgen.sampling.tables import save_tables

    config: Any = model.scheduler_config
    skipped: list[str] = []
    compiler = TableCompiler(config)
    tables = dict(compiler.common(on_skip=lambda key, error: skipped.append(key)))
    default = model.sampling
    own = f"{default.scheduler}:{default.num_inference_steps}"
    for key in (own, f"{default.scheduler}:{IMAGE_STEPS}", *solvers):
        if key not in tables:
            tables[key] = compiler.table(key)
    for key in _late_keys(default) if model.family == "text" else ():
        try:
            tables[key] = compiler.table(key)
        except InputError:
            skipped.append(key)
    if skipped:
        more = f", ... ({len(skipped)} in all)" if len(skipped) > 6 else ""
        say(f"not stored, as their schedulers cannot do them: {', '.join(skipped[:6])}{more}")
    path.parent.mkdir(exist_ok=True)
    save_tables(path, tables)


def _late_keys(default: Sampling) -> list[str]:
    """The model's own solver begun late, `generate --rag`: with the default share of its steps, and every tenth of them."""
    steps = default.num_inference_steps
    kept = {late_steps(steps), *(late_steps(steps, strength=tenth / 10) for tenth in range(1, 11))}
    return [format_key(default.scheduler, steps, count) for count in sorted(kept)]


def _manifest(spec: Spec) -> dict[str, Any]:
    """bundle.json, but for the list of files."""
    sampling = spec.sampling
    return {
        "format_version": FORMAT_VERSION,
        "family": spec.family,
        "source_sha256": spec.sha256,
        "checkpoint": spec.checkpoint,
        "image_mode": spec.image_mode,
        "component_sha256": dict(spec.component_sha256),
        "versions": _versions(),
        "sampling": {
            "scheduler": sampling.scheduler,
            "num_inference_steps": sampling.num_inference_steps,
            "guidance_scale": sampling.guidance_scale,
        },
        "scheduler_config": infinity_as_text(spec.scheduler_config),
        "scaling_factor": spec.scaling_factor,
        "objects": spec.objects,
        "signatures": {name: s.to_json() for name, s in spec.signatures.items()},
    }


def _versions() -> dict[str, str]:
    return {"fastgen": __version__} | {p: importlib.metadata.version(p) for p in PACKAGES}
