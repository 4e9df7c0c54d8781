"""Writing a bundle, complete or not at all; and adding to a bundle of the same weights what it lacks."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.extend import add_files, check_replaceable, sweep
from export.reference import distances_name, image_steps, is_current, read_reference, write_distances, write_reference
from export.tracing import Source, Trace, Tracing, trace
from fastgen import __version__
from fastgen.errors import InputError, Say
from fastgen.files.folders import new_folder, scratch_folder
from fastgen.files.hashes import record_files, sha256_file
from fastgen.files.jsonfiles import infinity_as_text, write_json
from fastgen.files.outputs import check_output_folder
from fastgen.files.records import builtins
from fastgen.generate.settings import late_steps
from fastgen.models.bundle import (
    AROUND,
    COMPILED,
    LOWERED,
    MANIFEST,
    REFERENCE,
    TABLES,
    Bundle,
    graph_name,
    is_bundle,
    plan_graph,
    read_bundle,
)
from fastgen.models.bundle_record import FORMAT_VERSION, Weights, sealed
from fastgen.models.signatures import EIGHT_BITS, QUANTISED, network_dtype
from fastgen.models.spec import Spec
from fastgen.sampling.tables import format_key, parse_key

if TYPE_CHECKING:
    from export.task_score import Task
    from fastgen.models.folder import Model
    from fastgen.sampling.defaults import Sampling

PACKAGES = ("torch", "diffusers", "transformers", "onnx", "onnxscript")


@dataclass(frozen=True)
class BundleOptions:
    """What a bundle holds besides the model itself: tables of `solvers`, `NAME:STEPS[:NOISE_STEPS]`, and graphs in `dtype`.

    `plans`: whether TensorRT builds plans from them, which has graphs in eight bits of its own. `calibration`: a request file
    for graphs in eight bits; None: the certificate's requests. `task`: of the certificate, which is checked before anything is
    exported. `feature_cache`: the networks of a split UNet too, in fp32. `weights`: the precision in which graphs that compute
    in fp32 keep theirs on disk; None: fp32 in a new bundle, as it is in an old one.
    """

    solvers: Sequence[str] = ()
    dtype: str = "fp32"
    plans: bool = False
    calibration: Path | None = None
    task: Task | None = None
    feature_cache: bool = False
    weights: Weights | None = None

    def graphs(self, model: Model) -> dict[str, str]:
        """Network -> precision, of all graphs in less than fp32; see `graph_name`."""
        dtypes = {name: network_dtype(name, self.dtype) for name in model.spec.signatures}
        return {name: plan_graph(dtype) if self.plans else dtype for name, dtype in dtypes.items() if dtype != "fp32"}

    def distances(self) -> list[str]:
        """Precisions whose distance from fp32 in eager certificates need: `dtype`, and bf16, a CPU's default."""
        return ["bf16"] if self.dtype in ("fp32", "bf16", *EIGHT_BITS) else ["bf16", self.dtype]


def write_bundle(model_folder: Path, out: Path, options: BundleOptions, overwrite: bool, say: Say, **how: Any) -> None:
    """Make `out` the bundle of this model folder: write it, add what it lacks, or leave it as it is. `how`: the arguments of
    `load_model`.

    Raises InputError for an unknown solver, and where `out` is something else, or another bundle without `overwrite`.
    """
    check_output_folder(out)
    for key in options.solvers:
        parse_key(key)
    source = Source(model_folder, how)
    model = source.load()
    bundle = _existing(out, model, options, overwrite)
    _check_solvers(model, options.solvers)
    if options.calibration is not None:
        from export.calibration import calibration_requests

        calibration_requests(options.calibration, model.spec.condition)
        if bundle is not None and graph_name("unet", options.graphs(model)["unet"]) in bundle.files:
            held = f"{out} holds {options.dtype} graphs already, calibrated when they were made"
            raise InputError(f"--calibration: {held}; --overwrite exports it again")
    if options.task is not None:
        options.task.check(model.spec.condition)
    if options.feature_cache:
        model.check_split()
    if bundle is None:
        _say_lost(out, model, options, say)
        with new_folder(out, existing="replace") as partial:
            _fill(partial, out, model, source, options, say)
    else:
        with scratch_folder(out) as partial:
            _extend(bundle, partial, model, source, options, say)


