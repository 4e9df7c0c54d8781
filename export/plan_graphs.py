"""Graphs in eight bits for TensorRT: a network's fp16 graph with symmetric Q/DQ pairs around the layers that bear it.

Calibration, the table of layers and the budget are those of graphs for CPUs (`export.int8`); the format's own rounding is
measured. TensorRT is strongly typed: it computes a layer in eight bits where both its inputs come from DequantizeLinear.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from msgspec import to_builtins
from torch import nn

from export.calibration import Span, calibrate, layers
from export.fitting import fit
from export.int8 import layer_nodes, layer_table
from export.onnx import export_onnx
from export.quantisation import Quantisation, quantisation_name
from export.symmetric import FORMATS, Format
from fastgen.errors import FastgenError, Say
from fastgen.files.folders import scratch_folder
from fastgen.files.jsonfiles import write_json
from fastgen.models.bundle import AROUND, graph_name, plan_graph

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastgen.generate.requests import Request
    from fastgen.models.folder import Model


def write_plan_graphs(
    folder: Path,
    model: Model,
    graphs: Mapping[str, str],
    halves: Mapping[str, Path],
    requests: Sequence[Request],
    reference: Mapping[str, np.ndarray],
    say: Say,
) -> None:
    """Write the `graphs` (network -> precision, see `plan_graph`) in eight bits and their tables of layers below `folder`.

    `halves`: network -> its fp16 graph, where there is one; others are exported. `requests`: whose images are calibrated with.
    `reference`: see `fit`. Raises FastgenError when no layer of a network can be in eight bits.
    """
    (dtype,) = {graph.removesuffix(AROUND) for graph in graphs.values()}
    format, modules = FORMATS[dtype], model.networks()
    say(f"calibrating {dtype}: what the networks see while eager makes {len(requests)} images")
    seen = calibrate(model, requests)
    with scratch_folder(folder / "half") as scratch:
        halves = dict(halves)
        for name in (name for name in graphs if name not in halves):
            say(f"exporting {name} in fp16")
            halves[name] = scratch / f"{name}.onnx"
            export_onnx(modules[name], model.spec.signatures[name], halves[name], "fp16")
        nodes = {name: plan_nodes(modules[name], halves[name], format) for name in graphs}
        tables = {n: layer_table(modules[n], n, seen.rows[n], seen.spans[n], nodes[n], format.rounding) for n in graphs}
        say(f"making images in {dtype}, to see how much of the networks it may be")
        found = fit(model, tables, seen.spans, reference, say, dtype, format.rounding)
        for name in graphs:
            say(f"quantising {name} in {dtype} for TensorRT")
            write_plan_graph(name, seen.spans[name], halves[name], folder, found[name], nodes[name], format)
            say(found[name].summary(dtype))


def plan_nodes(module: nn.Module, half: Path, format: Format) -> dict[str, list[str]]:
    """Layer -> its nodes in the fp16 graph `half`, for layers that TensorRT has kernels in this format for."""
    found = layers(module)
    return {name: nodes for name, nodes in layer_nodes(module, half, np.float16).items() if format.fits(found[name])}


def write_plan_graph(
    network: str,
    spans: Mapping[str, Span],
    half: Path,
    folder: Path,
    found: Quantisation,
    nodes: Mapping[str, Sequence[str]],
    format: Format,
) -> None:
    """Write a network's graph with the layers in eight bits that `found` says, made from the fp16 graph `half`, and the table
    of layers, below `folder`. `spans`: of the layers' inputs. Raises FastgenError when no layer is to be."""
    quantised = [layer.name for layer in found.layers if layer.quantised]
    if not quantised:
        raise FastgenError(f"{network}: none of its {len(found.layers)} layers bears {format.name}; use --dtype fp16")
    model = ir.load(half)
    insert_pairs(model, {node: spans[name] for name in quantised for node in nodes[name]}, format)
    graph = plan_graph(format.name)
    path = folder / graph_name(network, graph)
    path.parent.mkdir(parents=True, exist_ok=True)
    ir.save(model, path, external_data=f"{path.name}.data")
    write_json(folder / quantisation_name(network, graph), to_builtins(found))


def insert_pairs(model: ir.Model, spans: Mapping[str, Span], format: Format) -> None:
    """Let the nodes called so compute with inputs and weights from DequantizeLinear, in place. `spans`: of their inputs.

    Nodes with the same input and the same span share its pair.
    """
    graph = model.graph
    pairs: dict[tuple[ir.Value, Span], ir.Value] = {}
    for node in [node for node in graph if node.name in spans]:
        source, span, weight = node.inputs[0], spans[str(node.name)], node.inputs[1]
        assert source is not None
        assert weight is not None
        if (source, span) not in pairs:
            scale = _initializer(graph, f"{node.name}.input_scale", ir.tensor(format.scale(max(-span[0], span[1]))))
            zero = _initializer(graph, f"{node.name}.input_zero", format.zero())
            quantise = ir.node("QuantizeLinear", [source, scale, zero], name=f"{node.name}.quantise")
            restore = ir.node("DequantizeLinear", [quantise.outputs[0], scale, zero], name=f"{node.name}.dequantise")
            for new, what, kind in ((quantise, "quantised", format.type), (restore, "restored", ir.DataType.FLOAT16)):
                _describe(new.outputs[0], f"{node.name}.input_{what}", kind, source.shape)
            graph.insert_before(node, [quantise, restore])
            pairs[source, span] = restore.outputs[0]
        restore = _weights(graph, node, weight, format)
        graph.insert_before(node, restore)
        node.replace_input_with(0, pairs[source, span])
        node.replace_input_with(1, restore.outputs[0])
        if not weight.uses():
            graph.initializers.pop(str(weight.name))


def _weights(graph: ir.Graph, node: ir.Node, weight: ir.Value, format: Format) -> ir.Node:
    """The DequantizeLinear of a node's weights, which become 8-bit initializers."""
    assert weight.const_value is not None
    values = weight.const_value.numpy()
    transposed = node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int()
    axis = 0 if node.op_type == "Conv" or transposed else values.ndim - 1  # of the output channels
    others = tuple(i for i in range(values.ndim) if i != axis)
    magnitudes = np.abs(values).max(others, keepdims=True) if format.per_channel else np.abs(values).max()
    scale = format.scale(magnitudes)
    tensors = format.quantised(values, scale), ir.tensor(scale.reshape(-1) if format.per_channel else scale)
    zero = format.zero((values.shape[axis],) if format.per_channel else ())
    inputs = [
        _initializer(graph, f"{node.name}.weight_{what}", tensor)
        for what, tensor in zip(("quantised", "scale", "zero"), (*tensors, zero), strict=True)
    ]
    attributes = {"axis": axis} if format.per_channel else {}
    restore = ir.node("DequantizeLinear", inputs, attributes, name=f"{node.name}.dequantise_weight")
    _describe(restore.outputs[0], f"{node.name}.weight_restored", ir.DataType.FLOAT16, weight.shape)
    return restore


def _describe(value: ir.Value, name: str, kind: ir.DataType, shape: ir.Shape | None) -> None:
    value.name, value.type, value.shape = name, ir.TensorType(kind), shape


def _initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.Value(
        name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy())
    )
    graph.register_initializer(value)
    return value
