"""Every engine computes what the reference computes, and says what it cannot do."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from wrong_inputs import refuses_wrong_inputs

from fastgen.engines import create_engine, engine_class, engine_names, missing_packages
from fastgen.engines.base import announce_slow
from fastgen.engines.machine import Cpu
from fastgen.errors import InputError
from fastgen.generate.pipeline import load
from fastgen.models.bundle import read_bundle
from fastgen.sampling.noise import normal

torch = pytest.importorskip("torch")

PROMPTS = ["A red dragon with wings.", "A small blue slime.", "A red dragon with wings."]
LABELS = [["gray cube"], ["red cube", "blue sphere"], ["green cylinder"]]
SEEDS = [0, 1, 2**63 - 1]


def cpu_has_bf16() -> bool:
    pytest.importorskip("openvino")
    from fastgen.engines.openvino.engine import shared_core

    return "BF16" in shared_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def generate(path, engine, **options):
    pipeline = load(path, engine, dtype="fp32")
    conditions = {"prompts": PROMPTS} if pipeline.spec.condition.kind == "text" else {"labels": LABELS}
    images = pipeline.generate(**conditions, seeds=SEEDS, **options)
    return np.stack([np.asarray(image) for image in images]).astype(int)


def unet_inputs(pipeline, batch, seed=0):
    signature = pipeline.spec.signatures["unet"]
    inputs = signature.sample_inputs(batch, np.random.default_rng(seed))
    inputs["timestep"] = np.linspace(0, 999, batch).round().astype(np.float32)
    return list(inputs.values())


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("scheduler", ["ddim", "pndm", "dpmpp-2m", "euler"])
def test_a_guided_run_equals_diffusers_own_pipeline(text_model, scheduler):
    from diffusers import StableDiffusionPipeline

    from fastgen.sampling.schedulers import make_scheduler

    ours = load(text_model)
    settings = ours.settings(scheduler=scheduler, num_inference_steps=6, guidance_scale=4.0)
    from fastgen.generate.requests import Request
    from fastgen.generate.run import Run

    requests = [
        Request(str(i), f"{i}.png", prompt=p, seed=s) for i, (p, s) in enumerate(zip(PROMPTS, SEEDS, strict=True))
    ]
    run = Run(ours, requests, settings)
    images = np.concatenate([run.images(batch) for batch in run.batches(len(requests))])

    theirs = StableDiffusionPipeline.from_pretrained(text_model, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = make_scheduler(scheduler, ours.spec.scheduler_config)
    latents = torch.from_numpy(normal(SEEDS, 0, ours.spec.space.shape))
    expected = theirs(PROMPTS, num_inference_steps=6, guidance_scale=4.0, latents=latents, output_type="pt").images
    assert images.std() > 0.05
    assert np.abs((images / 2 + 0.5).clip(0, 1) - expected.numpy()).max() <= 1e-4


@pytest.mark.parametrize("kind", ["text", "labels"])
@pytest.mark.parametrize("engine", ["ort", "openvino"])
def test_engines_generate_what_eager_generates(request, kind, engine):
    pytest.importorskip("onnxruntime" if engine == "ort" else engine)
    names = ("text_model", "text_bundle") if kind == "text" else ("label_model", "label_bundle")
    model, bundle = map(request.getfixturevalue, names)
    expected, found = generate(model, "eager"), generate(bundle, engine)
    assert expected.std() > 10
    assert np.abs(expected[0] - expected[1]).max() > 20  # different seeds and conditions give different pictures
    assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize("engine", ["ort", "openvino"])
@pytest.mark.parametrize("kind", ["text", "labels"])
def test_every_batch_size_runs_and_gives_the_rows_that_it_gives_alone(request, kind, engine):
    bundle = request.getfixturevalue("text_bundle" if kind == "text" else "label_bundle")
    pipeline = load(bundle, engine, dtype="fp32")
    inputs = unet_inputs(pipeline, 5)
    alone = np.concatenate([pipeline.engine.run("unet", *(x[i : i + 1] for x in inputs))[0] for i in range(5)])
    for batch in (1, 3, 5):
        (found,) = pipeline.engine.run("unet", *(x[:batch] for x in inputs))
        assert np.abs(found - alone[:batch]).max() < 1e-5


@pytest.mark.parametrize("engine", ["ort", "openvino"])
def test_a_result_is_not_overwritten_by_the_next_call(label_bundle, engine):
    pipeline = load(label_bundle, engine, dtype="fp32")
    (first,) = pipeline.engine.run("unet", *unet_inputs(pipeline, 2, seed=0))
    kept = first.copy()
    pipeline.engine.run("unet", *unet_inputs(pipeline, 2, seed=1))
    assert np.array_equal(first, kept)


@pytest.mark.parametrize("name", ["eager", "compile", "ort", "openvino"])
def test_a_wrong_tensor_is_refused_before_anything_runs(label_model, label_bundle, name):
    refuses_wrong_inputs(load(label_model if name in ("eager", "compile") else label_bundle, name, dtype="fp32").engine)


@pytest.mark.parametrize("kind", ["text", "labels"])
def test_eager_in_bf16_is_the_network_in_bf16_at_the_exact_timestep(request, kind):
    """bf16 has 8 significant bits: 999 would become 1000. diffusers keeps the timestep out of it, so do we."""
    model = request.getfixturevalue("text_model" if kind == "text" else "label_model")
    pipeline: Any = load(model, "eager", dtype="bf16")
    inputs = [torch.from_numpy(x) for x in unet_inputs(pipeline, 4)]
    module = pipeline.source.networks()["unet"].to(torch.bfloat16)
    with torch.inference_mode():
        expected = module(inputs[0].bfloat16(), inputs[1].long(), inputs[2].bfloat16()).float().numpy()
    (found,) = pipeline.engine.run("unet", *inputs)
    assert np.array_equal(found.numpy(), expected)


@pytest.mark.parametrize("kind", ["text", "labels"])
def test_openvino_in_bf16_is_about_as_near_to_fp32_as_eager_in_bf16(request, kind):
    if not cpu_has_bf16():
        pytest.skip("this CPU has no bf16")
    names = ("text_model", "text_bundle") if kind == "text" else ("label_model", "label_bundle")
    model, bundle = map(request.getfixturevalue, names)
    reference, eager = load(model, "eager", dtype="fp32"), load(model, "eager", dtype="bf16")
    inputs = unet_inputs(reference, 16)
    tensors = [torch.from_numpy(x) for x in inputs]
    expected = reference.engine.run("unet", *tensors)[0].numpy()
    eagers = relative(eager.engine.run("unet", *tensors)[0].numpy(), expected)
    (found,) = load(bundle, "openvino", dtype="bf16").engine.run("unet", *inputs)
    assert relative(found, expected) <= 1.5 * eagers


def test_engines_are_found_by_folder():
    assert {"eager", "ort", "openvino"} <= set(engine_names())
    for name in engine_names():
        cls = engine_class(name)
        assert cls.name == name
        assert cls.source_kind in ("model", "bundle")
        assert cls.install.startswith("pip install ")


def test_an_unknown_engine_gets_the_nearest_name_and_all_choices():
    with pytest.raises(
        InputError, match=r"unknown engine 'openvno'; did you mean 'openvino'\? \(choices: .*eager.*ort"
    ):
        engine_class("openvno")


@pytest.mark.parametrize(
    ("engine", "package"), [("ort", "onnxruntime"), ("openvino", "openvino"), ("eager", "diffusers")]
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    text_bundle, text_model, monkeypatch, engine, package
):
    monkeypatch.setitem(sys.modules, package, None)
    assert missing_packages(engine) == [package]
    folder = text_model if engine == "eager" else text_bundle
    with pytest.raises(InputError, match=rf"engine {engine} needs {package}, not installed here: pip install"):
        load(folder, engine)


def test_without_any_engine_for_bundles_the_install_command_is_named(text_bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match="no engine for bundles is installed: pip install"):
        load(text_bundle)


def test_the_default_engine_is_the_first_installed(label_bundle, label_model, monkeypatch):
    assert load(label_model).engine.name == "eager"
    assert load(label_bundle).engine.name == "openvino"
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert load(label_bundle).engine.name == "ort"


@pytest.mark.parametrize(
    ("engine", "options", "words"),
    [
        ("ort", {"dtype": "bf16"}, "engine ort executes fp32 and int8 on cpu, not bf16"),
        ("ort", {"dtype": "fp8"}, "not fp8"),
        ("ort", {"device": "cuda"}, "this onnxruntime is built for the CPU alone"),
        ("ort", {"device": "gpu"}, "engine ort runs on cpu, cuda, cuda:N"),
        ("openvino", {"device": "cuda:0"}, "engine openvino runs on cpu, not cuda:0"),
        ("openvino", {"dtype": "fp8"}, "executes bf16, fp32, fp16, int8, not fp8"),
        ("ort", {"threads": 0}, "threads is 0, expected at least 1"),
        ("openvino", {"threads": -2}, "threads is -2, expected at least 1"),
        ("eager", {"device": "gpu"}, "device 'gpu': engine eager runs on cpu, cuda, cuda:N"),
        ("eager", {"device": "cuda:x"}, "cuda:N"),
        ("eager", {"device": "cuda:9999"}, "CUDA GPU"),
        ("eager", {"dtype": "fp64"}, "executes fp32, bf16, fp16, not fp64"),
    ],
)
def test_what_an_engine_cannot_do_is_said_in_one_line(label_bundle, label_model, engine, options, words):
    with pytest.raises(InputError) as error:
        load(label_model if engine == "eager" else label_bundle, engine, **options)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_on_a_machine_without_a_gpu_is_refused(label_model):
    with pytest.raises(InputError, match="sees no CUDA GPU here"):
        load(label_model, "eager", device="cuda")


def test_engines_refuse_the_wrong_kind_of_folder(label_bundle, label_model, tmp_path):
    with pytest.raises(InputError, match=r"engine ort runs bundles; `fastgen export"):
        load(label_model, "ort")
    with pytest.raises(InputError, match=r"engine eager runs model folders; .* is a bundle"):
        load(label_bundle, "eager")
    with pytest.raises(InputError, match=r"neither a bundle .* nor a model folder"):
        load(tmp_path)


@pytest.mark.parametrize(
    "words", ["DefaultCPUAllocator: can't allocate memory: you tried to allocate", "not enough memory: you tried to"]
)
def test_a_cpu_s_memory_that_is_exhausted_is_told_apart_from_other_errors(label_model, words):
    engine = load(label_model, "eager").engine
    assert engine.is_out_of_memory(RuntimeError(f"[enforce fail at alloc_cpu.cpp:127] . {words} 8 bytes."))
    assert not engine.is_out_of_memory(RuntimeError("a bug"))
    assert not engine.is_out_of_memory(KeyError("out of memory"))


def test_threads_are_passed_on(label_bundle):
    bundle = read_bundle(label_bundle)
    for name in ("ort", "openvino"):
        engine = create_engine(name, bundle, threads=1, dtype="fp32")
        inputs = list(bundle.spec.signatures["unet"].sample_inputs(2, np.random.default_rng(0)).values())
        assert np.isfinite(engine.run("unet", *inputs)[0]).all()


def test_arrays_are_pinned_on_the_engine_s_own_gpu(label_model, monkeypatch):
    """On another one, pinning would make a CUDA context there."""
    from contextlib import contextmanager

    current, pinned = ["cuda:0"], []

    @contextmanager
    def device(name):
        current.append(name)
        yield
        current.pop()

    engine = load(label_model, "eager").engine
    monkeypatch.setattr(engine, "device", "cuda:1")
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(current[-1]) or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, place, non_blocking: (self, place, non_blocking))
    _, place, non_blocking = engine.array(np.zeros(3, np.float32))
    assert (pinned, place, non_blocking) == (["cuda:1"], "cuda:1", True)
    assert current == ["cuda:0"]


def test_a_network_that_threads_ask_for_at_once_is_moved_once(label_model):
    """Half of it moved already, the other thread would run it."""
    import threading
    import time

    engine = load(label_model, "eager", dtype="bf16").engine
    module, moves = engine._networks["unet"], []
    move = module.to

    def slowly(*arguments):
        moves.append(arguments)
        time.sleep(0.2)
        return move(*arguments)

    module.to = slowly
    inputs = [
        torch.from_numpy(x) for x in engine.signatures["unet"].sample_inputs(2, np.random.default_rng(0)).values()
    ]
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(engine.run("unet", *inputs)[0])) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(moves) == 1
    assert len(found) == 3
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize(
    ("isa", "dtype", "said"),
    [
        (("avx2",), "bf16", "Some CPU has no instructions for bf16"),
        (("avx2",), "fp16", "Some CPU has no instructions for fp16"),
        (("avx2", "avx512f"), "bf16", ""),
        (("avx2",), "fp32", ""),
        ((), "bf16", ""),  # nothing is known
    ],
)
def test_a_precision_that_the_cpu_has_no_instructions_for_is_said(label_model, capfd, monkeypatch, isa, dtype, said):
    monkeypatch.setattr("fastgen.engines.machine.cpu", lambda: Cpu("Some CPU", 2, isa, None, None))
    from fastgen.models.folder import load_model

    create_engine("eager", load_model(label_model), device="cpu", dtype=dtype)
    err = capfd.readouterr().err
    assert said in err if said else "no instructions" not in err


@pytest.mark.parametrize(("isa", "said"), [(("avx2",), True), (("avx2", "avx512_vnni"), False), (("i8mm",), False)])
def test_int8_that_the_cpu_has_no_instructions_for_is_said(capfd, isa, said):
    announce_slow(SimpleNamespace(device="cpu", dtype="int8", built_by=None), Cpu("Some CPU", 2, isa, None, None))
    assert ("Some CPU has no instructions for int8" in capfd.readouterr().err) == said
