"""Networks in half precision keep what must not be rounded in fp32."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from fastgen.models.folder import load_model  # noqa: E402
from fastgen.models.precision import in_precision  # noqa: E402
from fastgen.models.signatures import network_dtype  # noqa: E402


def outputs(module, signature, dtype=None):
    inputs = signature.sample_inputs(4, np.random.default_rng(0))
    if "timestep" in inputs:
        inputs["timestep"] = np.array([0, 1, 998, 999], np.float32)
    tensors = [torch.from_numpy(v) for v in inputs.values()]
    with torch.inference_mode():
        if dtype is not None:  # as plain `.to(dtype)` would compute it
            tensors = [t.to(dtype) if t.is_floating_point() and t.ndim > 1 else t for t in tensors]
        found = module(*tensors)
    return found[0] if isinstance(found, tuple) else found


def distance(found, expected):
    return float((found.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["text", "labels"])
def test_a_lowered_network_is_at_least_as_close_as_plain_casting(text_model, label_model, kind, dtype):
    model = load_model(text_model if kind == "text" else label_model)
    for name, module in model.networks().items():
        signature = model.spec.signatures[name]
        expected = outputs(module, signature)
        ours = outputs(in_precision(module, dtype), signature)
        torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
        plain = outputs(load_model(model.folder).networks()[name].to(torch_dtype), signature, torch_dtype)
        assert ours.dtype == torch.float32
        assert 0 < distance(ours, expected) <= 1.1 * distance(plain, expected) + 1e-6, name


def test_the_original_is_untouched_and_fp32_is_the_module_itself(label_model):
    module = load_model(label_model).networks()["unet"]
    before = {k: v.clone() for k, v in module.state_dict().items()}
    in_precision(module, "fp16")
    assert all(torch.equal(v, before[k]) and v.dtype == torch.float32 for k, v in module.state_dict().items())
    assert in_precision(module, "fp32") is module


def test_large_activations_do_not_overflow_in_normalisations():
    norm = torch.nn.Sequential(torch.nn.GroupNorm(2, 8))
    x = torch.full((2, 8, 4, 4), 6e4) * torch.linspace(-1, 1, 16).reshape(4, 4)
    assert torch.isfinite(in_precision(norm, "fp16")(x)).all()


def test_neighbouring_timesteps_stay_apart_in_bf16(label_model):
    module = in_precision(load_model(label_model).networks()["unet"], "bf16")
    x, labels = torch.randn(1, 3, 16, 16).expand(2, -1, -1, -1), torch.zeros(2, 24)
    with torch.inference_mode():
        two = module(x, torch.tensor([999.0, 1000.0]), labels)
    assert not torch.equal(two[0], two[1])


def test_the_text_encoder_stays_fp32():
    assert network_dtype("text_encoder", "fp16") == "fp32"
    assert network_dtype("unet", "fp16") == "fp16"
