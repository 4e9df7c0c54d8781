"""Rewrites that make the exported graphs cheaper: other operations that compute the same up to rounding."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from onnxscript import opset20 as op
from onnxscript.optimizer import remove_unused_nodes
from onnxscript.rewriter import RewriteRuleClassBase, RewriteRuleSet
from onnxscript.rewriter.rules.common import slice_split_rule
from torch import Tensor, nn

MIN_CHANNELS = 128  # with fewer, interleaving costs more than the products it saves


class SubpixelUpsample(nn.Module):
    """Nearest-neighbour upsampling by 2 and the 3x3 convolution after it, computed at the small size.

    Every output pixel of that pair sees only 2x2 different input pixels: four 2x2 convolutions, one per parity of row and
    column, whose weights are sums of the 3x3 ones, then interleaved; 16/36 of the products. See "sub-pixel convolution",
    Shi et al. 2016 (https://arxiv.org/abs/1609.05158).
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        weight = conv.weight.detach().double()  # (O, I, 3, 3)
        for row in (0, 1):
            for column in (0, 1):
                taps = _merge_taps(_merge_taps(weight, 2, row), 3, column)  # (O, I, 2, 2)
                self.register_buffer(f"weight_{row}{column}", taps.to(conv.weight.dtype))
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, h, w) -> (B, O, 2h, 2w)."""
        phases = []
        for row in (0, 1):
            for column in (0, 1):
                padded = F.pad(x, (1 - column, column, 1 - row, row))
                phases.append(F.conv2d(padded, getattr(self, f"weight_{row}{column}"), self.bias))  # type: ignore[arg-type]
        return F.pixel_shuffle(torch.stack(phases, dim=2).flatten(1, 2), 2)  # of (B, 4 * O, h, w)


def _merge_taps(weight: Tensor, dim: int, parity: int) -> Tensor:
    """Three taps on doubled pixels -> two taps on single ones: an even pixel sees its left neighbour once, an odd one its
    right neighbour."""
    first, middle, last = weight.unbind(dim)
    return torch.stack((first, middle + last) if parity == 0 else (first + middle, last), dim)


@contextlib.contextmanager
def subpixel_upsampling(module: nn.Module) -> Iterator[None]:
    """Within the context, diffusers' wide upsamplers in `module` (nearest, 3x3 convolution) are SubpixelUpsample."""
    children = [(parent, name, child) for parent in module.modules() for name, child in parent.named_children()]
    upsamplers = [(parent, name, child) for parent, name, child in children if is_upsample_conv(child)]
    try:
        for parent, name, child in upsamplers:
            setattr(parent, name, _Upsample(child))
        yield
    finally:
        for parent, name, child in upsamplers:
            setattr(parent, name, child)


class _Upsample(nn.Module):
    """SubpixelUpsample in place of an Upsample2D, which still runs where an `output_size`, such as an odd one, is given."""

    def __init__(self, upsample: Any) -> None:
        super().__init__()
        self.original = upsample
        self.subpixel = SubpixelUpsample(upsample.conv)

    def forward(self, x: Tensor, output_size: Any = None) -> Tensor:
        return self.subpixel(x) if output_size is None else self.original(x, output_size)


def is_upsample_conv(module: nn.Module) -> bool:
    from diffusers.models.upsampling import Upsample2D

    if not isinstance(module, Upsample2D) or module.use_conv_transpose or module.norm is not None:
        return False
    conv: Any = getattr(module, "conv", None)
    plain = isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3) and conv.padding == (1, 1) and conv.groups == 1
    return bool(module.interpolate and plain and conv.in_channels >= MIN_CHANNELS)


@contextlib.contextmanager
def quick_slices() -> Iterator[None]:
    """Within the context, onnxscript's rule for two slices that are a split is tried on slices alone.

    Its pattern begins with a slice, but its matcher walks the whole graph before it looks at the node: for every node that
    takes a third of the time in which a large network is exported.
    """
    rewrite = slice_split_rule.try_rewrite

    def on_slices(model: Any, graph: Any, node: ir.Node, **options: Any) -> Any:
        return rewrite(model, graph, node, **options) if node.op_type == "Slice" else None

    with mock.patch.object(slice_split_rule, "try_rewrite", on_slices):
        yield


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """A custom translation for torch.onnx.export: scaled_dot_product_attention, (B, heads, N, d), as the five nodes that
    compilers recognise as attention. torch's own translation has fifteen nodes, with shapes computed at run time."""
    assert not enable_gqa
    dtype = query.dtype.numpy()  # of the whole attention: fp32, or fp16 or bf16 in a lowered graph
    factor = np.asarray(1 / math.sqrt(query.shape[-1]) if scale is None else scale, dtype)
    keys = op.Transpose(key, perm=[0, 1, 3, 2])
    scores = op.MatMul(op.Mul(query, _constant(factor)), keys)  # (B, heads, N, M)
    if is_causal:
        attn_mask = _constant(np.tri(int(query.shape[-2]), int(key.shape[-2]), dtype=bool))
    if attn_mask is not None:
        boolean = is_causal or attn_mask.dtype == ir.DataType.BOOL
        lowest = _constant(np.asarray(torch.finfo(getattr(torch, dtype.name)).min, dtype))
        scores = op.Where(attn_mask, scores, lowest) if boolean else op.Add(scores, attn_mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)


def _constant(value: Any) -> Any:
    return op.Constant(value=ir.tensor(np.asarray(value)))  # type: ignore[arg-type]


class _FuseAttention(RewriteRuleClassBase):
    """The `attention` above between the splitting and the merging of heads -> MultiHeadAttention."""

    def pattern(self, op: Any, query: Any, key: Any, value: Any, split: Any, factor: Any) -> Any:
        q = op.Transpose(op.Reshape(query, split), perm=[0, 2, 1, 3])
        keys = op.Transpose(op.Reshape(key, _allow_other_inputs=True), perm=[0, 2, 3, 1])
        v = op.Transpose(op.Reshape(value, _allow_other_inputs=True), perm=[0, 2, 1, 3])
        weights = op.Softmax(op.MatMul(op.Mul(q, factor), keys), axis=-1)
        merged = op.Transpose(op.MatMul(weights, v), perm=[0, 2, 1, 3])
        return op.Reshape(merged, _allow_other_inputs=True)

    def rewrite(self, op: Any, query: Any, key: Any, value: Any, split: Any, factor: Any) -> Any:
        return op.MultiHeadAttention(
            query,
            key,
            value,
            num_heads=int(split.const_value.numpy()[2]),
            scale=float(factor.const_value.numpy()),
            _domain="com.microsoft",
            _version=1,
        )


def fuse_attention(model: ir.Model) -> int:
    """Replace unmasked attention by onnxruntime's MultiHeadAttention, which never holds the (N, M) scores, in place.

    Returns how many were replaced. The graph then runs on onnxruntime alone.
    """
    count = RewriteRuleSet([_FuseAttention.rule()]).apply_to_model(model)
    remove_unused_nodes(model)
    return count
