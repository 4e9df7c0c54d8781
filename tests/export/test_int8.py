"""`--dtype int8`: which layers bear it, the graphs, the engines that run them, and the certificate that decides."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("diffusers")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from PIL import Image  # noqa: E402

import export.certificate  # noqa: E402
from export.calibration import STEPS, calibration_requests, calibration_rows, cropped, stratified  # noqa: E402
from export.certificate import UNSCORED, certify  # noqa: E402
from export.int8 import budget, layer_nodes, write_int8  # noqa: E402
from export.quantisation import Layer, Quantisation, quantisation_name  # noqa: E402
from export.sensitivity import (  # noqa: E402
    chosen,
    input_spans,
    predicted_error,
    quantised_output,
    round_inputs,
    round_weights,
    sensitivities,
)
from export.task_score import ScoreRow  # noqa: E402
from fastgen.engines import create_engine  # noqa: E402
from fastgen.engines.base import announce_int8  # noqa: E402
from fastgen.engines.machine import Cpu, cpu, has_int8  # noqa: E402
from fastgen.errors import FastgenError  # noqa: E402
from fastgen.models.bundle import graph_name, read_bundle  # noqa: E402
from fastgen.models.folder import load_model  # noqa: E402

KINDS = ("text", "labels")


@pytest.fixture(scope="module")
def models(text_model, label_model):
    return {"text": load_model(text_model), "labels": load_model(label_model)}


@pytest.fixture(scope="module")
def rows(models):
    found = {}

    def get(kind):
        if kind not in found:
            condition = models[kind].spec.condition
            found[kind] = calibration_rows(models[kind], calibration_requests(None, condition))
        return found[kind]

    return get


def true_error(module, rows, names):
    """What these layers in eight bits change in the output, relative L2, by running the network with them."""
    layers = {n: m for n, m in module.named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)}
    spans = input_spans(module, layers, rows)
    outputs = []
    for quantised in (False, True):
        handles = [
            layers[name].register_forward_hook(lambda m, x, y, name=name: quantised_output(m, x[0], spans[name]))
            for name in (names if quantised else ())
        ]
        with torch.no_grad():
            results = [module(*map(torch.from_numpy, row)) for row in rows]
        outputs.append(torch.cat([(y[0] if isinstance(y, tuple) else y).reshape(-1) for y in results]))
        for handle in handles:
            handle.remove()
    return float((outputs[1] - outputs[0]).norm() / outputs[0].norm())


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=40).filter(lambda v: max(map(abs, v)) > 1e-6))
def test_rounding_moves_a_number_by_at_most_half_a_step_and_keeps_zero(values):
    x = torch.tensor([0.0, *values])
    span = float(x.min()), float(x.max())
    rounded = round_inputs(x, span)
    assert float((rounded - x).abs().max()) <= (span[1] - span[0]) / 255 * 1.01
    assert rounded[0] == 0
    weights = round_weights(torch.stack([x, 2 * x]))
    assert float((weights[0] - x).abs().max()) <= float(x.abs().max()) / 127 / 2 * 1.01
    assert torch.equal(2 * weights[0], weights[1])
    assert weights[0, 0] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_what_the_networks_see_along_the_models_own_sampling(models, rows, kind):
    found = rows(kind)
    unet = found["unet"]
    timesteps = {float(row[1][0]) for row in unet}
    assert len(timesteps) == STEPS[0]
    assert max(timesteps) > 800
    assert min(timesteps) < 200
    assert len(unet) == 2 * 8 * STEPS[0]  # with and without the condition
    assert ("vae_decoder" in found) == (kind == "text")
    some = stratified(unet, 4)
    assert {float(row[1][0]) for row in some} >= {max(timesteps), min(timesteps)}


@pytest.mark.parametrize(("kind", "network"), [("text", "unet"), ("text", "vae_decoder"), ("labels", "unet")])
def test_the_table_predicts_what_eight_bits_change(models, rows, kind, network):
    module, some = models[kind].networks()[network], stratified(rows(kind)[network], 4)
    table = sensitivities(module, some)
    assert math.isclose(sum(layer.products for layer in table), 1, rel_tol=1e-6)
    everything = true_error(module, some, [layer.name for layer in table])
    assert 0.6 * everything < predicted_error(table) < 1.7 * everything
    largest = sorted(table, key=lambda layer: -layer.error)[:4]
    for layer in largest:
        assert 0.4 * layer.error < true_error(module, some, [layer.name]) < 2.5 * layer.error, layer.name
    assert sensitivities(module, some) == table  # the same table every time
    assert all(parameter.grad is None for parameter in module.parameters())


def test_layers_with_much_error_for_their_products_stay_in_higher_precision():
    table = [Layer("a", 0.03, 0.5, True), Layer("b", 0.03, 0.01, True), Layer("c", 0.01, 0.48, True)]
    table.append(Layer("tiny", 1e-6, 1e-6, True))
    assert [layer.name for layer in chosen(table, 0.04) if layer.quantised] == ["a", "c"]
    assert [layer.name for layer in chosen(table, 0.02) if layer.quantised] == ["c"]
    assert [layer.name for layer in chosen([Layer("d", 0.05, 0.9, True), *table[1:]], 0.04) if layer.quantised] == [
        "b",
        "c",
    ]
    assert [layer.name for layer in chosen(table, 1.0) if layer.quantised] == ["a", "b", "c"]
    assert not any(layer.quantised for layer in chosen(table, 0.001))
    assert predicted_error(chosen(table, 0.04)) <= 0.04


def test_a_layer_that_outliers_spoil_is_found_and_kept(text_model, rows):
    module = load_model(text_model).networks()["unet"]
    name = "unet.up_blocks.1.resnets.0.conv_shortcut"
    layer = dict(module.named_modules())[name]
    with torch.no_grad():  # one channel of the inputs is 3,000 times as large, and next to unused
        previous = module.unet.up_blocks[0].upsamplers[0].conv
        previous.weight[0] *= 3000
        layer.weight[:, 0] /= 3000
    table = chosen(sensitivities(module, stratified(rows("text")["unet"], 4)), 0.04)
    assert max(table, key=lambda e: e.error).name == name
    assert name not in [e.name for e in table if e.quantised]
    assert sum(e.quantised for e in table) > 0


@pytest.mark.parametrize(("kind", "network"), [("text", "unet"), ("text", "vae_decoder"), ("labels", "unet")])
def test_every_layer_is_found_in_the_graph(models, rows, lowered_bundle, kind, network):
    bundle = read_bundle(lowered_bundle(kind, "int8"))
    module = models[kind].networks()[network]
    nodes = layer_nodes(module, bundle.network(network))
    layers = {layer.name for layer in sensitivities(module, stratified(rows(kind)[network], 1))}
    assert set(nodes) == layers
    assert len({node for found in nodes.values() for node in found}) >= len(layers)


def test_an_upsamplers_convolution_is_four_nodes(lowered_bundle, tmp_path):
    from diffusers import UNet2DModel

    from export.onnx import export_onnx
    from fastgen.models.signatures import Signature, TensorSpec

    class Unet(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = UNet2DModel(
                sample_size=8,
                in_channels=3,
                out_channels=3,
                block_out_channels=(128, 128),
                layers_per_block=1,
                norm_num_groups=8,
                down_block_types=("DownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "UpBlock2D"),
            ).eval()

        def forward(self, sample, timestep):
            return self.unet(sample, timestep).sample

    state = ("batch", 3, 8, 8)
    inputs = (TensorSpec("sample", "float32", state), TensorSpec("timestep", "float32", ("batch",)))
    signature = Signature(inputs, (TensorSpec("out_sample", "float32", state),))
    module = Unet()
    export_onnx(module, signature, tmp_path / "fp32/model.onnx")
    nodes = layer_nodes(module, tmp_path / "fp32/model.onnx")
    assert len(nodes["unet.up_blocks.0.upsamplers.0.conv"]) == 4
    rng = np.random.default_rng(0)
    rows = [
        (rng.standard_normal((1, 3, 8, 8)).astype(np.float32), np.array([t], np.float32)) for t in (0, 300, 600, 999)
    ]
    found = write_int8(module, "unet", signature, rows, tmp_path / "fp32/model.onnx", tmp_path, 0.04)
    assert next(e for e in found.layers if "upsamplers" in e.name).quantised


@pytest.mark.parametrize(("kind", "networks"), [("text", ("unet", "vae_decoder")), ("labels", ("unet",))])
def test_graphs_hold_pairs_around_the_layers_of_the_table(lowered_bundle, kind, networks):
    folder = lowered_bundle(kind, "int8")
    bundle = read_bundle(folder)
    bundle.verify("int8")
    for network in networks:
        table = json.loads(bundle.file(quantisation_name(network)).read_text())
        quantised = [layer for layer in table["layers"] if layer["quantised"]]
        assert table["predicted"] <= table["budget"]
        model = onnx.load(bundle.network(network, "int8"))
        initial = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
        pairs = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
        for node in pairs:  # inputs have a zero point, weights none
            zero = initial[node.input[2]]
            assert zero.dtype == np.uint8 or (zero.dtype == np.int8 and not zero.any() and node.input[0] in initial)
        weights = [initial[n.input[0]] for n in pairs if n.op_type == "DequantizeLinear" and n.input[0] in initial]
        assert len(weights) >= len(quantised)
        assert all(weight.dtype == np.int8 and np.abs(weight.astype(int)).max() <= 127 for weight in weights)
        smaller = (folder / f"{graph_name(network, 'int8')}.data").stat().st_size
        assert smaller < (folder / f"{graph_name(network, 'fp32')}.data").stat().st_size
    assert not (folder / "vae_encoder/model.int8.onnx").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ["ort", "openvino"])
def test_engines_run_them_and_are_certified(lowered_bundle, tmp_path, kind, engine):
    pytest.importorskip(engine if engine == "openvino" else "onnxruntime")
    folder = shutil.copytree(lowered_bundle(kind, "int8"), tmp_path / "bundle")
    bundle = read_bundle(folder)
    opened = create_engine(engine, bundle, dtype="int8")
    assert (opened.dtype, opened.executed("unet"), opened.executed("text_encoder")) == ("int8", "int8", "fp32")
    certificate = certify(opened, bundle)
    assert certificate.passed, certificate.table()
    unet = certificate.rows[[row.what for row in certificate.rows].index("unet")]
    assert 1e-3 < unet.relative_l2 < 0.1  # eight bits were computed in
    assert UNSCORED in certificate.table()
    again = create_engine(engine, bundle, dtype="int8")  # from the cache
    inputs = again.samples("unet", 2)
    assert all(
        np.array_equal(*pair) for pair in zip(again.run("unet", *inputs), opened.run("unet", *inputs), strict=True)
    )


@pytest.mark.parametrize("network", ["unet", "vae_decoder"])
def test_onnxruntime_computes_what_the_graph_says(lowered_bundle, network):
    """Its products of 8 bits overflow on a CPU without VNNI: 0.11 of a UNet's output, instead of the order of rounding."""
    import onnxruntime

    bundle = read_bundle(lowered_bundle("text", "int8"))
    engine = create_engine("ort", bundle, dtype="int8")
    inputs = engine.samples(network, 2)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # products in floating point
    session = onnxruntime.InferenceSession(bundle.network(network, "int8"), options, providers=["CPUExecutionProvider"])
    names = [tensor.name for tensor in bundle.spec.signatures[network].inputs]
    expected = session.run(None, dict(zip(names, inputs, strict=True)))[0]
    distance = np.linalg.norm(engine.run(network, *inputs)[0] - expected)
    assert distance < 0.05 * np.linalg.norm(expected)


