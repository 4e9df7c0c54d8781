"""Weights in half the bytes: a graph that computes in fp32 keeps its large weights in fp16, each behind a Cast to fp32.

Both onnxruntime and OpenVINO compute the casts once, when they load the graph: a picture takes as long as before.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from export.rewrite import fuse_attention
from fastgen.engines.ort.session import fused_name
from fastgen.files.folders import scratch_folder

MOST_ERROR = 1e-3  # the largest relative L2 error that rounding may make in a tensor; usual is 2e-4
QUANTISERS = ("QuantizeLinear", "DequantizeLinear")
SMALLEST = 1024  # numbers in a tensor; for a smaller one, such as a bias, the Cast takes the bytes that fp16 saves


def halve_weights(graph: Path) -> None:
    """Rewrite an ONNX graph, its weights `graph`.data, and the graph with fused attention beside them, in place.

    Weights that fp16 cannot hold, above 65,504 or mostly below 6e-5, stay in fp32, and so do the scales of eight bits.
    Raises FastgenError when the disk refuses.
    """
    model, data = ir.load(graph), f"{graph.name}.data"
    for value in list(model.graph.initializers.values()):
        _halve(model.graph, value)
    fused = graph.with_name(fused_name(graph.name))
    with scratch_folder(graph) as scratch:  # the old data is read while the new is written
        ir.save(model, scratch / graph.name, external_data=data)
        for name in (graph.name, data):
            if (scratch / name).exists():
                (scratch / name).replace(graph.with_name(name))
    if fused.exists():
        model = ir.load(graph)
        fuse_attention(model)
        ir.save(model, fused)


def _halve(graph: ir.Graph, value: ir.Value) -> None:
    tensor = value.const_value
    if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < SMALLEST or value.is_graph_output():
        return
    if any(node.op_type in QUANTISERS and place for node, place in value.uses()):  # a scale
        return
    weights = tensor.numpy()
    with np.errstate(over="ignore"):
        half = weights.astype(np.float16)
        error = np.linalg.norm(half.astype(np.float32) - weights)
    if not error <= MOST_ERROR * np.linalg.norm(weights):
        return
    name = f"{value.name}.fp16"
    kind = ir.TensorType(ir.DataType.FLOAT16)
    stored = ir.Value(name=name, type=kind, shape=ir.Shape(half.shape), const_value=ir.tensor(half, name=name))
    whole = ir.Value(name=f"{value.name}.fp32", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(half.shape))
    cast = ir.Node("", "Cast", [stored], [ir.AttrInt64("to", ir.DataType.FLOAT)], outputs=[whole], name=f"{name}.cast")
    value.replace_all_uses_with(whole)
    graph.initializers.pop(str(value.name))
    graph.register_initializer(stored)
    graph.insert_before(graph[0], cast)
