"""Engine openvino: rewritten graphs compute what PyTorch computes, and compiled ones come back from the cache unchanged."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

torch = pytest.importorskip("torch")
openvino = pytest.importorskip("openvino")
pytest.importorskip("onnxscript")

from torch import nn  # noqa: E402

from export.onnx import export_onnx  # noqa: E402
from export.rewrite import SubpixelUpsample  # noqa: E402
from fastgen.engines import base  # noqa: E402
from fastgen.engines.cache.artifacts import artifacts  # noqa: E402
from fastgen.engines.openvino import engine as module  # noqa: E402
from fastgen.engines.openvino import rewrites  # noqa: E402
from fastgen.engines.openvino.engine import shared_core  # noqa: E402
from fastgen.errors import FastgenError  # noqa: E402
from fastgen.generate.pipeline import load  # noqa: E402
from fastgen.models.bundle import read_bundle  # noqa: E402
from fastgen.models.folder import load_model  # noqa: E402
from fastgen.models.signatures import Signature, TensorSpec  # noqa: E402

HALF = 64  # height and width of the images that are normalised channels last


def exported(network, shape, out, tmp_path):
    """The network on (B, *shape) -> (B, *out) as an OpenVINO graph of one row."""
    signature = Signature(
        (TensorSpec("x", "float32", ("batch", *shape)),), (TensorSpec("y", "float32", ("batch", *out)),)
    )
    export_onnx(network.eval(), signature, tmp_path / "model.onnx")
    model = shared_core().read_model(tmp_path / "model.onnx")
    model.reshape([1, *shape])
    return model


def operators(model):
    return {node.get_type_name() for node in model.get_ops()}


def infer(model, x, dtype="f32"):
    compiled = shared_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": dtype})
    return compiled(x)[0]


@pytest.fixture
def engine(text_bundle, monkeypatch, tmp_path):
    """Opens engine openvino on an empty cache."""
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path / "cache"))
    return lambda **options: load(text_bundle, "openvino", **options)


def guided_inputs(pipeline, batch):
    inputs = list(pipeline.spec.signatures["unet"].sample_inputs(2 * batch, np.random.default_rng(batch)).values())
    timestep = np.linspace(0, 999, batch).round().astype(np.float32)
    return inputs[0][:batch], timestep, inputs[2]


class Normalised(nn.Module):
    """What follows a group normalisation, and comes before it, in diffusers' blocks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.before, self.after = nn.GroupNorm(8, 32, eps=1e-6), nn.Conv2d(3, 32, 1), nn.Conv2d(32, 4, 1)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x):
        return self.after(nn.functional.silu(self.norm(self.before(x))))


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_group_norms_of_large_images_from_channel_moments_are_torchs(offset, tmp_path):
    network = Normalised()
    nn.init.constant_(network.before.bias, offset)  # far from zero, a variance from squares would be lost
    model = exported(network, (3, HALF, HALF), (4, HALF, HALF), tmp_path)
    rewrites.normalise_channels_last(model)
    assert "MVN" not in operators(model)
    x = torch.randn(1, 3, HALF, HALF)
    with torch.inference_mode():
        expected = network(x).numpy()
    assert np.abs(infer(model, x.numpy()) - expected).max() < 1e-3


def test_group_norms_of_small_images_stay_as_they_are(tmp_path):
    model = exported(Normalised(), (3, 16, 16), (4, 16, 16), tmp_path)
    rewrites.normalise_channels_last(model)
    assert "MVN" in operators(model)


@pytest.mark.parametrize("network", ["unet", "vae_decoder"])
def test_every_group_norm_of_an_exported_network_is_recognised(text_model, text_bundle, network):
    """What the rewrites match is what export writes: an exporter that writes something else must not pass unnoticed."""
    signature = read_bundle(text_bundle).spec.signatures[network]
    model = shared_core().read_model(text_bundle / network / "model.onnx")
    model.reshape({t.name: t.with_batch(2) for t in signature.inputs})
    modules = load_model(text_model).networks()[network].named_modules()
    norms = [name for name, one in modules if isinstance(one, nn.GroupNorm) and ".encoder." not in name]
    of_pixels = [
        name for name in norms if not name.endswith(".group_norm")
    ]  # the VAE's attention has its own on (B, C, N)
    assert len(of_pixels) > 3
    assert len(list(rewrites._group_norms(model))) == len(of_pixels)