@pytest.mark.parametrize("integers", [True, False], ids=["integers", "floating-point"])
@pytest.mark.parametrize("kind", KINDS)
def test_openvino_computes_what_the_graph_says(lowered_bundle, kind, integers):
    """As the ONNX reader leaves the pairs, convolutions behind a `concat` are wrong on a CPU with VNNI. Without VNNI, products
    of 8 bits overflow, and weights are lost where two streams multiply them by their scales."""
    if integers and not has_int8(cpu()):
        pytest.skip("this CPU has no VNNI")
    openvino = pytest.importorskip("openvino")
    bundle = read_bundle(lowered_bundle(kind, "int8"))
    ort = create_engine("ort", bundle, dtype="int8")
    inputs = ort.samples("unet", 2)
    expected = ort.run("unet", *inputs)[0]
    from fastgen.engines.openvino.rewrites import join_quantisation, multiply_weights

    core = openvino.Core()
    model = core.read_model(bundle.network("unet", "int8"))
    pairs = sum(node.get_type_name() == "FakeQuantize" for node in model.get_ordered_ops())
    join_quantisation(model)
    joined = [node for node in model.get_ordered_ops() if node.get_type_name() == "FakeQuantize"]
    assert 0 < len(joined) <= pairs
    for node in joined:  # 0 is one of the 256 numbers
        low, high = (float(node.input_value(i).get_node().get_data()) for i in (1, 2))
        assert abs(low / (high - low) * 255 - round(low / (high - low) * 255)) < 1e-3
    model.reshape({port.any_name: list(x.shape) for port, x in zip(model.inputs, inputs, strict=True)})
    if not integers:
        multiply_weights(model)
        weights = [node for node in model.get_ordered_ops() if node.get_type_name() == "Constant"]
        assert not any(np.asarray(node.get_data()).dtype == np.int8 and node.get_data().size > 64 for node in weights)
    for _ in range(4):  # loads
        compiled = core.compile_model(model.clone(), "CPU", {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 2})
        output = compiled(list(inputs))[0]
        assert np.linalg.norm(output - expected) < 0.05 * np.linalg.norm(expected)  # unjoined: 0.5 in a real UNet


