"""A network that is said to run in fp32 does: torch may not round its products, whatever the process has set."""

from __future__ import annotations

import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from fastgen.engines.fp32 import exact_fp32  # noqa: E402
from fastgen.generate.pipeline import load  # noqa: E402
from fastgen.models.folder import load_model  # noqa: E402

EXACT = {"cudnn": False, "precision": "highest", "matmul": False}


def settings():
    """What torch computes fp32 in."""
    backends = torch.backends
    found = {
        "cudnn": backends.cudnn.allow_tf32,
        "precision": torch.get_float32_matmul_precision(),
        "matmul": backends.cuda.matmul.allow_tf32,
    }
    if hasattr(backends.cudnn, "conv"):
        found["newer"] = [
            part.fp32_precision
            for part in (
                backends.cudnn.conv,
                backends.cuda.matmul,
                backends.mkldnn.matmul,
                backends.mkldnn.conv,
                backends.cudnn,
                backends.mkldnn,
            )
        ]
    return found


@pytest.fixture(params=["highest", "high", "medium"])
def setting(request):
    """A process that lets torch round matrix products, or, as it is by default, convolutions alone."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield settings()
    torch.set_float32_matmul_precision(before)


def is_exact(found):
    return {k: found[k] for k in EXACT} == EXACT and set(found.get("newer", ["ieee"])) == {"ieee"}


def seen_by(module):
    """The settings at each call of a module."""
    seen = []
    module.register_forward_pre_hook(lambda *_: seen.append(settings()))
    return seen


def inputs(pipeline, network):
    signature = pipeline.spec.signatures[network]
    return [torch.from_numpy(x) for x in signature.sample_inputs(2, np.random.default_rng(0)).values()]


def test_tf32_is_on_by_default_so_that_these_tests_can_fail():
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("network", ["text_encoder", "unet", "vae_decoder", "vae_encoder"])
def test_eager_runs_every_network_in_fp32_and_leaves_the_process_as_it_was(text_model, setting, network):
    pipeline = load(text_model, "eager")
    seen = seen_by(pipeline.engine._module(network))
    pipeline.engine.run(network, *inputs(pipeline, network))
    assert [is_exact(found) for found in seen] == [True]
    assert settings() == setting


def test_in_bf16_the_process_decides(label_model, setting):
    pipeline = load(label_model, "eager", dtype="bf16")
    seen = seen_by(pipeline.engine._module("unet"))
    pipeline.engine.run("unet", *inputs(pipeline, "unet"))
    assert seen == [setting]


@pytest.mark.parametrize("network", ["unet", "text_encoder", "vae_encoder"])
def test_compile_runs_and_compiles_in_fp32(text_model, setting, network, monkeypatch, tmp_path):
    from fastgen.engines.compile import package as compile_package

    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path))
    engine = load(text_model, "compile", device="cpu", dtype="fp32").engine
    built = []
    monkeypatch.setattr(compile_package, "check_tools", lambda on_gpu: None)
    monkeypatch.setattr(compile_package, "build", lambda *a: built.append(settings()))
    ran = []
    package = type("Package", (), {"run": staticmethod(lambda values: ran.append(settings()) or tuple(values[:1]))})
    monkeypatch.setattr(compile_package, "open_package", lambda *a: package)
    module = seen_by(engine._module(network))
    engine.run(network, *inputs(load(text_model, "eager"), network))
    seen = [*built, *ran, *module]
    assert len(seen) == (2 if network == "unet" else 1)
    assert all(is_exact(found) for found in seen)
    assert settings() == setting


@pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="this CPU does not round to bf16",
)
def test_the_numbers_are_those_of_fp32(text_model):
    torch.manual_seed(0)
    x, w = torch.randn(256, 256), torch.randn(256, 256)
    pipeline = load(text_model, "eager")
    expected = pipeline.engine.run("text_encoder", *inputs(pipeline, "text_encoder"))[0]
    product = x @ w
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        if torch.equal(x @ w, product):
            pytest.skip("this torch does not round to bf16 here")
        with exact_fp32():
            assert torch.equal(x @ w, product)
        assert torch.equal(pipeline.engine.run("text_encoder", *inputs(pipeline, "text_encoder"))[0], expected)
    finally:
        torch.set_float32_matmul_precision(before)


def test_an_error_inside_puts_the_settings_back(setting):
    with pytest.raises(ValueError, match="inside"), exact_fp32():
        raise ValueError("inside")
    assert settings() == setting


def test_nested_and_in_several_threads_the_last_one_out_puts_them_back(setting):
    inside, go_on, seen = threading.Event(), threading.Event(), []

    def other():
        with exact_fp32():
            inside.set()
            go_on.wait(10)
            seen.append(settings())

    with exact_fp32():
        with exact_fp32():
            pass
        assert is_exact(settings())
        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(10)
    go_on.set()
    thread.join()
    assert [is_exact(found) for found in seen] == [True]
    assert settings() == setting


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="torch 2.9 and newer")
def test_the_newer_settings_that_a_user_has_made_are_put_back():
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    conv.fp32_precision = "ieee"  # the older setting can no longer be read
    try:
        with pytest.raises(RuntimeError, match="mix"):
            _ = torch.backends.cudnn.allow_tf32
        with exact_fp32():
            assert conv.fp32_precision == torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert (conv.fp32_precision, torch.backends.cudnn.rnn.fp32_precision) == ("ieee", before)
    finally:
        conv.fp32_precision = before
    assert torch.backends.cudnn.allow_tf32


def test_a_certificate_s_reference_is_in_fp32(label_model, tmp_path, setting):
    from export.reference import read_reference, write_reference

    write_reference(load_model(label_model), tmp_path / "now.safetensors")
    torch.set_float32_matmul_precision("highest")
    write_reference(load_model(label_model), tmp_path / "exact.safetensors")
    now, exact = (read_reference(tmp_path / f"{name}.safetensors") for name in ("now", "exact"))
    assert all(np.array_equal(now[name], exact[name]) for name in exact)
