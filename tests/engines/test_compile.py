"""Engine `compile`: what the reference computes, compiled once, loaded ever after."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from fastgen.engines import create_engine, machine
from fastgen.engines.cache import artifacts
from fastgen.errors import FastgenError, InputError
from fastgen.generate.pipeline import load

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from fastgen.engines.compile import package as compile_package  # noqa: E402
from fastgen.models.folder import load_model  # noqa: E402

NO_COMPILER = "/nowhere/g++"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of compiled engines."""
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def open_engine(folder, dtype="fp32", device="cpu"):
    return create_engine("compile", load_model(folder), device=device, dtype=dtype)


def inputs(engine, network, rows, seed=0):
    values = engine.signatures[network].sample_inputs(rows, np.random.default_rng(seed))
    if "timestep" in values:
        values["timestep"] = np.linspace(0, 999, rows).round().astype(np.float32)
    return [engine.array(x) for x in values.values()]


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def assert_certified(engine, folder, network, rows):
    """The certificate's tolerances of single networks, against eager fp32 and, for bf16 and fp16, eager in that precision."""
    values = inputs(engine, network, rows)
    source = load_model(folder)
    expected = create_engine("eager", source, device=engine.device, dtype="fp32").run(network, *values)
    found = engine.run(network, *values)
    assert [y.dtype for y in found] == [torch.float32] * len(found)
    executed = engine.executed(network)
    if executed == "fp32":
        for y, reference in zip(found, expected, strict=True):
            absolute = 3e-4 if network.startswith("vae") else 1e-4
            torch.testing.assert_close(y, reference, atol=absolute, rtol=1e-2)
        return
    flat, reference = (torch.cat([y.flatten() for y in ys]) for ys in (found, expected))
    eager = create_engine("eager", source, device=engine.device, dtype=executed).run(network, *values)
    own = relative(torch.cat([y.flatten() for y in eager]), reference)
    cosine, times = (0.9999, 1.5) if executed == "fp16" else (0.999, 3)
    assert torch.nn.functional.cosine_similarity(flat, reference, dim=0) >= cosine
    assert 0 < relative(flat, reference) <= times * own


@pytest.fixture(scope="module")
def compiled(label_model, tmp_path_factory) -> Path:
    """A cache with the package of one network: "unet" of `label_model` at 2 rows in fp32."""
    folder = tmp_path_factory.mktemp("compiled")
    with mock.patch.dict(os.environ, {"FASTGEN_CACHE": str(folder)}):
        engine = open_engine(label_model)
        engine.run("unet", *inputs(engine, "unet", 2))
    return folder


@pytest.mark.slow
def test_a_package_computes_what_eager_computes_and_is_compiled_once(label_model, compiled, capfd, monkeypatch):
    monkeypatch.setenv("FASTGEN_CACHE", str(compiled))
    engine = open_engine(label_model)
    assert_certified(engine, label_model, "unet", 2)
    values = inputs(engine, "unet", 2, seed=1)
    (first,) = engine.run("unet", *values)
    kept = first.clone()
    engine.run("unet", *inputs(engine, "unet", 2, seed=2))
    assert torch.equal(first, kept), "a result was overwritten by the next call"
    again = open_engine(label_model)
    capfd.readouterr()
    with torch._inductor.config.patch({"cpp.cxx": (NO_COMPILER,)}):
        (found,) = again.run("unet", *values)
    assert torch.equal(found, first)
    assert capfd.readouterr().err == ""
    strided = torch.stack([values[0], values[0]], dim=-1)[..., 0]  # the same numbers, not contiguous
    assert torch.equal(again.run("unet", strided, *values[1:])[0], first)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "network", "rows", "dtype"),
    [
        ("labels", "unet", 3, "bf16"),
        ("text", "unet", 4, "bf16"),
        ("text", "vae_decoder", 1, "bf16"),
    ],
)
def test_every_compiled_network_is_within_the_certificates_tolerance(request, kind, network, rows, dtype):
    if dtype not in compile_package.cpu_dtypes():
        pytest.skip(f"this CPU has no {dtype}")
    folder = request.getfixturevalue("text_model" if kind == "text" else "label_model")
    assert_certified(open_engine(folder, dtype), folder, network, rows)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_networks_that_are_not_worth_compiling_run_as_they_are(text_model, dtype, cache):
    if dtype not in compile_package.cpu_dtypes():
        pytest.skip(f"this CPU has no {dtype}")
    engine = open_engine(text_model, dtype)
    for network in ("text_encoder", "vae_encoder"):
        assert engine.recipe(network, 2) is None
        for rows in (1, 3):
            assert_certified(engine, text_model, network, rows)
    assert not artifacts.artifacts()