def test_guided_and_split_batches_agree_with_single_rows(lowered_bundle):
    pytest.importorskip("openvino")
    engine = create_engine("openvino", read_bundle(lowered_bundle("text", "int8")), dtype="int8")
    sample, timestep, *conds = engine.samples("unet", 4)
    both = [np.concatenate([c, c[::-1]]) for c in conds]
    guided = engine.run_guided(sample, timestep, *both)
    rows = engine.run("unet", np.concatenate([sample] * 2), np.concatenate([timestep] * 2), *both)[0]
    assert np.linalg.norm(guided - rows) < 0.05 * np.linalg.norm(rows)


def test_a_miss_names_the_worst_layers_and_the_precision_that_passes(fastgen, lowered_bundle, tmp_path, monkeypatch):
    bundle = shutil.copytree(lowered_bundle("text", "int8"), tmp_path / "bundle")
    monkeypatch.setitem(export.certificate.MIN_COSINE, "int8", 0.99999999)
    code, out, err = fastgen("export", bundle, "--dtype", "int8", "--engine", "ort:int8")
    assert (code, err.splitlines()[-1]) == (1, "fastgen: error: not certified: ort (see the table above)")
    table = Quantisation(**json.loads((bundle / quantisation_name("unet")).read_text()))
    worst = sorted((e for e in table.layers if e["quantised"]), key=lambda e: -e["error"])[:3]
    line = next(line for line in out.splitlines() if "the layers in int8 that change it most" in line)
    assert all(layer["name"] in line for layer in worst)
    assert "unet: fp32 would pass" in out
    code, _, err = fastgen(
        "generate",
        "--prompt",
        "a cat",
        "--model",
        bundle,
        "--dtype",
        "int8",
        "--engine",
        "ort",
        "--out",
        tmp_path / "x.png",
    )
    assert code == 1
    assert "not certified: engine ort int8 on cpu" in err.splitlines()[-1]
    assert not (tmp_path / "x.png").exists()


