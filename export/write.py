"""Writing a bundle, complete or not at all; and adding to a bundle of the same weights what it lacks."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.contents import config_files, manifest, write_tables
from export.extend import add_files, sweep
from export.kept import existing, say_lost, stored_reference
from export.options import BundleOptions
from export.reference import distances_name, read_reference, write_distances, write_reference
from export.tracing import Source, Trace, Tracing, trace
from fastgen.errors import InputError, Say
from fastgen.files.folders import new_folder, scratch_folder
from fastgen.files.hashes import record_files
from fastgen.files.jsonfiles import write_json
from fastgen.files.outputs import check_output_folder
from fastgen.models.bundle import AROUND, MANIFEST, REFERENCE, TABLES, Bundle, graph_name, read_bundle
from fastgen.models.bundle_record import sealed
from fastgen.models.signatures import QUANTISED
from fastgen.sampling.tables import parse_key

if TYPE_CHECKING:
    from fastgen.models.folder import Model


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
    bundle = existing(out, model, options, overwrite)
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
        say_lost(out, model, options, say)
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
    for name, file in config_files(model).items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, partial / name)
    for i, tokenizer in enumerate(model.tokenizers):
        file = partial / (f"tokenizer_{i + 1}" if i else "tokenizer") / "tokenizer.json"
        if not file.exists():
            tokenizer.backend_tokenizer.save(str(file))
    traces = [Trace(name, "fp32") for name in model.spec.signatures]
    with Tracing(model, source, [*traces, *_lowered(options.graphs(model))], partial, say) as tracing:
        say("compiling solver tables")  # first: it fails soonest, for a solver that does not exist
        write_tables(model, partial / TABLES, options.solvers, say)
        tracing.run_here()
        if (stored := stored_reference(out, model)) is not None:
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
    written = manifest(model.spec) | facts | {"files": record_files(partial)}
    write_json(partial / MANIFEST, sealed(written))  # the last file


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
