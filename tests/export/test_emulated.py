"""Eager in 16 bits on a CPU without instructions for them: the same numbers up to rounding, in a fraction of the time."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from export.emulated import Fp32Products, fast_products  # noqa: E402
from export.reference import bundle_reference, flat, relative_l2, run_network  # noqa: E402
from fastgen.engines.eager.engine import Engine as Eager  # noqa: E402
from fastgen.engines.machine import Cpu  # noqa: E402
from fastgen.models.bundle import read_bundle  # noqa: E402
from fastgen.models.folder import load_model  # noqa: E402


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_distances_from_fp32_are_those_of_torch_itself(text_model, text_bundle, dtype):
    bundle, eager = read_bundle(text_bundle), Eager(load_model(text_model), device="cpu", dtype=dtype)
    tensors = bundle_reference(bundle)
    for name, signature in bundle.spec.signatures.items():
        expected = flat([tensors[f"{name}.{t.name}"] for t in signature.outputs])
        distances = []
        for how in (nullcontext(), Fp32Products()):
            with how:
                distances.append(relative_l2(expected, flat(run_network(eager, name, signature, tensors))))
        assert distances[1] == pytest.approx(distances[0], rel=0.25), name
        assert distances[1] > 1e-4  # 16 bits were computed in


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_are_rounded_once(mode, dtype):
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*shape, generator=g).to(dtype) for shape in ((2, 8, 6, 6), (4, 8, 3, 3)))
    with mode(), Fp32Products():
        conv = torch.nn.functional.conv2d(x, w)
        attention = torch.nn.functional.scaled_dot_product_attention(x, x, x)
        product, total = x @ x, x + x
    wide = x.float()
    assert conv.dtype == attention.dtype == product.dtype == total.dtype == dtype
    assert torch.equal(conv, torch.nn.functional.conv2d(wide, w.float()).to(dtype))
    assert torch.equal(attention, torch.nn.functional.scaled_dot_product_attention(wide, wide, wide).to(dtype))
    assert torch.equal(product, (wide @ wide).to(dtype))
    assert torch.equal(total, x + x)


def test_fp16_overflows_as_it_would():
    x = torch.full((1, 64), 300.0, dtype=torch.float16)
    with torch.inference_mode(), Fp32Products():
        assert torch.isinf(x @ x.T).all()


@pytest.mark.parametrize(
    ("dtype", "isa", "emulated"),
    [
        ("bf16", ("avx2",), True),
        ("bf16", ("avx2", "avx512f"), False),
        ("bf16", ("asimd", "bf16"), False),
        ("fp16", ("avx2", "avx512f"), True),
        ("fp16", ("avx2", "avx512f", "avx512_fp16"), False),
        ("fp32", ("avx2",), False),
    ],
)
def test_a_cpu_with_the_instructions_uses_them(dtype, isa, emulated):
    assert isinstance(fast_products(dtype, Cpu("Some CPU", 2, isa, None, None)), Fp32Products) is emulated