def test_subpixel_upsampling_interleaves_whole_pixels(tmp_path):
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 4, 3, padding=1)
    model = exported(SubpixelUpsample(conv), (6, 5, 8), (4, 10, 16), tmp_path)
    rewrites.interleave_channels_last(model)
    (shuffle,) = [node for node in model.get_ops() if node.get_type_name() == "DepthToSpace" and _is_used(node)]
    assert shuffle.get_attributes()["mode"].lower() == "blocks_first"
    x = torch.randn(1, 6, 5, 8)
    with torch.inference_mode():
        expected = conv(nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")).numpy()
    assert np.abs(infer(model, x.numpy()) - expected).max() < 1e-5


def _is_used(node):
    return bool(node.output(0).get_target_inputs())


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["text", "labels"])
def test_a_guided_batch_is_what_two_batches_would_be(request, kind, batch):
    bundle = request.getfixturevalue("text_bundle" if kind == "text" else "label_bundle")
    pipeline = load(bundle, "openvino", dtype="fp32", threads=2)
    inputs = guided_inputs(pipeline, batch)
    found, expected = pipeline.engine.run_guided(*inputs), base.Engine.run_halves(pipeline.engine, "unet", *inputs)[0]
    assert found.shape == expected.shape
    assert np.abs(expected[:batch] - expected[batch:]).max() > 1e-3  # the conditions differ, and matter
    assert np.abs(found - expected).max() < 1e-5


def test_a_guided_batch_computes_once_what_the_condition_does_not_reach(text_bundle):
    model = shared_core().read_model(text_bundle / "unet/model.onnx")
    assert rewrites.share_rows(model)
    names = [p.get_friendly_name() for p in model.get_parameters()]
    signature = load(text_bundle, "openvino").spec.signatures["unet"]
    model.reshape({t.name: t.with_batch(6 if t.name == names[2] else 3) for t in signature.inputs})
    rows = [n.get_output_shape(0)[0] for n in model.get_ordered_ops() if n.get_type_name() == "Convolution"]
    assert rows[0] == 3
    assert rows[-1] == 6
    assert model.outputs[0].get_shape()[0] == 6


def test_a_graph_that_takes_shapes_from_its_sample_is_left_alone():
    from openvino import opset13 as op

    sample, timestep, cond = (op.parameter([-1, n], np.float32) for n in (8, 1, 8))
    joined = op.add(op.reshape(cond, op.shape_of(sample), False), timestep)
    model = openvino.Model([op.multiply(joined, sample)], [sample, timestep, cond], "m")
    before = len(model.get_ops())
    assert not rewrites.share_rows(model)
    assert len(model.get_ops()) == before


