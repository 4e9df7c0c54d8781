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
from export.calibration import STEPS, calibrate, calibration_requests, cropped, input_spans, layers, stratified  # noqa: E402
from export.certificate import UNSCORED, certify, pictures_pass  # noqa: E402
from export.fitting import TIGHTER, budget, fit  # noqa: E402
from export.int8 import layer_nodes, layer_table, write_int8  # noqa: E402
from export.quantisation import Layer, Quantisation, quantisation_name  # noqa: E402
from export.reference import bundle_reference  # noqa: E402
from export.sensitivity import (  # noqa: E402
    chosen,
    eight_bits,
    predicted_error,
    round_inputs,
    round_weights,
    sensitivities,
)
from export.task_score import ScoreRow  # noqa: E402
from fastgen.engines import create_engine  # noqa: E402
from fastgen.engines.machine import cpu, has_int8  # noqa: E402
from fastgen.errors import FastgenError, InputError  # noqa: E402
from fastgen.models.bundle import graph_name, read_bundle  # noqa: E402
from fastgen.models.folder import load_model  # noqa: E402

KINDS = ("text", "labels")


@pytest.fixture(scope="module")
def models(text_model, label_model):
    return {"text": load_model(text_model), "labels": load_model(label_model)}


@pytest.fixture(scope="module")
def seen(models):
    found = {}

    def get(kind):
        if kind not in found:
            condition = models[kind].spec.condition
            found[kind] = calibrate(models[kind], calibration_requests(None, condition))
        return found[kind]

    return get


def table_of(models, seen, kind, network, count=4):
    rows = stratified(seen(kind).rows[network], count)
    return sensitivities(models[kind].networks()[network], rows, seen(kind).spans[network])


