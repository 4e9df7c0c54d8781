"""Shapes that the exporter computes at run time -> constants: only the batch is dynamic.

The graph then has no arithmetic on the host: a GPU runs every node, and a CUDA graph can record the run.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnxscript.optimizer import remove_unused_nodes

BROADCASTING = ("Add", "Mul", "Where")


def fix_shapes(model: ir.Model) -> None:
    """Make `Reshape(x, Shape(y))` a reshape to y's known shape, and drop expansions that broadcasting does anyway, in place."""
    for node in list(model.graph):
        if node.op_type == "Reshape":
            _fix_reshape(model.graph, node)
        elif node.op_type == "Expand":
            _drop_expand(node)
    remove_unused_nodes(model)


def _fix_reshape(graph: ir.Graph, node: ir.Node) -> None:
    target, output = node.inputs[1], node.outputs[0]
    source = target.producer() if target is not None else None
    if source is None or source.op_type != "Shape" or any(attribute.value for attribute in source.attributes.values()):
        return  # attributes start and end: Shape gives only some axes
    like = source.inputs[0]
    if like is None or like.shape is None:
        return
    sizes = np.array([axis if isinstance(axis, int) else -1 for axis in like.shape], np.int64)
    if (sizes < 0).sum() > 1:
        return
    node.replace_input_with(1, _constant(graph, sizes))
    output.shape = like.shape.copy()


def _drop_expand(node: ir.Node) -> None:
    """Give operators that broadcast the value before its expansion, where another input has the full shape."""
    value, expanded = node.inputs[0], node.outputs[0]
    for user, place in list(expanded.uses()):
        shape = user.outputs[0].shape
        full = [x for x in user.inputs if x is not None and x is not expanded and x.shape is not None]
        if user.op_type in BROADCASTING and shape is not None and any(x.shape == shape for x in full):
            user.replace_input_with(place, value)


def _constant(graph: ir.Graph, sizes: np.ndarray) -> ir.Value:
    name = f"shape_{'_'.join('batch' if size < 0 else str(size) for size in sizes)}"
    if name not in graph.initializers:
        tensor = ir.tensor(sizes, name=name)
        type_ = ir.TensorType(ir.DataType.INT64)
        graph.register_initializer(ir.Value(name=name, type=type_, shape=ir.Shape(sizes.shape), const_value=tensor))
    return graph.initializers[name]