@pytest.mark.slow
def test_a_second_process_generates_the_same_bytes_without_compiling(
    label_model, requests_files, command, tmp_path, cache
):
    def run(out, **environment):
        options = ("--model", label_model, "--device", "cpu", "--num-inference-steps", 2, "--out", out)
        line, variables = command("generate", requests_files["labels"], "--engine", "compile", *options)
        done = subprocess.run(line, env=variables | environment, capture_output=True, text=True, timeout=290)
        assert done.returncode == 0, done.stderr
        return done.stderr, {f.name: f.read_bytes() for f in sorted(out.glob("*.png"))}

    said, first = run(tmp_path / "one")
    assert "building compile: unet, batch 8" in said
    said, second = run(tmp_path / "two", CXX=NO_COMPILER)
    assert "building" not in said
    assert len(first) == 5  # four images and the contact sheet
    assert first == second


@pytest.mark.slow
def test_a_damaged_package_is_built_again_and_that_is_announced(label_model, compiled, cache, capfd):
    shutil.copytree(compiled, cache)
    values = inputs(open_engine(label_model), "unet", 2)
    (expected,) = open_engine(label_model).run("unet", *values)
    (artifact,) = artifacts.artifacts("compile")
    package = artifact.folder / compile_package.PACKAGE
    data = bytearray(package.read_bytes())
    data[len(data) // 2] ^= 1
    package.write_bytes(data)
    capfd.readouterr()
    (found,) = open_engine(label_model).run("unet", *values)
    assert torch.equal(found, expected)
    said = capfd.readouterr().err
    assert "altered or damaged" in said
    assert "building it again" in said
    assert "built compile: unet, batch 2, fp32 in" in said


@pytest.mark.slow
def test_a_package_without_weights_uses_those_of_the_module_in_place(label_model, cache, monkeypatch):
    """What is done on a GPU, here on the CPU."""
    monkeypatch.setattr(compile_package, "options", lambda on_gpu: {"aot_inductor.package_constants_in_so": False})
    engine = open_engine(label_model)
    assert_certified(engine, label_model, "unet", 2)
    values = inputs(engine, "unet", 2)
    (before,) = engine.run("unet", *values)
    package = engine._packages["unet", 2]
    weight = engine._module("unet").unet.conv_out.weight
    assert package.weights["unet.conv_out.weight"].data_ptr() == weight.data_ptr()
    with torch.no_grad():
        weight.mul_(2)
    (after,) = engine.run("unet", *values)
    bias = engine._module("unet").unet.conv_out.bias[:, None, None]
    torch.testing.assert_close(after - bias, 2 * (before - bias), atol=1e-4, rtol=1e-4)


def test_other_weights_rows_precisions_and_threads_have_other_addresses(label_model, tmp_path):
    from safetensors.torch import load_file, save_file

    engine = open_engine(label_model)
    other = tmp_path / "other"
    shutil.copytree(label_model, other)
    file = other / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_out.bias"] += 1
    save_file(weights, file, metadata={"format": "pt"})
    recipes = [engine.recipe("unet", 2), engine.recipe("unet", 4), open_engine(other).recipe("unet", 2)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        recipes.append(engine.recipe("unet", 2))
    finally:
        torch.set_num_threads(threads)
    assert len({recipe.digest for recipe in recipes}) == len(recipes)
    assert open_engine(label_model).recipe("unet", 2) == recipes[0]
    (difference,) = artifacts.differences(recipes[2], recipes[0])
    assert difference.field == "weights_sha256"


def test_without_a_cpp_compiler_there_is_one_line_and_no_artifact(label_model, cache):
    engine = open_engine(label_model)
    with (
        torch._inductor.config.patch({"cpp.cxx": (NO_COMPILER,)}),
        pytest.raises(InputError, match=r"^engine compile needs a C\+\+ compiler, .*apt-get install g\+\+.*$"),
    ):
        engine.run("unet", *inputs(engine, "unet", 5))
    assert not artifacts.artifacts("compile")


def test_a_gpu_needs_triton_and_cudas_headers(monkeypatch):
    from torch.utils import _triton, cpp_extension

    monkeypatch.setattr(_triton, "has_triton", lambda: False)
    with pytest.raises(InputError, match="pip install triton"):
        compile_package.check_tools(on_gpu=True)
    monkeypatch.setattr(_triton, "has_triton", lambda: True)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    with pytest.raises(InputError, match="set CUDA_HOME"):
        compile_package.check_tools(on_gpu=True)


def test_what_torch_cannot_compile_is_one_line(label_model, cache, monkeypatch):
    def refuse(*arguments, **options):
        raise RuntimeError("inductor gave up\nand a page of explanations")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", refuse)
    engine = open_engine(label_model)
    with pytest.raises(FastgenError, match=r"^engine compile: unet at 5 rows cannot be compiled: .*gave up$"):
        engine.run("unet", *inputs(engine, "unet", 5))
    assert not artifacts.artifacts("compile")
    assert not list(artifacts.leftovers())


def test_memory_that_is_exhausted_inside_a_package_is_recognised(label_model, monkeypatch):
    """torch reports any failure in there with the same words; only the allocator knows."""

    class Failing:
        def run(self, inputs):
            failures.append(1)
            raise RuntimeError(
                "run_func_( container_handle_, ...) API call failed at model_container_runner.cpp, line 145"
            )

    failures: list[int] = []
    engine = open_engine(label_model)
    monkeypatch.setattr(engine, "_load", lambda network, rows: Failing())
    with pytest.raises(FastgenError, match=r"^engine compile: unet at 2 rows failed: RuntimeError: run_func_"):
        engine.run("unet", *inputs(engine, "unet", 2))
    monkeypatch.setattr(engine, "_allocations_failed", lambda: len(failures) - 1)
    with pytest.raises(torch.OutOfMemoryError) as error:
        engine.run("unet", *inputs(engine, "unet", 2))
    assert engine.is_out_of_memory(error.value)
    monkeypatch.setattr(engine, "_allocations_failed", lambda: 7)  # somebody else's, before
    with pytest.raises(FastgenError, match="run_func_"):
        engine.run("unet", *inputs(engine, "unet", 2))


def test_an_engine_on_a_gpu_gives_the_memory_of_its_weights_back_when_it_goes(label_model, monkeypatch):
    """Packages of torch 2.13 never let go of weights that they have used; the model's own are not the engine's to free."""
    engine = open_engine(label_model)
    monkeypatch.setattr(engine, "capturable", True)
    module, own = engine._module("unet"), engine._networks["unet"]
    held = [parameter.detach() for parameter in module.parameters()]
    assert module is not own
    assert all(one.untyped_storage().size() for one in held)
    monkeypatch.undo()
    del module, engine
    gc.collect()
    assert not any(one.untyped_storage().size() for one in held)
    assert all(parameter.untyped_storage().size() for parameter in own.parameters())


def test_constants_stay_on_the_kind_of_device_that_they_were_compiled_for(tmp_path):
    from safetensors.torch import save_file

    file = tmp_path / compile_package.CONSTANTS
    save_file({"a": torch.ones(2), "b": torch.zeros(1)}, file, metadata={"a": "cpu", "b": "cuda"})
    found = compile_package._constants(file, torch.device("meta"))
    assert {name: value.device.type for name, value in found.items()} == {"a": "cpu", "b": "meta"}
    assert compile_package._constants(tmp_path / "none", torch.device("cpu")) == {}


def test_measuring_memory_compiles_nothing(label_model, cache):
    open_engine(label_model).probe("unet", 2)
    assert not artifacts.artifacts("compile")


@pytest.mark.parametrize("version", ["2.6.0+cu124", "2.7.1"])
def test_an_old_torch_is_refused(version):
    with pytest.raises(
        InputError, match=rf"needs torch 2\.8 or newer, found {version.replace('+', '.')}: pip install -U"
    ):
        compile_package.check_torch(version)
    compile_package.check_torch("2.8.0")
    compile_package.check_torch("2.13.0+cpu")


@pytest.mark.parametrize(
    ("isa", "default", "refused"),
    [
        (("avx2",), "fp32", "bf16"),
        (("avx2", "avx512_bf16"), "bf16", "fp16"),
        (("amx_bf16", "avx512_fp16"), "bf16", None),
    ],
)
def test_the_default_precision_is_what_the_cpu_multiplies(label_model, monkeypatch, isa, default, refused):
    monkeypatch.setattr(machine, "cpu", lambda: machine.Cpu("some CPU", 2, isa, None, None))
    assert open_engine(label_model, None).dtype == default
    if refused:
        with pytest.raises(InputError, match=f"this CPU has no {refused}; it has "):
            open_engine(label_model, refused)


def test_the_pipeline_runs_it(label_model, cache, monkeypatch):
    """With the module in place of a package: no compiling."""
    seen = []

    def module(engine, network, rows):
        seen.append((network, rows))
        run = lambda values: engine._run_module(network, values)  # noqa: E731
        return type("Package", (), {"run": staticmethod(run)})

    pipeline = load(label_model, "compile", device="cpu", dtype="fp32")
    monkeypatch.setattr(type(pipeline.engine), "_load", module)
    options: dict[str, Any] = {"labels": [["gray cube"], ["red cube"]], "seeds": [1, 2]}
    found = np.stack([np.asarray(x) for x in pipeline.generate(**options)]).astype(int)
    expected = np.stack([np.asarray(x) for x in load(label_model, "eager", device="cpu").generate(**options)]).astype(
        int
    )
    assert np.abs(found - expected).max() <= 1
    assert set(seen) == {("unet", 4)}


@pytest.mark.gpu("compilers")
class TestOnAGpu:
    @pytest.fixture(params=["fp32", "fp16", "bf16"])
    def engine(self, request, label_model):
        if request.param == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            pytest.skip("this GPU has no bf16")
        torch.backends.cudnn.allow_tf32 = False
        yield open_engine(label_model, request.param, "cuda")
        torch.backends.cudnn.allow_tf32 = True

    @pytest.mark.parametrize("rows", [2, 4])
    def test_it_computes_what_eager_computes(self, engine, label_model, rows):
        assert_certified(engine, label_model, "unet", rows)

    def test_a_text_model_computes_what_eager_computes(self, text_model):
        engine = open_engine(text_model, "fp16", "cuda")
        for network in ("text_encoder", "unet", "vae_decoder", "vae_encoder"):
            assert_certified(engine, text_model, network, 2)

    def test_fp16_is_the_default(self, label_model):
        assert open_engine(label_model, None, "cuda").dtype == "fp16"

    def test_run_waits_for_nothing(self, engine):
        values = inputs(engine, "unet", 2)
        engine.run("unet", *values)  # loads the package
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            engine.run("unet", *values)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_a_recorded_run_replays_with_new_inputs_and_equals_a_call(self, engine):
        assert engine.capturable
        values = inputs(engine, "unet", 2)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            engine.run("unet", *values)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            (recorded,) = engine.run("unet", *values)
        for factor in (0.5, -1.0):
            values[0].mul_(factor)
            expected = engine.run("unet", *values)[0].clone()
            graph.replay()
            torch.cuda.synchronize()
            torch.testing.assert_close(recorded, expected, atol=0, rtol=0)

    def test_packages_hold_no_weights(self, engine):
        engine.run("unet", *inputs(engine, "unet", 2))
        package = engine._packages["unet", 2]
        held = {tensor.data_ptr() for tensor in compile_package.named_weights(engine._module("unet")).values()}
        assert {tensor.data_ptr() for tensor in package.weights.values()} <= held
