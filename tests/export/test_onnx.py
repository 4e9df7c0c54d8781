"""Exported graphs compute what PyTorch computes, in fp16 and bf16 with islands that stay fp32, and no shape when they run."""

# ruff: noqa: E402

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")

import onnx_ir as ir
from diffusers.models.upsampling import Upsample2D
from onnx.reference import ReferenceEvaluator
from test_rewrite import Attention
from torch import nn

from export.onnx import export_onnx
from fastgen.models.bundle import read_bundle
from fastgen.models.folder import load_model
from fastgen.models.precision import in_precision
from fastgen.models.signatures import Signature, TensorSpec, network_dtype

CASES = [("text", "fp16"), ("labels", "bf16")]
IR_DTYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
NORMALISATIONS = ("InstanceNormalization", "LayerNormalization", "GroupNormalization")
PRODUCTS = ("Conv", "MatMul", "Gemm")


def graphs(folder, dtype):
    """Network -> its lowered graph, for those that have one."""
    bundle = read_bundle(folder)
    dtypes = {name: network_dtype(name, dtype) for name in bundle.spec.signatures}
    return {name: ir.load(bundle.network(name, d)) for name, d in dtypes.items() if d != "fp32"}


def distance(found, expected):
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_products_are_lowered_and_normalisations_and_the_time_embedding_are_not(lowered_bundle, kind, dtype):
    for name, model in graphs(lowered_bundle(kind, dtype), dtype).items():
        norms = [node for node in model.graph if node.op_type in NORMALISATIONS]
        assert norms, name
        for node in norms:
            assert {x.dtype for x in node.inputs} == {ir.DataType.FLOAT}, (name, node.name)
        products = [node for node in model.graph if node.op_type in PRODUCTS]
        islands = [node for node in products if any("time_embedding" in str(x.name) for x in node.inputs)]
        assert len(islands) == (2 if name == "unet" else 0)  # its two linear layers
        for node in products:
            expected = ir.DataType.FLOAT if node in islands else IR_DTYPES[dtype]
            assert {x.dtype for x in node.inputs} == {expected}, (name, node.name, node.op_type)


@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_lowered_graphs_take_and_give_float32_and_pass_onnx_s_checker(lowered_bundle, kind, dtype):
    folder = lowered_bundle(kind, dtype)
    for name, model in graphs(folder, dtype).items():
        path = folder / name / f"model.{dtype}.onnx"
        onnx.checker.check_model(path, full_check=True)
        assert {x.dtype for x in (*model.graph.inputs, *model.graph.outputs)} == {ir.DataType.FLOAT}
        assert (
            path.with_name(f"{path.name}.data").stat().st_size
            < 0.6 * (folder / name / "model.onnx.data").stat().st_size
        )


@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_graphs_compute_no_shapes_when_they_run(lowered_bundle, kind, dtype):
    """So that a GPU runs every node. The text encoder looks for its end tokens, once per prompt."""
    for file in lowered_bundle(kind, dtype).glob("*/model*.onnx"):
        operators = {node.op_type for node in ir.load(file).graph}
        if file.parent.name == "text_encoder":
            continue
        assert not operators & {"Shape", "Expand", "ConstantOfShape", "Range", "If", "Loop"}, file


def test_fp16_graphs_compute_what_the_lowered_modules_compute(lowered_bundle, text_model):
    model, folder = load_model(text_model), lowered_bundle("text", "fp16")
    for name in graphs(folder, "fp16"):
        inputs = model.spec.signatures[name].sample_inputs(3, np.random.default_rng(0))
        if "timestep" in inputs:
            inputs["timestep"] = np.array([0, 500, 999], np.float32)
        tensors = [torch.from_numpy(x) for x in inputs.values()]
        module = model.networks()[name]
        with torch.inference_mode():
            exact, torchs = module(*tensors), in_precision(module, "fp16")(*tensors)
        for file in (f"model{infix}.onnx" for infix in (".fp16", ".fp16.ort")):
            if not (folder / name / file).exists():
                continue
            (found,) = ort.InferenceSession(folder / name / file).run(None, inputs)
            assert distance(found, torchs.numpy()) < 3e-3, file
            assert 1e-5 < distance(found, exact.numpy()) <= 1.5 * distance(torchs.numpy(), exact.numpy()), file


class Small(nn.Module):
    """What a UNet is made of: convolution, normalisation, attention, wide upsampling."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inward, self.norm = nn.Conv2d(3, 32, 3, padding=1), nn.GroupNorm(4, 32)
        self.attention, self.outward = Attention(), nn.Conv2d(32, 128, 1)
        self.up = Upsample2D(128, use_conv=True)

    def forward(self, x):
        h = self.norm(self.inward(x))
        h = self.attention(h.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(h.shape)
        return self.up(self.outward(h))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_both_rewrites_work_in_lowered_graphs(dtype, tmp_path):
    """onnx's own reference evaluator runs them; onnxruntime's CPU has no convolution in bf16."""
    module = Small().eval()
    signature = Signature(
        (TensorSpec("x", "float32", ("batch", 3, 4, 4)),), (TensorSpec("out", "float32", ("batch", 128, 8, 8)),)
    )
    export_onnx(module, signature, tmp_path / "model.onnx", dtype)
    operators = [node.op_type for node in ir.load(tmp_path / "model.onnx").graph]
    assert operators.count("Softmax") == 1
    assert operators.count("DepthToSpace") == 1
    assert "Resize" not in operators
    fused = ir.load(tmp_path / "model.ort.onnx")
    (attention,) = [node for node in fused.graph if node.op_type == "MultiHeadAttention"]
    assert {x.dtype for x in attention.inputs if x is not None} == {IR_DTYPES[dtype]}

    x = np.random.default_rng(0).standard_normal((3, 3, 4, 4), dtype=np.float32)
    with torch.inference_mode():
        exact, torchs = module(torch.from_numpy(x)).numpy(), in_precision(module, dtype)(torch.from_numpy(x)).numpy()
    (found,) = ReferenceEvaluator(str(tmp_path / "model.onnx")).run(None, {"x": x})
    assert 0 < distance(found, exact) <= 1.5 * distance(torchs, exact)