def lone_and_among(model, rows, rewrite):
    """Outputs of one row in bf16, alone and among `rows`, of a graph (B, ...) -> (B, ...) that `rewrite` was applied to."""
    if "BF16" not in shared_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no bf16")
    outputs = []
    for count in (1, rows):
        copy = model.clone()
        shape = copy.get_parameters()[0].get_partial_shape()
        copy.reshape([count, *(d.get_length() for d in list(shape)[1:])])
        rewrite(copy)
        x = np.random.default_rng(0).standard_normal(copy.inputs[0].get_shape(), np.float32)
        x[0] = np.random.default_rng(1).standard_normal(x.shape[1:], np.float32)
        compiled = shared_core().compile_model(copy, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
        outputs.append([y[0] for y in compiled(x).values()])
    return outputs


@pytest.mark.parametrize("shape", [(16,), (48,), (1, 48), (100,), (4, 8), (16, 32)])
def test_small_products_of_one_row_are_those_among_others(shape):
    from openvino import opset13 as op

    rng = np.random.default_rng(2)
    x = op.parameter([-1, *shape], np.float32)
    weights = [rng.standard_normal(s).astype(np.float32) for s in ((32, shape[-1]), (shape[-1], 192))]
    products = [op.matmul(x, op.constant(w), False, i == 0) for i, w in enumerate(weights)]
    alone, among = lone_and_among(openvino.Model(products, [x], "m"), 40, rewrites.pad_products)
    row = np.random.default_rng(1).standard_normal(shape, np.float32)
    for y, same, weight in zip(alone, among, (weights[0].T, weights[1]), strict=True):
        assert np.array_equal(y, same)
        assert np.abs(y - row @ weight).max() < 0.2


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_products_are_padded_whatever_their_weights_are_stored_in(dtype, transposed):
    from openvino import opset13 as op

    weight = np.random.default_rng(2).standard_normal((24, 48)[:: -1 if transposed else 1]).astype(dtype)
    stored = op.constant(weight)
    x = op.parameter([3, 24], np.float32)
    model = openvino.Model([op.matmul(x, op.convert(stored, np.float32), False, transposed)], [x], "m")
    before = shared_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    values = np.random.default_rng(3).standard_normal((3, 24), np.float32)
    expected = before(values)[0].copy()
    rewrites.pad_products(model)
    (product,) = [node for node in model.get_ordered_ops() if node.get_type_name() == "MatMul"]
    assert product.get_input_shape(0)[-1] % 32 == 0
    padded = shared_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(values)[0]
    np.testing.assert_allclose(padded, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_convolutions_of_one_tiny_image_are_those_among_others(size, stride):
    from openvino import opset13 as op

    rng = np.random.default_rng(2)
    x = op.parameter([-1, 80, size, size], np.float32)
    weight = rng.standard_normal((96, 80, 3, 3)).astype(np.float32) / 27
    convolution = op.convolution(x, op.constant(weight), [stride] * 2, [1, 1], [1, 1], [1, 1])
    model = openvino.Model([convolution], [x], "m")
    (alone,), (among,) = lone_and_among(model, 16, rewrites.widen_convolutions)
    assert np.array_equal(alone, among)
    image = torch.from_numpy(np.random.default_rng(1).standard_normal((80, size, size), np.float32))
    expected = nn.functional.conv2d(image[None], torch.from_numpy(weight), stride=stride, padding=1)[0].numpy()
    assert alone.shape == expected.shape
    assert np.abs(alone - expected).max() < 0.05


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_compiled_network_from_the_cache_makes_the_same_bytes(engine, dtype, monkeypatch):
    if dtype == "bf16" and "BF16" not in shared_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no bf16")

    def images():
        made = engine(dtype=dtype).generate(["A red dragon.", "A blue slime."], seeds=[0, 1], num_inference_steps=2)
        return [image.tobytes() for image in made]

    fresh = images()
    monkeypatch.setattr(module.Engine, "_compiled", lambda *_: pytest.fail("compiled again"))
    assert images() == fresh
    kept = {(a.recipe.fields["network"], a.recipe.fields["guided"]) for a in artifacts("openvino")}
    assert kept == {("text_encoder", False), ("unet", True), ("vae_decoder", False)}


def test_the_cache_does_not_repeat_the_weights(engine, text_bundle):
    pipeline = engine(dtype="fp32")
    pipeline.engine.run_guided(*guided_inputs(pipeline, 2))
    (kept,) = artifacts("openvino")
    assert kept.bytes < (text_bundle / "unet/model.onnx.data").stat().st_size


def test_a_damaged_compiled_network_is_compiled_again_and_that_is_said(engine, capsys):
    first = engine(dtype="fp32")
    inputs = guided_inputs(first, 1)
    expected = first.engine.run_guided(*inputs)
    (kept,) = artifacts("openvino")
    file = kept.folder / module.NETWORK
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert capsys.readouterr().err == ""  # a small network compiles unannounced
    assert np.array_equal(engine(dtype="fp32").engine.run_guided(*inputs), expected)
    assert "altered or damaged" in capsys.readouterr().err


def test_compiling_a_large_network_is_announced(engine, capsys, monkeypatch):
    monkeypatch.setattr(module, "ANNOUNCED", 0)
    pipeline = engine(dtype="fp32")
    pipeline.engine.run_guided(*guided_inputs(pipeline, 1))
    first, second = capsys.readouterr().err.splitlines()
    assert first == "building openvino: unet, batch 1, fp32"
    assert second.startswith("built openvino: unet, batch 1, fp32 in ")


def test_other_threads_and_weights_have_another_address(engine, label_bundle, text_bundle):
    recipes = [
        engine(dtype="fp32").engine.recipe("unet", 2),
        engine(dtype="fp32", threads=1).engine.recipe("unet", 2),
        engine(dtype="fp32").engine.recipe("unet", 4),
        load(label_bundle, "openvino", dtype="fp32").engine.recipe("unet", 2),
    ]
    assert len({recipe.digest for recipe in recipes}) == len(recipes)
    assert engine(dtype="fp32").engine.recipe("unet", 2) == recipes[0]


def test_the_text_encoder_is_executed_in_fp32(engine):
    assert engine().engine.executed("text_encoder") == "fp32"


FREED_ELSEWHERE = """
import gc, signal, sys, threading
import fastgen

held = [fastgen.load(sys.argv[1], "openvino")]
held[0].generate(labels=["red cube"], num_inference_steps=2)

def free():
    held.clear()
    gc.collect()

thread = threading.Thread(target=free)
thread.start()
thread.join()
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_works_after_another_thread_freed_the_engine(label_bundle):
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", FREED_ELSEWHERE, label_bundle],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr


@pytest.mark.parametrize("wrong_loads", [0, 1, 2, 3])
@pytest.mark.parametrize("guided", [False, True])
def test_lanes_that_do_not_agree_are_loaded_again(text_bundle, monkeypatch, guided, wrong_loads):
    """OpenVINO sometimes loads a network that is less precise in one lane than in the other."""
    engine = module.Engine(read_bundle(text_bundle), dtype="fp32")
    sample, timestep, *conds = engine.samples("unet", 2)
    inputs = (sample, timestep, *(np.concatenate([c, c]) for c in conds)) if guided else (sample, timestep, *conds)
    run = engine.run_guided if guided else lambda *x: engine.run("unet", *x)[0]
    expected, load, loads = run(*inputs), engine._load, []
    engine._lanes.clear()

    class Coarse:
        def __init__(self, lane):
            self.start, self._lane = lane.start, lane

        def outputs(self):
            return [y + np.float32(1e-3) for y in self._lane.outputs()]

    def coarse(*arguments):
        loads.append(arguments)
        first, second = load(*arguments)
        return [first, Coarse(second) if len(loads) <= wrong_loads else second]

    monkeypatch.setattr(engine, "_load", coarse)
    if wrong_loads == 3:
        with pytest.raises(FastgenError, match=r"unet: OpenVINO .* computes it differently in threads side by side"):
            run(*inputs)
        return
    assert np.array_equal(run(*inputs), expected)
    assert len(loads) == wrong_loads + 1


@pytest.mark.parametrize("guided", [False, True])
def test_threads_that_run_the_same_size_get_what_each_gets_alone(text_bundle, guided):
    pipeline = load(text_bundle, "openvino", threads=2)
    engine = pipeline.engine

    def inputs(i):
        sample, timestep, *conds = (engine.numpy(x)[i : i + 2] for x in engine.samples("unet", 8))
        return [sample, timestep, *(np.concatenate([c, c]) for c in conds)] if guided else [sample, timestep, *conds]

    def run(i):
        return engine.run_guided(*inputs(i)) if guided else engine.run("unet", *inputs(i))[0]

    alone = [run(i) for i in range(4)]
    other = load(text_bundle, "openvino", threads=2)
    engine = other.engine  # has opened nothing yet
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, [0, 1, 2, 3] * 25))
    assert all(np.array_equal(value, alone[i % 4]) for i, value in enumerate(found))