def _check_solvers(model: Model, solvers: Sequence[str]) -> None:
    """InputError for a solver that the model cannot have, before the many others are compiled."""
    from fastgen.sampling.compile import TableCompiler

    compiler = TableCompiler(model.scheduler_config)
    for key in solvers:
        compiler.table(key)


def _fill(partial: Path, out: Path, model: Model, source: Source, options: BundleOptions, say: Say) -> None:
    for name, file in _config_files(model).items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, partial / name)
    for i, tokenizer in enumerate(model.tokenizers):
        file = partial / (f"tokenizer_{i + 1}" if i else "tokenizer") / "tokenizer.json"
        if not file.exists():
            tokenizer.backend_tokenizer.save(str(file))
    traces = [Trace(name, "fp32") for name in model.spec.signatures]
    with Tracing(model, source, [*traces, *_lowered(options.graphs(model))], partial, say) as tracing:
        say("compiling solver tables")  # first: it fails soonest, for a solver that does not exist
        _write_tables(model, partial / TABLES, options.solvers, say)
        tracing.run_here()
        if (stored := _stored_reference(out, model)) is not None:
            say("keeping the stored eager fp32 reference of these weights")
            shutil.copyfile(stored, partial / REFERENCE)
        else:
            say("running the eager fp32 reference")
            write_reference(model, partial / REFERENCE)
        _fill_distances(partial, model, options.distances(), partial / REFERENCE, say)
        tracing.finish()
    fp32 = {name: partial / graph_name(name, "fp32") for name in model.networks()}
    _fill_int8(partial, model, options, fp32, partial / REFERENCE, say)
    _fill_plan_graphs(partial, model, options, options.graphs(model), {}, partial / REFERENCE, say)
    facts = _fill_split(partial, model, say) if options.feature_cache else {}
    if options.weights == "fp16":
        facts |= {"weights": "fp16"}
        _halve(partial, say)
    manifest = _manifest(model.spec) | facts | {"files": record_files(partial)}
    write_json(partial / MANIFEST, sealed(manifest))  # the last file


def _lowered(graphs: Mapping[str, str]) -> list[Trace]:
    """Those of the graphs (network -> precision) in less than fp32 that are traced: in eight bits they are made from others."""
    return [Trace(name, dtype) for name, dtype in graphs.items() if dtype in ("fp16", "bf16")]


def _fill_distances(folder: Path, model: Model, distances: Sequence[str], reference: Path, say: Say) -> None:
    """Write the distances of eager from fp32 in the precisions `distances`."""
    for dtype in distances:
        say(f"running eager in {dtype}")
        write_distances(model, reference, dtype, folder / distances_name(dtype))


def _fill_split(folder: Path, model: Model, say: Say) -> dict[str, Any]:
    """Write the graphs of the split UNet; the fields of bundle.json that come with them."""
    from export.onnx import export_onnx

    for name, module in model.split_networks().items():
        say(f"exporting {name}")
        export_onnx(module, model.spec.split_signatures[name], folder / graph_name(name, "fp32"))
    return {"deep_feature": model.spec.deep_feature, "shallow_share": _share(model)}


def _halve(folder: Path, say: Say) -> None:
    """Store the weights of the new graphs that compute in fp32, some of them around eight bits, in fp16."""
    from export.half_weights import halve_weights

    graphs = sorted(graph for name in ("model.onnx", "model.int8.onnx") for graph in folder.glob(f"*/{name}"))
    if graphs:
        say("storing weights in fp16")
    for graph in graphs:
        halve_weights(graph)


def _share(model: Model) -> float:
    """`shallow_share` of bundle.json, see `Source.shallow_share`."""
    return round(model.shallow_share(), 4)


