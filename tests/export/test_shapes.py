"""Shapes become constants only where they are known but for the batch, and graphs compute the same."""

# ruff: noqa: E402

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

import onnx_ir as ir
from onnx import parser

from export.shapes import fix_shapes

HEAD = '<ir_version: 8, opset_import: ["" : 18]>'


def fixed(text):
    """(the model as it is, the model with its shapes fixed), as onnx protos."""
    before = onnx.shape_inference.infer_shapes(parser.parse_model(f"{HEAD} {text}"))
    model = ir.serde.deserialize_model(before)
    fix_shapes(model)
    return before, ir.serde.serialize_model(model)


def operators(model):
    return [node.op_type for node in model.graph.node]


def run(model, **inputs):
    return ort.InferenceSession(model.SerializeToString()).run(None, inputs)[0]


def test_a_reshape_to_another_tensor_s_shape_leaves_only_the_batch_open():
    before, after = fixed(
        "agraph (float[batch, 4, 2, 3] y) => (float[batch, 4, 2, 3] out)"
        "{ to = Constant <value = int64[3] {0, 2, -1}> () x = Reshape (y, to) s = Shape (y) out = Reshape (x, s) }"
    )
    assert "Shape" in operators(before)
    assert "Shape" not in operators(after)
    for batch in (1, 3):
        y = np.random.default_rng(batch).standard_normal((batch, 4, 2, 3), dtype=np.float32)
        assert np.array_equal(run(after, y=y), run(before, y=y))


def test_a_shape_with_two_unknown_axes_is_still_computed():
    _, after = fixed(
        "agraph (float[batch, n, 3] y, float[m] x) => (float[batch, n, 3] out) { s = Shape (y) out = Reshape (x, s) }"
    )
    assert operators(after) == ["Shape", "Reshape"]


def test_part_of_a_shape_is_not_taken_for_the_whole():
    _, after = fixed(
        "agraph (float[batch, 4] y, float[k] x) => (float[4] out) { s = Shape <start = 1> (y) out = Reshape (x, s) }"
    )
    assert operators(after) == ["Shape", "Reshape"]


def test_an_expansion_is_dropped_where_broadcasting_does_it_and_kept_where_the_result_would_shrink():
    ones = "one = Constant <value = float {1.5}> () s = Shape (y) full = Expand (one, s)"
    before, after = fixed(f"agraph (float[batch, 2] y) => (float[batch, 2] out) {{ {ones} out = Mul (y, full) }}")
    assert "Expand" not in operators(after)
    y = np.ones((3, 2), np.float32)
    assert np.array_equal(run(after, y=y), run(before, y=y))
    _, after = fixed(f"agraph (float[batch, 2] y) => (float[batch, 2] out) {{ {ones} out = Mul (one, full) }}")
    assert "Expand" in operators(after)