def true_error(module, rows, spans, names):
    """What these layers in eight bits change in the output, relative L2, by running the network with them."""
    outputs = []
    for quantised in ([], names):
        table = [Layer(name, 0.0, 0.1, True) for name in quantised]
        with torch.no_grad(), eight_bits(module, table, spans):
            results = [module(*map(torch.from_numpy, row)) for row in rows]
        outputs.append(torch.cat([(y[0] if isinstance(y, tuple) else y).reshape(-1) for y in results]))
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
def test_rows_are_what_the_networks_see_along_the_models_own_sampling(models, seen, kind):
    found = seen(kind).rows
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
def test_the_table_predicts_what_eight_bits_change(models, seen, kind, network):
    module, some, spans = models[kind].networks()[network], stratified(seen(kind).rows[network], 4), seen(kind).spans
    before = {name: value.clone() for name, value in module.state_dict().items()}
    table = table_of(models, seen, kind, network)
    assert math.isclose(sum(layer.products for layer in table), 1, rel_tol=1e-6)
    everything = true_error(module, some, spans[network], [layer.name for layer in table])
    assert 0.6 * everything < predicted_error(table) < 1.7 * everything
    largest = sorted(table, key=lambda layer: -layer.error)[:4]
    for layer in largest:
        assert 0.4 * layer.error < true_error(module, some, spans[network], [layer.name]) < 2.5 * layer.error, (
            layer.name
        )
    assert table_of(models, seen, kind, network) == table  # the same table every time
    assert all(parameter.grad is None for parameter in module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_spans_hold_all_inputs_of_a_layer(models, seen):
    module = models["labels"].networks()["unet"]
    some = seen("labels").rows["unet"]
    with input_spans(module) as found, torch.no_grad():
        for row in some:
            module(*map(torch.from_numpy, row))
    assert set(found) == set(seen("labels").spans["unet"]) <= set(layers(module))
    for name, span in seen("labels").spans["unet"].items():
        assert np.allclose(found[name], span, rtol=1e-3, atol=1e-4)
        assert span[0] <= 0 <= span[1]


def test_layers_with_much_error_for_their_products_stay_in_higher_precision():
    table = [Layer("a", 0.03, 0.5, True), Layer("b", 0.03, 0.01, True), Layer("c", 0.01, 0.48, True)]
    table += [Layer("tiny", 1e-6, 1e-6, True), Layer("not in the graph", 1e-6, 0.01, False)]
    assert [layer.name for layer in chosen(table, 0.04) if layer.quantised] == ["a", "c"]
    assert [layer.name for layer in chosen(table, 0.02) if layer.quantised] == ["c"]
    assert [layer.name for layer in chosen([Layer("d", 0.05, 0.9, True), *table[1:]], 0.04) if layer.quantised] == [
        "b",
        "c",
    ]
    assert [layer.name for layer in chosen(table, 1.0) if layer.quantised] == ["a", "b", "c"]
    assert not any(layer.quantised for layer in chosen(table, 0.001))
    assert predicted_error(chosen(table, 0.04)) <= 0.04


def test_a_layer_that_outliers_spoil_is_found_and_kept(text_model):
    model = load_model(text_model)
    module = model.networks()["unet"]
    name = "unet.up_blocks.1.resnets.0.conv_shortcut"
    layer = dict(module.named_modules())[name]
    with torch.no_grad():  # one channel of the inputs is 3,000 times as large, and next to unused
        previous = module.unet.up_blocks[0].upsamplers[0].conv
        previous.weight[0] *= 3000
        layer.weight[:, 0] /= 3000
    found = calibrate(model, calibration_requests(None, model.spec.condition))
    table = chosen(sensitivities(module, stratified(found.rows["unet"], 4), found.spans["unet"]), 0.04)
    assert max(table, key=lambda e: e.error).name == name
    assert name not in [e.name for e in table if e.quantised]
    assert sum(e.quantised for e in table) > 0


@pytest.mark.parametrize(("kind", "network"), [("text", "unet"), ("text", "vae_decoder"), ("labels", "unet")])
def test_every_layer_is_found_in_the_graph(models, seen, lowered_bundle, kind, network):
    bundle = read_bundle(lowered_bundle(kind, "int8"))
    module = models[kind].networks()[network]
    nodes = layer_nodes(module, bundle.network(network))
    assert set(nodes) == set(seen(kind).spans[network])
    assert len({node for found in nodes.values() for node in found}) >= len(nodes)


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
    with input_spans(module) as spans, torch.no_grad():
        for row in rows:
            module(*map(torch.from_numpy, row))
    table = layer_table(module, "unet", rows, spans, nodes)
    found = Quantisation(1.0, predicted_error(table), tuple(table))
    write_int8("unet", signature, rows, tmp_path / "fp32/model.onnx", tmp_path, found, nodes)
    graph = onnx.load(tmp_path / graph_name("unet", "int8"), load_external_data=False).graph
    producers = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        if node.name in nodes["unet.up_blocks.0.upsamplers.0.conv"]:
            assert [producers[name].op_type for name in node.input[:2]] == ["DequantizeLinear"] * 2


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


@pytest.mark.parametrize("engine", ["ort:int8", "openvino:int8", "ort:fp16"])
def test_an_engine_without_its_graphs_is_refused_before_anything_is_exported(fastgen, label_model, tmp_path, engine):
    pytest.importorskip(engine.partition(":")[0].replace("ort", "onnxruntime"))
    precision = engine.partition(":")[2]
    code, _, err = fastgen("export", label_model, "--out", tmp_path / "bundle", "--engine", engine)
    more = ", without --trt and --rtx" if precision == "int8" else ""
    refusal = f"--engine {engine}: the bundle has no graphs in {precision}; `--dtype {precision}`{more} adds them"
    assert (code, err.splitlines()[-1]) == (2, f"fastgen: error: {refusal}")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("made", ["fp16", "int8"])
def test_tensorrt_s_graphs_are_another_engine_s_too_but_not_in_eight_bits(made):
    from export.bundle import _check_graphs, _made

    assert _made("fp16", plans=True) == "fp16"
    assert _made("int8", plans=False) == "int8"
    if made == "fp16":
        _check_graphs([("ort", "fp16")], _made(made, plans=True), None)
    else:
        with pytest.raises(InputError, match="without --trt"):
            _check_graphs([("ort", "int8")], _made(made, plans=True), None)


def test_a_bundle_that_holds_the_graphs_is_certified_without_the_option(fastgen, lowered_bundle, tmp_path):
    bundle = shutil.copytree(lowered_bundle("labels", "int8"), tmp_path / "bundle")
    code, out, _ = fastgen("export", bundle, "--engine", "ort:int8")
    assert code == 0
    assert "ort int8 cpu: certified" in out


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
        (("--calibration", "few.json"), "--calibration is for graphs in eight bits; give --dtype int8 too"),
        (("--dtype", "fp16", "--requests", "few.json", "--evaluator", "x"), "give --dtype int8 too"),
        (("--dtype", "int8", "--requests", "few.json"), "--requests and --evaluator go together"),
        (("--dtype", "int8", "--requests", "prompts.json", "--evaluator", "evaluator-iclevr"), "this model takes"),
        (("--dtype", "int8", "--requests", "few.json", "--evaluator", "no"), "no"),
        (("--dtype", "fp8"), "--dtype fp8 is for TensorRT engines; give --trt or --rtx too"),
        (("--dtype", "int8", "--triton", "repo"), "--triton takes fp16, bf16 or fp32"),
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


def test_guidance_tightens_the_denoisers_budget():
    assert budget("unet", 1.0) == budget("unet", 3.0) == 2 * budget("unet", 6.0)
    assert budget("vae_decoder", 1.0) == budget("vae_decoder", 8.0)


def test_no_layer_bears_eight_bits(models, seen, label_bundle, tmp_path):
    bundle = read_bundle(label_bundle)
    table = chosen(table_of(models, seen, "labels", "unet"), 1e-9)
    arguments = bundle.spec.signatures["unet"], seen("labels").rows["unet"], bundle.network("unet"), tmp_path
    with pytest.raises(FastgenError, match=r"none of its .* layers bears eight bits; use --dtype bf16 or fp16"):
        write_int8("unet", *arguments, Quantisation(1e-9, 0.0, tuple(table)), {})
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("spoiler", ["unet", "vae_decoder"])
def test_a_network_that_spoils_the_images_gets_a_smaller_budget(models, seen, text_bundle, monkeypatch, spoiler):
    import export.fitting

    calibration, lines = seen("text"), []
    tables = {name: table_of(models, seen, "text", name) for name in ("unet", "vae_decoder")}
    names = [max(tables[spoiler], key=lambda layer: layer.error).name]
    spans = {name: dict(found) for name, found in calibration.spans.items()}
    for name in names:  # its inputs come out as 0 or the highest number, which the table does not know of
        spans[spoiler][name] = (0.0, 1e4)
    reference = bundle_reference(read_bundle(text_bundle))
    monkeypatch.setitem(export.fitting.BUDGETS, spoiler, 1.0)
    found = fit(models["text"], tables, spans, reference, lines.append)
    assert len(lines) == export.fitting.TRIES - 1
    assert all(f"; {spoiler} may change by" in line for line in lines)
    assert found[spoiler].budget == pytest.approx(1 / TIGHTER ** len(lines))
    other = "vae_decoder" if spoiler == "unet" else "unet"
    assert found[other].budget == budget(other, models["text"].spec.sampling.guidance_scale)
    lines.clear()
    monkeypatch.undo()
    found = fit(models["text"], tables, calibration.spans, reference, lines.append)
    assert all(table.predicted <= table.budget for table in found.values())
    assert [line.partition(" at ")[0] for line in lines] == ["int8: images"]


def test_one_picture_of_eight_may_be_another_one_but_none_may_be_noise():
    rng = np.random.default_rng(0)
    expected = rng.uniform(-1, 1, (8, 3, 8, 8))
    near = expected + 0.02 * rng.standard_normal(expected.shape)
    for level, passed in ((0.3, True), (1.0, False)):
        found = near.copy()
        found[3] += level * rng.standard_normal(found[3].shape)
        verdict, average, lowest = pictures_pass(expected, found)
        assert verdict == passed
        assert average > 35
        assert lowest == pytest.approx(10 * math.log10(4 / level**2), abs=1)
    worse = expected + 0.08 * rng.standard_normal(expected.shape)
    assert not pictures_pass(expected, worse)[0]  # 28 dB, all of them


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
