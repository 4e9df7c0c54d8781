"""Products of half-precision numbers on a CPU that has no instructions for them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fastgen.engines.machine import HALF, Cpu, has_half

HALVES = (torch.float16, torch.bfloat16)
PRODUCTS = [
    getattr(torch.ops.aten, name)
    for name in (
        *("conv1d", "conv2d", "conv3d", "conv_transpose2d", "convolution"),
        *("linear", "matmul", "einsum", "mm", "addmm", "bmm", "baddbmm"),
        *("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu"),
    )
]


def fast_products(dtype: str, cpu: Cpu) -> AbstractContextManager[Any]:
    """A context in which this CPU computes convolutions, matrix products and attention in `dtype` within reach of fp32's speed.

    With AVX2 alone torch takes forty times as long for a UNet in bf16 as in fp32. In fp16 its convolutions use one core.
    """
    return Fp32Products() if dtype in HALF and not has_half(cpu, dtype) else nullcontext()


class Fp32Products(TorchDispatchMode):
    """Computes products of fp16 or bf16 numbers in fp32, and rounds the result: what instructions for 16 bits do."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket not in PRODUCTS:
            return func(*args, **kwargs)
        half = next((x.dtype for x in tree_leaves(args) if isinstance(x, torch.Tensor) and x.dtype in HALVES), None)
        if half is None:
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(torch.Tensor, lambda x: x.float() if x.dtype == half else x, (args, kwargs))
        return tree_map_only(
            torch.Tensor, lambda x: x.to(half) if x.dtype == torch.float32 else x, func(*args, **kwargs)
        )