def _fill_int8(
    folder: Path, model: Model, options: BundleOptions, fp32: Mapping[str, Path], reference: Path, say: Say
) -> None:
    """Write the graphs in eight bits, made from the `fp32` ones, and what of them stays in higher precision."""
    networks = [name for name, dtype in options.graphs(model).items() if dtype == "int8"]
    if not networks:
        return
    from export.calibration import calibrate, calibration_requests
    from export.fitting import fit
    from export.int8 import layer_nodes, layer_table, write_int8

    requests = calibration_requests(options.calibration, model.spec.condition)
    say(f"calibrating int8: what the networks see while eager makes {len(requests)} images")
    seen, modules = calibrate(model, requests), model.networks()
    nodes = {name: layer_nodes(modules[name], fp32[name]) for name in networks}
    tables = {n: layer_table(modules[n], n, seen.rows[n], seen.spans[n], nodes[n]) for n in networks}
    say("making images in int8, to see how much of the networks it may be")
    found = fit(model, tables, seen.spans, read_reference(reference), say)
    for name in networks:
        say(f"quantising {name}")
        write_int8(name, model.spec.signatures[name], seen.rows[name], fp32[name], folder, found[name], nodes[name])
        say(found[name].summary("int8"))


def _fill_plan_graphs(
    folder: Path,
    model: Model,
    options: BundleOptions,
    graphs: Mapping[str, str],
    halves: Mapping[str, Path],
    reference: Path,
    say: Say,
) -> None:
    """Write those of the `graphs` (network -> precision) in eight bits that TensorRT builds plans from.

    `halves`: network -> its fp16 graph, where there is one."""
    graphs = {name: graph for name, graph in graphs.items() if graph.endswith(AROUND)}
    if graphs:
        from export.calibration import calibration_requests
        from export.plan_graphs import write_plan_graphs

        requests = calibration_requests(options.calibration, model.spec.condition)
        write_plan_graphs(folder, model, graphs, halves, requests, read_reference(reference), say)


def _extend(bundle: Bundle, partial: Path, model: Model, source: Source, options: BundleOptions, say: Say) -> None:
    """Add what is missing. Files are moved in before bundle.json lists them: until then the old bundle is whole."""
    out = bundle.folder
    sweep(bundle)
    graphs = {
        name: dtype for name, dtype in options.graphs(model).items() if graph_name(name, dtype) not in bundle.files
    }
    distances = [dtype for dtype in options.distances() if distances_name(dtype) not in bundle.files]
    split = options.feature_cache and bundle.spec.deep_feature is None
    if options.feature_cache and not split and bundle.counted_share is None:  # of an older version
        add_files(bundle, partial, facts={"shallow_share": _share(model)})
        bundle = read_bundle(out)  # its certificates were carried to its new hash
    if not graphs and not distances and not split:
        say(f"{out} holds these weights already")
        return
    lacking = list(dict.fromkeys([*graphs.values(), *distances]))
    what = [*([f"not all in {', '.join(lacking)}"] if lacking else []), *(["no split UNet"] if split else [])]
    say(f"{out} holds these weights already, but {' and '.join(what)}")
    with Tracing(model, source, _lowered(graphs), partial, say) as tracing:
        tracing.run_here()
        _fill_distances(partial, model, distances, bundle.file(REFERENCE), say)
        tracing.finish()
    if "int8" in graphs.values():
        fp32 = _whole_graphs(bundle, partial / "whole", model, say)
        _fill_int8(partial, model, options, fp32, bundle.file(REFERENCE), say)
    halves = {name: bundle.network(name, "fp16") for name in graphs if graph_name(name, "fp16") in bundle.files}
    _fill_plan_graphs(partial, model, options, graphs, halves, bundle.file(REFERENCE), say)
    facts = _fill_split(partial, model, say) if split else None
    if bundle.weights == "fp16":
        _halve(partial, say)
    shutil.rmtree(partial / "whole", ignore_errors=True)
    add_files(bundle, partial, facts=facts)


def _whole_graphs(bundle: Bundle, scratch: Path, model: Model, say: Say) -> dict[str, Path]:
    """Network -> its graph with weights in fp32, exported once more below `scratch` where the bundle has them in fp16."""
    if bundle.weights == "fp32":
        return {name: bundle.network(name) for name in model.networks()}
    traces = [Trace(name, "fp32") for name in QUANTISED if name in model.networks()]
    say("exporting the networks once more, as the bundle has their weights in fp16")
    trace(model, traces, scratch)
    return {one.network: scratch / graph_name(one.network, one.dtype) for one in traces}


