"""`--trt` and `--rtx` with `--dtype int8` and `fp8`: symmetric pairs in an fp16 graph, and what the real builder makes of them.

No card has executed these plans here: onnxruntime computes the graphs on the CPU, and the builder's own report tells the types.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("diffusers")
pytest.importorskip("onnxscript")

from dataclasses import replace  # noqa: E402
from unittest.mock import Mock  # noqa: E402

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import export.bundle  # noqa: E402
from export.calibration import calibrate, calibration_requests, stratified  # noqa: E402
from export.certificate import certify  # noqa: E402
from export.fitting import budget  # noqa: E402
from export.int8 import layer_nodes, layer_table  # noqa: E402
from export.onnx import export_onnx  # noqa: E402
from export.options import BundleOptions  # noqa: E402
from export.plan_graphs import plan_nodes, write_plan_graph  # noqa: E402
from export.quantisation import Quantisation, quantisation_name  # noqa: E402
from export.sensitivity import chosen, predicted_error  # noqa: E402
from export.symmetric import FORMATS  # noqa: E402
from export.trt_build import Rows, build_plan  # noqa: E402
from export.trt_layers import check_layers  # noqa: E402
from export.trt_rtx import _set_targets, build_plans, check_capabilities  # noqa: E402
from export.write import write_bundle  # noqa: E402
from fastgen.cli.certifying import ensure_certified  # noqa: E402
from fastgen.engines import create_engine  # noqa: E402
from fastgen.engines.cache.artifacts import artifacts, bundled  # noqa: E402
from fastgen.engines.machine import Driver, Gpu  # noqa: E402
from fastgen.engines.trt import platform  # noqa: E402
from fastgen.engines.trt.platform import open_library  # noqa: E402
from fastgen.engines.trt.product import RTX  # noqa: E402
from fastgen.errors import FastgenError, InputError  # noqa: E402
from fastgen.files.records import read_record  # noqa: E402
from fastgen.generate.pipeline import Pipeline  # noqa: E402
from fastgen.models.bundle import graph_name, plan_graph, read_bundle  # noqa: E402
from fastgen.models.find import find_model  # noqa: E402
from fastgen.models.folder import load_model  # noqa: E402

pytest_plugins = ("trt_fixtures",)
DTYPES = ("int8", "fp8")
NETWORKS = [("text", "unet"), ("text", "vae_decoder"), ("labels", "unet")]
ONNX_TYPES = {"int8": onnx.TensorProto.INT8, "fp8": onnx.TensorProto.FLOAT8E4M3FN}


@pytest.fixture(scope="module")
def models(text_model, label_model):
    return {"text": load_model(text_model), "labels": load_model(label_model)}


@pytest.fixture(scope="session")
def plan_bundle(lowered_bundle, text_model, label_model, once):
    """(kind, dtype) -> the bundle of that kind with the graphs that TensorRT builds plans in `dtype` from."""
    folders = {"text": text_model, "labels": label_model}

    def get(kind: str, dtype: str) -> Path:
        def fill(folder: Path) -> None:
            shutil.copytree(lowered_bundle(kind, "fp16"), folder)
            write_bundle(folders[kind], folder, BundleOptions(dtype=dtype, plans=True), False, lambda line: None)

        return once(f"plans-{kind}-{dtype}", fill)

    return get


@pytest.fixture(autouse=True)
def _as_written(monkeypatch):
    """onnxruntime executes graphs as they stand: its optimiser moves transposes into pairs in fp8, which it cannot compute."""
    session = ort.InferenceSession

    def plain(path: Any, options: Any = None, **more: Any) -> Any:
        options = options or ort.SessionOptions()
        if "-fp16" in str(path):
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        return session(path, options, **more)

    monkeypatch.setattr(ort, "InferenceSession", plain)


def outputs(graph: Path, signature: Any, rows: Any) -> np.ndarray:
    """What onnxruntime computes on the CPU, one row of the outputs after another."""
    session = ort.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    feed = {t.name: np.concatenate([row[i] for row in rows]) for i, t in enumerate(signature.inputs)}
    return session.run(None, feed)[0].reshape(-1).astype(np.float64)


def distances(expected: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    """Cosine, and relative L2."""
    cosine = expected @ found / np.linalg.norm(expected) / np.linalg.norm(found)
    return float(cosine), float(np.linalg.norm(expected - found) / np.linalg.norm(expected))


def quantised_products(model: Any) -> dict[str, tuple[str, str]]:
    """Node -> the names of the 8-bit tensors of its input and its weights, for products with both from DequantizeLinear."""
    made = {output: node for node in model.graph.node for output in node.output}
    found = {}
    for node in model.graph.node:
        sources = [made.get(name) for name in node.input[:2]]
        if node.op_type in ("Conv", "MatMul", "Gemm") and all(s and s.op_type == "DequantizeLinear" for s in sources):
            found[node.name] = tuple(s.input[0] for s in sources)
    return found


# The formats


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=40).filter(lambda v: max(map(abs, v)) > 1e-3))
def test_rounding_is_symmetric_keeps_zero_and_cuts_nothing_off(values):
    x = np.array([0.0, *values, *(-v for v in values)], np.float32)
    largest = float(np.abs(x).max())
    for format in FORMATS.values():
        scale = format.scale(largest)
        assert scale.dtype == np.float16
        assert float(scale) * format.largest >= largest
        restored = format.quantised(x, scale).numpy().astype(np.float32) * np.float32(scale)
        step = float(scale) / 2 if format.name == "int8" else np.maximum(np.abs(x) / 16, float(scale) * 2**-10)
        assert (np.abs(restored - x) <= step * 1.001).all()
        assert restored[0] == 0
        count = len(values)
        np.testing.assert_array_equal(restored[1 : 1 + count], -restored[1 + count :])
        emulated = format.rounding.inputs(torch.from_numpy(x), (float(x.min()), float(x.max()))).numpy()
        assert np.abs(emulated - x).max() <= (largest / 127 / 2 if format.name == "int8" else largest / 16) * 1.001


def test_the_smallest_magnitudes_have_a_scale():
    for format in FORMATS.values():
        assert (format.scale(np.array([0.0, 1e-30, 1e-7], np.float32)) > 0).all()


def test_fp8_is_for_layers_whose_channels_tensor_cores_take():
    sizes = [(64, 64), (4, 64), (64, 3), (48, 24)]
    layers = [torch.nn.Conv2d(*size, 3) for size in sizes]
    assert [FORMATS["fp8"].fits(layer) for layer in layers] == [True, False, False, False]
    assert all(FORMATS["int8"].fits(layer) for layer in layers)


# The graphs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "network"), NETWORKS)
def test_graphs_hold_symmetric_pairs_around_exactly_the_layers_of_the_table(plan_bundle, models, dtype, kind, network):
    bundle, graph = read_bundle(plan_bundle(kind, dtype)), plan_graph(dtype)
    table = read_record(bundle.file(quantisation_name(network, graph)), Quantisation)
    layers = {layer.name for layer in table.layers if layer.quantised}
    assert layers
    assert table.predicted <= table.budget
    module = models[kind].networks()[network]
    nodes = layer_nodes(module, bundle.network(network, "fp16"), np.float16)
    model = onnx.load(bundle.network(network, graph))
    onnx.checker.check_model(model)
    found = quantised_products(model)
    assert set(found) == {node for layer in layers for node in nodes[layer]}
    types = {i.name: i for i in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        scale, zero = types[node.input[1]], types[node.input[2]]
        assert (scale.data_type, zero.data_type) == (onnx.TensorProto.FLOAT16, ONNX_TYPES[dtype])
        assert not any(zero.raw_data)
        weights = node.input[0] in types
        assert list(scale.dims) == ([] if dtype == "fp8" or not weights else [len(zero.raw_data)])
    for _, weight in found.values():
        assert types[weight].data_type == ONNX_TYPES[dtype]
    sizes = [(bundle.folder / f"{graph_name(network, which)}.data").stat().st_size for which in (graph, "fp16")]
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "network"), NETWORKS)
def test_they_compute_what_fp32_does_and_the_table_predicts_the_difference(plan_bundle, models, dtype, kind, network):
    bundle = read_bundle(plan_bundle(kind, dtype))
    rows = calibrate(models[kind], calibration_requests(None, bundle.spec.condition)).rows[network]
    signature, some = bundle.spec.signatures[network], stratified(rows, 8)
    graphs = bundle.network(network), bundle.network(network, plan_graph(dtype))
    cosine, relative = distances(*(outputs(graph, signature, some) for graph in graphs))
    table = read_record(bundle.file(quantisation_name(network, plan_graph(dtype))), Quantisation)
    assert cosine >= 0.995
    assert 0.5 * table.predicted < relative < 1.7 * table.predicted


def test_a_bundle_without_fp16_graphs_gets_them_too(
    exports, label_model, plan_bundle, graph_once, tmp_path, monkeypatch
):
    monkeypatch.setattr("export.plan_graphs.export_onnx", graph_once)
    folder = shutil.copytree(exports("labels")[0], tmp_path / "bundle")
    write_bundle(label_model, folder, BundleOptions(dtype="fp8", plans=True), False, lambda line: None)
    name = "unet/model.fp8-fp16.onnx"
    assert read_bundle(folder).files[name] == read_bundle(plan_bundle("labels", "fp8")).files[name]
    assert not list(folder.rglob("*half*"))
    assert "unet/model.fp16.onnx" not in read_bundle(folder).files


def test_a_bundle_gets_them_once_beside_those_of_a_cpu(plan_bundle, label_model, tmp_path):
    folder = shutil.copytree(plan_bundle("labels", "int8"), tmp_path / "bundle")
    lines: list[str] = []
    before = read_bundle(folder)
    before.verify("int8")
    options = BundleOptions(dtype="int8", plans=True)
    write_bundle(label_model, folder, options, False, lines.append)
    assert lines == [f"{folder} holds these weights already"]
    assert read_bundle(folder).sha256 == before.sha256
    with pytest.raises(InputError, match=r"has no int8 graph of unet; .* --dtype int8`"):
        before.network("unet", "int8")
    with pytest.raises(InputError, match=r"has no fp8-fp16 graph of unet; .* --dtype fp8 --rtx`"):
        before.network("unet", plan_graph("fp8"), RTX.option)
    stray = folder / "unet/model.fp8-fp16.onnx"  # a killed export left it
    stray.write_bytes(b"half")
    write_bundle(label_model, folder, BundleOptions(dtype="fp8", plans=True), False, lines.append)
    held = read_bundle(folder)
    held.verify("fp8")
    assert {"unet/model.fp8-fp16.onnx", "unet/model.fp8-fp16.json", "unet/model.int8-fp16.onnx"} <= set(held.files)
    assert not any(name.startswith("vae_encoder/model.fp8") for name in held.files)


@pytest.mark.slow
@pytest.mark.parametrize("network", ["unet", "vae_decoder"])
def test_the_model_in_the_box_keeps_its_cosine_in_both_formats(network, tmp_path):
    model = load_model(find_model("iclevr-64").folder)
    module, signature = model.networks()[network], model.spec.signatures[network]
    seen = calibrate(model, calibration_requests(None, model.spec.condition))
    rows, spans = seen.rows[network], seen.spans[network]
    for dtype in ("fp32", "fp16"):
        export_onnx(module, signature, tmp_path / f"{dtype}.onnx", dtype)
    some = stratified(rows, 16)
    expected = outputs(tmp_path / "fp32.onnx", signature, some)
    limit = budget(network, model.spec.sampling.guidance_scale)
    for dtype in DTYPES:
        format, half = FORMATS[dtype], tmp_path / "fp16.onnx"
        nodes = plan_nodes(module, half, format)
        found = chosen(layer_table(module, network, rows, spans, nodes, format.rounding), limit)
        table = Quantisation(limit, predicted_error(found), tuple(found))
        write_plan_graph(network, spans, half, tmp_path, table, nodes, format)
        cosine, relative = distances(
            expected, outputs(tmp_path / graph_name(network, plan_graph(dtype)), signature, some)
        )
        print(f"{network} {dtype}: {table.summary(dtype)}; cosine {cosine:.5f}, relative {relative:.4f}")
        assert cosine >= 0.995
        # The budget falls with the guidance scale, which multiplies the UNet's error: at guidance 4 fewer layers fit.
        assert sum(layer.products for layer in table.layers if layer.quantised) > 0.8


# The real builder, which needs no card


def real_report(graph: Path, signature: Any, dtype: str, cards: list[str]) -> tuple[list[str], set[str]]:
    """The builder's lines about the plan's layers, and the ONNX names of the layers in eight bits of the network."""
    library = open_library(RTX)
    trt, texts, found = library.trt, [], []

    class Log(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            texts.append(text)
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(text)

    library = replace(library, log=Log())

    def prepare(config: Any) -> None:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        _set_targets(library, cards, "unet", config)

    found = build_plan(library, graph, signature, dtype, Rows(1, 8, 8), "unet", lambda line: None, prepare)
    (report,) = {text for text in texts if text.startswith("Layers:")}
    return report.splitlines(), found.products.quantised


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "network"), [("labels", "unet"), pytest.param("text", "vae_decoder", marks=pytest.mark.slow)]
)
def test_the_real_builder_computes_the_chosen_layers_in_eight_bits(plan_bundle, dtype, kind, network):
    pytest.importorskip("tensorrt_rtx")
    bundle = read_bundle(plan_bundle(kind, dtype))
    graph = bundle.network(network, plan_graph(dtype))
    cards = ["8.0", "8.9"] if dtype == "int8" else ["8.9", "12.0"]
    lines, quantised = real_report(graph, bundle.spec.signatures[network], dtype, cards)
    expected = set(quantised_products(onnx.load(graph)))
    assert expected <= quantised
    word = {"int8": "Int8", "fp8": "FP8"}[dtype]
    executed = set()
    for line in lines:
        kind_of = re.search(r"LayerType: (\w+)", line)
        if kind_of and kind_of[1] in ("correlation", "gemm"):
            names = set(re.findall(r"\[ONNX Layer: ([^\]]*)\]", line)) & expected
            inputs = re.findall(r"Datatype: (\w+)", line.partition("Constants:")[0])
            if names and word in inputs:
                executed |= names
    convolutions = {node.name for node in onnx.load(graph).graph.node if node.op_type == "Conv"} & expected
    assert convolutions or network == "vae_decoder"  # the tiny one's channels are not enough for fp8
    assert convolutions <= executed
    assert executed


@pytest.mark.parametrize("dtype", DTYPES)
def test_plans_of_the_real_builder_lie_in_the_bundle(plan_bundle, dtype, tmp_path, capfd):
    pytest.importorskip("tensorrt_rtx")
    folder = shutil.copytree(plan_bundle("labels", dtype), tmp_path / "bundle")
    capfd.readouterr()
    held = build_plans(read_bundle(folder), dtype=dtype, batch_sizes=[2])
    (artifact,) = bundled(held)
    artifact.verify()
    fields = artifact.recipe.fields
    assert (fields["network"], fields["dtype"]) == ("unet", dtype)
    assert fields["graph_sha256"] == held.files[f"unet/model.{dtype}-fp16.onnx"].sha256
    assert fields["compute_capabilities"] == ("8.0 8.6 8.9 12.0" if dtype == "int8" else "8.9 12.0")
    assert capfd.readouterr() == ("", "")


def test_the_real_parser_finds_a_graph_without_the_pairs(plan_bundle, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    bundle = read_bundle(plan_bundle("labels", "int8"))
    signature = bundle.spec.signatures["unet"]
    with pytest.raises(FastgenError, match="unet: the graph has no layer in int8"):
        real_report(bundle.network("unet", "fp16"), signature, "int8", ["8.9"])
    with pytest.raises(FastgenError, match="unet: the graph has no layer in fp8"):
        real_report(bundle.network("unet", "int8-fp16"), signature, "fp8", ["8.9"])
    with pytest.raises(FastgenError, match=r"unet: the graph does not compute in int8: .* is FLOAT"):
        real_report(bundle.network("unet"), signature, "int8", ["8.9"])
    model = onnx.load(bundle.network("unet", "int8-fp16"))
    half = onnx.load(bundle.network("unet", "fp16"))
    name = next(iter(quantised_products(model)))
    node, original = (next(n for n in m.graph.node if n.name == name) for m in (model, half))
    node.input[1] = original.input[1]  # its weights are fp16 again, its input is still rounded
    model.graph.initializer.append(next(i for i in half.graph.initializer if i.name == original.input[1]))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(FastgenError, match="unet: the graph has pairs around no layer in int8"):
        real_report(tmp_path / "model.onnx", signature, "int8", ["8.9"])


# The engines, over doubles whose plans onnxruntime computes


@pytest.mark.parametrize("dtype", DTYPES)
def test_engine_trt_builds_runs_and_is_certified(card, plan_bundle, export_few, tmp_path, dtype):
    folder = shutil.copytree(plan_bundle("labels", dtype), tmp_path / "bundle")
    lines: list[str] = []
    options: dict[str, Any] = {"dtype": dtype, "trt": True, "batch_sizes": [2], "engines": ["ort"]}
    certificate = export_few(folder, folder, **options, say=lines.append)[-1]
    assert (certificate.engine, certificate.dtype) == ("trt", dtype)
    assert certificate.passed, certificate.table()
    unet = certificate.rows[0]
    assert (unet.what, unet.allowed) == ("unet", "cosine >= 0.995")
    assert 1e-3 < unet.relative_l2 < 0.1
    assert {(a.recipe.fields["network"], a.recipe.fields["dtype"]) for a in artifacts("trt")} == {("unet", dtype)}
    assert any(re.search(rf"(\d+) of \1 quantised layers execute {dtype}", line) for line in lines)


@pytest.mark.parametrize("dtype", DTYPES)
def test_engine_trt_rtx_finds_its_plan_and_is_certified_once(rtx_card, plan_bundle, tmp_path, dtype):
    folder = shutil.copytree(plan_bundle("labels", dtype), tmp_path / "bundle")
    build_plans(read_bundle(folder), dtype=dtype, batch_sizes=[2])
    bundle = read_bundle(folder)
    for asked in (dtype, None):  # the only precision that there are plans in
        engine = create_engine("trt-rtx", bundle, dtype=asked)
        assert (engine.dtype, engine.executed("unet"), engine.executed("text_encoder")) == (dtype, dtype, "fp32")
    lines: list[str] = []
    ensure_certified(Pipeline(bundle, engine), lines.append)
    assert "certified" in lines[1]
    ensure_certified(Pipeline(bundle, engine), lines.append)
    assert len(lines) == 2
    with pytest.raises(InputError, match="has no bf16 graph of unet"):
        create_engine("trt-rtx", bundle, dtype="bf16").recipe("unet", None)


def test_a_miss_names_the_worst_layers_of_the_graph_for_tensorrt(card, plan_bundle, tmp_path, monkeypatch):
    from trt_helpers import build

    folder = shutil.copytree(plan_bundle("labels", "fp8"), tmp_path / "bundle")
    bundle = read_bundle(folder)
    build(bundle, dtype="fp8")
    monkeypatch.setitem(certify.__globals__["MIN_COSINE"], "fp8", 0.9999999)
    certificate = certify(create_engine("trt", bundle, dtype="fp8"), bundle, ["unet"])
    assert not certificate.passed
    table = read_record(bundle.file("unet/model.fp8-fp16.json"), Quantisation)
    assert f"the layers in fp8 that change it most: {table.worst()[0].name}" in certificate.table()


def conv(name: str, dtype: str) -> dict[str, Any]:
    metadata = {"LayerType": "CaskConvolution", "Name": name, "Metadata": f"[ONNX Layer: {name}]"}
    return metadata | {"Inputs": [{"Format/Datatype": dtype}]}


def test_a_plan_that_computes_its_quantised_layers_in_fp16_is_not_taken_silently():
    import json

    lines: list[str] = []

    def check(*layers: dict[str, Any], dtype: str = "int8") -> None:
        check_layers(json.dumps({"Layers": layers}), dtype, (), "unet", lines.append, {"a", "b"})

    check(conv("a", "Int8"), conv("b", "Half"), conv("c", "Half"))
    check(conv("a", "FP8"), conv("b", "Channel major FP8 format"), dtype="fp8")
    assert lines == ["unet: 1 of 2 quantised layers execute int8", "unet: 2 of 2 quantised layers execute fp8"]
    with pytest.raises(FastgenError, match="executes none of its 2 quantised layers in int8"):
        check(conv("a", "Half"), conv("b", "Half"), conv("c", "Half"))
    with pytest.raises(FastgenError, match=r"does not execute int8: c .* executes int8"):
        check(conv("a", "Int8"), conv("c", "Int8"))
    with pytest.raises(FastgenError, match=r"does not execute fp8: b .* executes fp32"):
        check(conv("a", "FP8"), conv("b", "Float"), dtype="fp8")


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "fp8"], "--dtype fp8 is for TensorRT engines; give --trt or --rtx too"),
        (["--dtype", "int8", "--triton", "r"], "--dtype int8 is for fastgen's own engines; --triton takes"),
        (["--dtype", "fp8", "--rtx", "--triton", "r"], "--dtype fp8 is for fastgen's own engines"),
        (["--dtype", "fp8", "--rtx", "--capabilities", "8.9,8.6"], "8.6 has no fp8, which needs 8.9; use --dtype fp16"),
        (["--dtype", "int8", "--rtx"], "has no int8-fp16 graph of unet; `fastgen export MODEL --out"),
        (["--dtype", "fp8", "--engine", "ort:fp8", "--rtx"], "engine ort executes fp32, fp16, int8, not fp8"),
        (["--calibration", "no.json", "--rtx"], "--calibration is for graphs in eight bits; give --dtype int8 too"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line(rtx_card, fastgen, half_copy, options, message):
    before = read_bundle(half_copy).sha256
    code, _, err = fastgen("export", half_copy, *options)
    assert (code, err.count("\n")) == (2, 1), err
    assert message in err
    assert read_bundle(half_copy).sha256 == before


def test_fp8_is_refused_before_the_build_on_a_card_before_ada(card, plan_bundle, monkeypatch):
    from trt_helpers import build

    old = replace(card, compute_capability="8.6")
    monkeypatch.setattr(platform, "open_gpu", lambda device, product=None: old)
    bundle = read_bundle(plan_bundle("labels", "fp8"))
    with pytest.raises(InputError, match=r"8\.6\) has no fp8, which needs 8\.9: use --dtype fp16"):
        build(bundle, dtype="fp8")


@pytest.mark.parametrize(
    ("cards", "refused"), [(["8.6"], True), (["7.5", "8.6"], True), (["8.6", "8.9"], False), ([], False)]
)
def test_fp8_is_refused_before_the_export_where_no_card_has_it(label_model, tmp_path, monkeypatch, cards, refused):
    found = [Gpu(f"Card {capability}", 8192, capability) for capability in cards]
    monkeypatch.setattr(export.bundle, "gpus", lambda: (found, Driver("580.0", "13.0")))
    monkeypatch.setattr(export.bundle, "write_bundle", Mock(side_effect=FastgenError("the export begins")))
    refusal = rf"Card {cards[0]} .* has no fp8, which needs 8\.9: use --dtype fp16" if refused else "the export begins"
    with pytest.raises(FastgenError, match=refusal):
        export.bundle.export(label_model, tmp_path / "bundle", dtype="fp8", trt=True)


def test_the_default_cards_are_those_that_have_the_precision():
    assert check_capabilities(None, "int8") == ["8.0", "8.6", "8.9", "12.0"]
    assert check_capabilities(None, "fp8") == ["8.9", "12.0"]
    assert check_capabilities(["12.0", "8.9"], "fp8") == ["8.9", "12.0"]


@pytest.mark.parametrize("engine", ["ort", "openvino"])
def test_other_engines_have_no_fp8(fastgen, plan_bundle, tmp_path, engine):
    pytest.importorskip("onnxruntime" if engine == "ort" else engine)
    options = ("--labels", "red cube", "--model", plan_bundle("labels", "fp8"), "--engine", engine, "--dtype", "fp8")
    code, _, err = fastgen("generate", *options, "--out", tmp_path / "x.png")
    assert (code, err.count("\n")) == (2, 1), err
    assert "not fp8" in err