def test_generate_certifies_int8_once(fastgen, lowered_bundle, tmp_path):
    bundle = shutil.copytree(lowered_bundle("labels", "int8"), tmp_path / "bundle")
    shutil.rmtree(bundle / "certificates")
    options = ("--labels", "red cube", "--model", bundle, "--engine", "ort", "--dtype", "int8", "--out")
    code, _, err = fastgen("generate", *options, tmp_path / "a.png")
    assert code == 0, err
    assert "certifying engine ort int8 on cpu against eager fp32 (once per bundle)" in err
    code, _, err = fastgen("generate", *options, tmp_path / "b.png")
    assert code == 0, err
    assert "certifying" not in err
    assert Image.open(tmp_path / "a.png").tobytes() == Image.open(tmp_path / "b.png").tobytes()


def test_calibration_takes_a_request_file(models, tmp_path):
    condition = models["labels"].spec.condition
    names = list(condition.names)
    file = tmp_path / "many.json"
    file.write_text(json.dumps([[names[i % 24], names[(i + 1) % 24]] for i in range(40)]))
    requests = calibration_requests(file, condition)
    assert (len(requests), requests[0].id, requests[-1].id) == (16, "0", "39")
    assert calibration_requests(None, condition) != requests


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--dtype", "int8", "--calibration", "few.json"), "few.json: holds 5 requests; calibration needs at least 8"),
        (("--dtype", "int8", "--calibration", "prompts.json"), "this model takes"),
        (("--dtype", "int8", "--calibration", "no.json"), "no.json"),
        (("--calibration", "few.json"), "--calibration is for graphs in int8; give --dtype int8 too"),
        (("--dtype", "fp16", "--requests", "few.json", "--evaluator", "x"), "give --dtype int8 too"),
        (("--dtype", "int8", "--requests", "few.json"), "--requests and --evaluator go together"),
        (("--dtype", "int8", "--requests", "prompts.json", "--evaluator", "evaluator-iclevr"), "this model takes"),
        (("--dtype", "int8", "--requests", "few.json", "--evaluator", "no"), "no"),
        (("--dtype", "int8", "--trt"), "--dtype int8 is for engines openvino and ort; --trt and --rtx take"),
        (("--dtype", "int8", "--rtx"), "--dtype int8 is for engines openvino and ort; --trt and --rtx take"),
        (("--dtype", "int8", "--triton", "repo"), "--triton take fp16, bf16 or fp32"),
        (("--dtype", "int8", "--engine", "compile:int8"), "engine compile executes fp16, bf16, fp32, not int8"),
    ],
)
def test_wrong_options_are_one_line(fastgen, label_model, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    Path("few.json").write_text(json.dumps([["red cube"]] * 5))
    Path("prompts.json").write_text(json.dumps([{"prompt": f"monster {i}"} for i in range(9)]))
    code, out, err = fastgen("export", label_model, "--out", "bundle", *options)
    assert (code, out) == (2, "")
    assert words in err.splitlines()[-1]
    assert not Path("bundle").exists()


def test_a_calibration_that_comes_too_late_is_refused(fastgen, label_model, lowered_bundle, tmp_path):
    bundle = shutil.copytree(lowered_bundle("labels", "int8"), tmp_path / "bundle")
    (tmp_path / "many.json").write_text(json.dumps([["red cube"]] * 9))
    options = ("--dtype", "int8", "--calibration", tmp_path / "many.json")
    code, _, err = fastgen("export", label_model, "--out", bundle, *options)
    assert code == 2
    assert f"{bundle} holds int8 graphs already" in err.splitlines()[-1]


def test_engines_and_bundles_without_int8_say_so(fastgen, label_model, label_bundle, tmp_path):
    options = ("--labels", "red cube", "--dtype", "int8", "--out", tmp_path / "x.png")
    code, _, err = fastgen("generate", "--model", label_model, "--engine", "eager", *options)
    assert (code, err) == (2, "fastgen: error: engine eager executes fp32, bf16, fp16, not int8\n")
    for engine in ("ort", "openvino"):
        code, _, err = fastgen("generate", "--model", label_bundle, "--engine", engine, *options)
        assert code == 2
        assert "has no int8 graph of unet" in err
        assert "--dtype int8`, with the model folder, adds it" in err


@pytest.mark.parametrize(("isa", "said"), [(("avx2",), True), (("avx2", "avx512_vnni"), False), (("i8mm",), False)])
def test_a_cpu_without_instructions_for_int8_is_named(capfd, isa, said):
    announce_int8(Cpu("Some CPU", 2, isa, None, None))
    err = capfd.readouterr().err
    assert ("Some CPU has no instructions for it" in err) == said


def test_guidance_tightens_the_denoisers_budget():
    assert budget("unet", 1.0) == budget("unet", 3.0) == 2 * budget("unet", 6.0)
    assert budget("vae_decoder", 1.0) == budget("vae_decoder", 8.0)


def test_no_layer_bears_eight_bits(models, rows, label_bundle, tmp_path):
    bundle, model = read_bundle(label_bundle), models["labels"]
    signature = bundle.spec.signatures["unet"]
    with pytest.raises(FastgenError, match=r"none of its .* layers bears eight bits; use --dtype bf16 or fp16"):
        write_int8(
            model.networks()["unet"], "unet", signature, rows("labels")["unet"], bundle.network("unet"), tmp_path, 1e-9
        )


def test_latents_are_cropped_in_the_middle():
    latent = np.arange(2 * 50 * 40, dtype=np.float32).reshape(1, 2, 50, 40)
    ((cut,),) = cropped([(latent,)], 32)
    assert np.array_equal(cut, latent[:, :, 9:41, 4:36])
    ((whole,),) = cropped([(latent[..., :8],)], 64)
    assert np.array_equal(whole, latent[..., :8])


@pytest.mark.parametrize(("low", "high", "passed"), [(-0.02, 0.01, True), (-0.02, -0.001, False), (0.001, 0.02, True)])
def test_the_tasks_score_decides_too(lowered_bundle, tmp_path, monkeypatch, low, high, passed):
    bundle = read_bundle(shutil.copytree(lowered_bundle("labels", "int8"), tmp_path / "bundle"))
    engine = create_engine("ort", bundle, dtype="int8")
    row = ScoreRow("label_accuracy", 0.9, 0.89, low, high, 32, 5, high >= 0)
    monkeypatch.setattr("export.certificate.score_rows", lambda *arguments: [row])
    certificate = certify(engine, bundle, task=object())
    assert certificate.passed == passed
    assert ("MISS label_accuracy" in certificate.table()) == (not passed)
    assert UNSCORED not in certificate.table()


@pytest.mark.slow
def test_a_shipped_model_keeps_its_score(fastgen, tmp_path):
    pytest.importorskip("torchmetrics")
    file = tmp_path / "requests.json"
    colours, shapes = ("red", "green", "blue", "yellow"), ("cube", "sphere", "cylinder")
    file.write_text(json.dumps([[f"{c} {s}"] for c in colours for s in shapes]))
    options = ("--dtype", "int8", "--engine", "ort:int8", "--requests", file, "--evaluator", "evaluator-iclevr")
    code, out, err = fastgen("export", "iclevr-64", "--out", tmp_path / "bundle", *options)
    assert code == 0, err
    assert "ok   label_accuracy" in out
    assert "5 seeds of 12 images" in out