def _existing(out: Path, model: Model, options: BundleOptions, overwrite: bool) -> Bundle | None:
    """The bundle at `out` to keep; None where a new one is written. Raises InputError where neither is allowed."""
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return None
    if not is_bundle(out):
        raise InputError(f"{out}: exists and is not a bundle; choose another --out")
    if overwrite:
        check_replaceable(out)
        return None
    bundle = read_bundle(out)
    if other := _differences(bundle, model):
        raise InputError(f"{out}: holds another bundle ({other[0]} differs); choose another --out, or --overwrite")
    if options.weights not in (None, bundle.weights):
        raise InputError(
            f"{out}: holds weights in {bundle.weights}; --overwrite exports it again, in {options.weights}"
        )
    if missing := [key for key in options.solvers if key not in bundle.solver_keys()]:
        raise InputError(f"{out}: holds a bundle without solver {missing[0]}; --overwrite exports it again")
    return bundle


def _say_lost(out: Path, model: Model, options: BundleOptions, say: Say) -> None:
    """Say what a bundle that is being replaced holds, and the new one will not."""
    if not is_bundle(out):
        return
    try:
        bundle = read_bundle(out)
    except InputError:  # it is being replaced, which mends what is wrong with it
        return
    held = {part for name in bundle.files if name.endswith(".onnx") for part in name.split(".")}
    lost = [f"graphs in {dtype}" for dtype in sorted((held & {*LOWERED}) - {*options.graphs(model).values()})]
    lost += ["networks for --cache-interval"] if bundle.spec.deep_feature and not options.feature_cache else []
    lost += ["weights in fp16"] if bundle.weights == "fp16" and options.weights != "fp16" else []
    rtx = any(name.startswith(f"{COMPILED}/") for name in bundle.files)
    lost += ["plans for RTX cards"] if rtx and not options.plans else []
    if lost:
        say(
            f"--overwrite: {out} had {', '.join(lost)}; the new bundle has not, unless the same options are given again"
        )


def _differences(bundle: Bundle, model: Model) -> list[str]:
    """Config files and fields of the spec, such as the weights' hash, in which a model differs from a bundle."""
    configs = {name: sha256_file(file) for name, file in _config_files(model).items()}
    files = [name for name, sha256 in configs.items() if _sha256(bundle, name) != sha256]
    compared = [f.name for f in fields(Spec) if f.compare]
    return files + [name for name in compared if getattr(bundle.spec, name) != getattr(model.spec, name)]


def _sha256(bundle: Bundle, name: str) -> str | None:
    """The hash that a bundle states of a file; None for one that it does not hold."""
    return bundle.files[name].sha256 if name in bundle.files else None


def _stored_reference(out: Path, model: Model) -> Path | None:
    """The reference of the bundle that is being replaced, if the same model made it with the same versions, as today's code
    would."""
    if not is_bundle(out):
        return None
    try:
        bundle = read_bundle(out)
        same = bundle.versions == _versions() and not _differences(bundle, model)
        return bundle.file(REFERENCE) if same and is_current(bundle) else None
    except InputError:  # it is being replaced, which mends what is wrong with it
        return None


def _config_files(model: Model) -> dict[str, Path]:
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


def _write_tables(model: Model, path: Path, solvers: Sequence[str], say: Say) -> None:
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


def _manifest(spec: Spec) -> dict[str, Any]:
    """bundle.json, but for the list of files."""
    return {
        "format_version": FORMAT_VERSION,
        "condition": builtins(spec.condition),
        "space": builtins(spec.space),
        "source_sha256": spec.sha256,
        "checkpoint": spec.checkpoint,
        "image_mode": spec.image_mode,
        "component_sha256": dict(spec.component_sha256),
        "versions": _versions(),
        "sampling": builtins(spec.sampling),
        "scheduler_config": infinity_as_text(spec.scheduler_config),
        "signatures": {name: builtins(s) for name, s in spec.signatures.items()},
    }


def _versions() -> dict[str, str]:
    return {"fastgen": __version__} | {p: importlib.metadata.version(p) for p in PACKAGES}
