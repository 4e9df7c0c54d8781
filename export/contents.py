"""What a bundle holds besides its networks: the model's config files, solver tables, and the fields of bundle.json."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.reference import image_steps
from fastgen import __version__
from fastgen.errors import InputError, Say
from fastgen.files.jsonfiles import infinity_as_text
from fastgen.files.records import builtins
from fastgen.generate.settings import late_steps
from fastgen.models.bundle_record import FORMAT_VERSION
from fastgen.models.spec import Spec
from fastgen.sampling.tables import format_key

if TYPE_CHECKING:
    from fastgen.models.folder import Model
    from fastgen.sampling.defaults import Sampling

PACKAGES = ("torch", "diffusers", "transformers", "onnx", "onnxscript")


def config_files(model: Model) -> dict[str, Path]:
    """Name in the bundle -> file of the model folder: component configs under the names that optimum expects, the
    tokenizers, the conditioner's config, model_index.json and labels.json."""
    assert model.folder is not None
    assert model.layout is not None
    layout = model.layout
    sources = {"unet": layout.denoiser}
    sources |= {} if layout.vae is None else {"vae_decoder": layout.vae, "vae_encoder": layout.vae}
    files: dict[str, Path] = {}
    for i, (encoder, tokenizer) in enumerate(layout.text_encoders.items()):
        end = f"_{i + 1}" if i else ""
        sources[f"text_encoder{end}"] = encoder
        files |= {f"tokenizer{end}/{f.name}": f for f in sorted((model.folder / tokenizer).glob("*")) if f.is_file()}
    files = {f"{n}/config.json": model.folder / source / "config.json" for n, source in sources.items()} | files
    names = ("scheduler/scheduler_config.json", "conditioner/config.json", "model_index.json", "labels.json")
    return files | {name: model.folder / name for name in names if (model.folder / name).is_file()}


def write_tables(model: Model, path: Path, solvers: Sequence[str], say: Say) -> None:
    """Compile the common solvers, the model's own and those of `solvers`, and write their tables to `path`. Raises InputError
    for one of the latter two that the model's scheduler cannot do."""
    from fastgen.sampling.compile import TableCompiler
    from fastgen.sampling.tables import save_tables

    config: Any = model.scheduler_config
    skipped: list[str] = []
    compiler = TableCompiler(config)
    tables = dict(compiler.common(on_skip=lambda key, error: skipped.append(key)))
    default = model.sampling
    for key in (
        *(format_key(default.scheduler, n) for n in (default.num_inference_steps, image_steps(model))),
        *solvers,
    ):
        if key not in tables:
            tables[key] = compiler.table(key)
    for key in _late_keys(default) if model.condition.text is not None else ():
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
    """Keys of the model's own solver for `generate --rag`: the default share of its steps, and every tenth of them."""
    steps = default.num_inference_steps
    counts = {late_steps(steps), *(late_steps(steps, strength=tenth / 10) for tenth in range(1, 11))}
    return [format_key(default.scheduler, steps, count) for count in sorted(counts)]


def manifest(spec: Spec) -> dict[str, Any]:
    """bundle.json, but for the list of files."""
    return {
        "format_version": FORMAT_VERSION,
        "condition": builtins(spec.condition),
        "space": builtins(spec.space),
        "source_sha256": spec.sha256,
        "checkpoint": spec.checkpoint,
        "image_mode": spec.image_mode,
        "component_sha256": dict(spec.component_sha256),
        "versions": versions(),
        "sampling": builtins(spec.sampling),
        "scheduler_config": infinity_as_text(spec.scheduler_config),
        "signatures": {name: builtins(s) for name, s in spec.signatures.items()},
    }


def versions() -> dict[str, str]:
    """Of fastgen and of the packages that make the graphs and the reference."""
    return {"fastgen": __version__} | {p: importlib.metadata.version(p) for p in PACKAGES}
