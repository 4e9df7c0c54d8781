"""Rewritten graphs compute what PyTorch computes."""

# ruff: noqa: E402

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")

import onnx_ir as ir
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D
from torch import nn

from export.onnx import export_onnx
from export.rewrite import SubpixelUpsample, subpixel_upsampling
from fastgen.engines.ort.session import FUSED
from fastgen.models.signatures import Signature, Tensor


@pytest.mark.parametrize("size", [(1, 1), (5, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_subpixel_convolution_is_nearest_upsampling_and_the_3x3_convolution(size, bias):
    torch.manual_seed(0)
    conv, x = nn.Conv2d(6, 4, 3, padding=1, bias=bias), torch.randn(2, 6, *size)
    expected = conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    torch.testing.assert_close(SubpixelUpsample(conv)(x), expected, rtol=1e-5, atol=1e-5)


def test_wide_upsamplers_are_replaced_and_put_back():
    wide, narrow = Upsample2D(128, use_conv=True), Upsample2D(16, use_conv=True)
    learned = Upsample2D(128, use_conv=True, use_conv_transpose=True)
    model, x = nn.ModuleList([wide, narrow, learned]), torch.randn(1, 128, 3, 3)
    with subpixel_upsampling(model):
        assert model[0] is not wide
        assert list(model)[1:] == [narrow, learned]
        torch.testing.assert_close(model[0](x), wide(x), rtol=1e-5, atol=1e-5)
        assert torch.equal(model[0](x, output_size=(5, 6)), wide(x, output_size=(5, 6)))
    assert list(model) == [wide, narrow, learned]


def test_upsamplers_are_put_back_after_an_error():
    model = nn.ModuleList([Upsample2D(128, use_conv=True)])
    with pytest.raises(KeyError), subpixel_upsampling(model):
        raise KeyError
    assert isinstance(model[0], Upsample2D)


class Attention(nn.Module):
    """Self-attention with four heads, as diffusers and transformers write it."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.options, self.project = options, nn.ModuleList([nn.Linear(32, 32) for _ in range(4)])

    def forward(self, states):
        q, k, v = (p(states).view(states.shape[0], -1, 4, 8).transpose(1, 2) for p in self.project[:3])
        merged = F.scaled_dot_product_attention(q, k, v, **self.options).transpose(1, 2)
        return self.project[3](merged.reshape(states.shape[0], -1, 32))


@pytest.mark.parametrize(
    ("options", "fused"),
    [
        ({}, True),
        ({"scale": 0.7}, True),
        ({"is_causal": True}, False),
        ({"attn_mask": torch.ones(11, 11).tril() > 0}, False),
        ({"attn_mask": torch.linspace(-3, 3, 121).view(11, 11)}, False),
    ],
)
def test_exported_attention_is_torchs_and_fused_where_it_has_no_mask(options, fused, tmp_path):
    module = Attention(**options).eval()
    signature = Signature(
        (Tensor("states", "float32", ("batch", 11, 32)),), (Tensor("out", "float32", ("batch", 11, 32)),)
    )
    export_onnx(module, signature, tmp_path / "model.onnx")
    assert (tmp_path / FUSED).exists() == fused
    x = 3 * np.random.default_rng(0).standard_normal((3, 11, 32), dtype=np.float32)
    expected = module(torch.from_numpy(x)).detach().numpy()
    for file in sorted(tmp_path.glob("*.onnx")):
        operators = {node.op_type for node in ir.load(file).graph}
        assert ("MultiHeadAttention" in operators) == (file.name == FUSED)
        assert ("Softmax" in operators) == (file.name != FUSED)
        (found,) = ort.InferenceSession(file).run(None, {"states": x})
        assert np.abs(found - expected).max() < 1e-5
