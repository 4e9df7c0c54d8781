"""`export --weights fp16`: half the bytes, the same networks but for the rounding of their weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from safetensors.numpy import load_file  # noqa: E402
from test_export import contents  # noqa: E402

from export.half_weights import SMALLEST, halve_weights  # noqa: E402
from fastgen.engines import create_engine, missing_packages  # noqa: E402
from fastgen.errors import InputError  # noqa: E402
from fastgen.files.jsonfiles import read_json  # noqa: E402
from fastgen.models.bundle import read_bundle  # noqa: E402

FLOAT, FLOAT16, INT8 = 1, 10, 3  # of onnx.TensorProto
COMPUTED = ("reference.safetensors", "reference.bf16.json")  # by eager, from the weights as they are in the model
ENGINES = [
    "ort",
    pytest.param("openvino", marks=pytest.mark.skipif(bool(missing_packages("openvino")), reason="no openvino")),
]


@pytest.fixture
def models(text_model, label_model):
    return {"text": text_model, "labels": label_model}


@pytest.fixture(scope="session")
def half_bundle(text_model, label_model, export_few, graph_once, once):
    """kind -> a bundle with weights in fp16, certified with ort and openvino."""

    def get(kind: str) -> Path:
        def fill(folder: Path) -> None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("export.onnx.export_onnx", graph_once)
                model = {"text": text_model, "labels": label_model}[kind]
                for certificate in export_few(model, folder / "bundle", weights="fp16"):
                    assert certificate.passed, certificate.table()

        return once(f"half-{kind}", fill) / "bundle"

    return get


def large(graph: Path) -> dict[str, int]:
    """Name -> element type of the weights that are no small ones: no tables of indices, no masks."""
    initializers = onnx.load(graph, load_external_data=False).graph.initializer
    weights = {i.name: i.data_type for i in initializers if np.prod(i.dims) >= SMALLEST}
    return {name: dtype for name, dtype in weights.items() if dtype in (FLOAT, FLOAT16, INT8)}


@pytest.mark.parametrize("kind", ["text", "labels"])
def test_all_large_weights_are_in_fp16_and_everything_else_stays(kind, exports, half_bundle):
    whole, half = exports(kind)[0], half_bundle(kind)
    graphs = [path.relative_to(half) for path in half.rglob("*.onnx")]
    assert graphs
    assert sum(len(large(whole / graph)) for graph in graphs) > 10
    for graph in graphs:
        assert set(large(half / graph).values()) <= {FLOAT16}
        assert len(large(half / graph)) == len(large(whole / graph))
        bytes_ = [(folder / graph.parent / "model.onnx.data").stat().st_size for folder in (half, whole)]
        assert bytes_[0] < 0.65 * bytes_[1]  # these networks are small: many of their weights are
    assert sorted(path.relative_to(whole) for path in whole.rglob("*")) == sorted(
        path.relative_to(half) for path in half.rglob("*")
    )
    halved = contents(half)
    differing = {
        name for name, sha in contents(whole).items() if halved[name] != sha and not name.endswith((".onnx", ".data"))
    }
    assert {name for name in differing if "certif" not in name} <= {"bundle.json", *COMPUTED}
    expected, found = (load_file(folder / COMPUTED[0]) for folder in (whole, half))
    assert found.keys() == expected.keys()
    for name, values in expected.items():  # two runs of eager may differ in their last bits
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-5, err_msg=name)
    read_bundle(half).verify()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["text", "labels"])
def test_an_engine_computes_in_fp32_with_the_rounded_weights(engine, kind, models, half_bundle):
    """Eager with the same weights rounded is the reference; the subpixel sums of upsamplers are rounded a second time."""
    from fastgen.models.folder import load_model

    bundle, model = read_bundle(half_bundle(kind)), load_model(models[kind])
    runtime = create_engine(engine, bundle, dtype="fp32")
    generator = np.random.default_rng(0)
    for name, module in model.networks().items():
        for parameter in module.parameters():
            if parameter.numel() >= SMALLEST:
                parameter.data = parameter.data.half().float()
        signature = bundle.spec.signatures[name]
        inputs = signature.sample_inputs(2, generator)
        with torch.inference_mode():
            expected = module(*(torch.from_numpy(inputs[t.name]) for t in signature.inputs))
        expected = expected[0] if isinstance(expected, tuple) else expected
        found = runtime.numpy(runtime.run(name, *(runtime.array(inputs[t.name]) for t in signature.inputs))[0])
        difference = np.abs(found - expected.numpy()).max() / np.abs(expected.numpy()).max()
        assert difference < 2e-5, name


def test_weights_that_fp16_cannot_hold_stay(tmp_path):
    generator = np.random.default_rng(0)
    large_, plain = generator.standard_normal((2, 64, 64)).astype(np.float32)
    large_[3, 5] = 1e5
    weights = [onnx.numpy_helper.from_array(value, name) for name, value in (("a", large_), ("b", plain))]
    nodes = [onnx.helper.make_node("MatMul", ["x", "a"], ["y"]), onnx.helper.make_node("MatMul", ["y", "b"], ["z"])]
    ends = [onnx.helper.make_tensor_value_info(name, 1, ["batch", 64]) for name in ("x", "z")]
    graph = onnx.helper.make_graph(nodes, "two", ends[:1], ends[1:], weights)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    halve_weights(path)
    assert sorted(large(path).items()) == [("a", FLOAT), ("b.fp16", FLOAT16)]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    x = generator.standard_normal((3, 64)).astype(np.float32)
    (found,) = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    np.testing.assert_allclose(found, x @ large_ @ plain.astype(np.float16).astype(np.float32), rtol=1e-4, atol=10)


@pytest.mark.usefixtures("_graphs_once")
def test_a_bundle_keeps_its_weights_precision_and_gets_eight_bits(half_bundle, label_model, export_few, tmp_path):
    folder = shutil.copytree(half_bundle("labels"), tmp_path / "bundle")
    assert read_json(folder / "bundle.json")["weights"] == "fp16"
    with pytest.raises(InputError, match="holds weights in fp16; --overwrite exports it again, in fp32"):
        export_few(label_model, folder, weights="fp32")
    with pytest.raises(InputError, match="is a bundle with weights in fp16; give the model folder"):
        export_few(folder, folder, weights="fp32")
    before = contents(folder)
    certificates = export_few(label_model, folder, dtype="int8", engines=["ort:int8"])
    assert certificates[0].rows[0].what == "unet"
    assert certificates[0].rows[0].passed
    after = contents(folder)
    assert {name for name in before if after[name] != before[name]} <= {
        "bundle.json",
        *(name for name in before if name.startswith("certificates/")),
    }
    assert not (folder / "whole").exists()
    assert INT8 in (types := large(folder / "unet/model.int8.onnx").values())
    assert FLOAT not in types
    bundle = read_bundle(folder)
    assert bundle.weights == "fp16"
    bundle.verify("int8")


def test_a_bundle_in_fp32_is_not_halved_unasked(label_bundle, label_model, export_few, tmp_path):
    folder = shutil.copytree(label_bundle, tmp_path / "bundle")
    assert "weights" not in read_json(folder / "bundle.json")
    with pytest.raises(InputError, match="holds weights in fp32; --overwrite exports it again, in fp16"):
        export_few(label_model, folder, weights="fp16")


def test_a_miss_says_that_the_weights_are_rounded(half_bundle, monkeypatch, tmp_path):
    from export.certificate import ROUNDED, certify

    monkeypatch.setattr("export.certificate.MIN_PSNR_DB", 200.0)
    bundle = read_bundle(half_bundle("labels"))
    certificate = certify(create_engine("ort", bundle), bundle, folder=tmp_path)
    assert not certificate.passed
    assert certificate.advice == [ROUNDED]
    assert {row.what: row.allowed for row in certificate.rows} == {
        "unet": "cosine >= 0.9999, as its weights are in fp16",
        "images": "PSNR >= 200 dB",
    }


def test_scales_and_weights_that_would_vanish_stay(tmp_path):
    generator = np.random.default_rng(0)
    weights = generator.integers(-127, 128, (64, 2048)).astype(np.int8)
    scales = np.geomspace(1e-8, 1e-2, 2048).astype(np.float32)
    tiny = (generator.standard_normal((2048, 64)) * 1e-7).astype(np.float32)
    values = {"w": weights, "scale": scales, "zero": np.zeros(2048, np.int8), "tiny": tiny}
    nodes = [
        onnx.helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["whole"], axis=1),
        onnx.helper.make_node("MatMul", ["x", "whole"], ["y"]),
        onnx.helper.make_node("MatMul", ["y", "tiny"], ["z"]),
    ]
    ends = [onnx.helper.make_tensor_value_info(name, 1, ["batch", 64]) for name in ("x", "z")]
    stored = [onnx.numpy_helper.from_array(value, name) for name, value in values.items()]
    graph = onnx.helper.make_graph(nodes, "quantised", ends[:1], ends[1:], stored)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    path = tmp_path / "model.int8.onnx"
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0)
    halve_weights(path)
    assert large(path) == {"w": INT8, "scale": FLOAT, "zero": INT8, "tiny": FLOAT}


def test_bounds_are_those_of_the_weights_that_an_engine_reads(half_bundle, label_bundle, label_model):
    from export.certificate import _stored_in_half
    from fastgen.models.folder import load_model

    def on_a_card(dtype: str) -> SimpleNamespace:
        graphs = ("fp16", "bf16", "int8", "fp8")
        return SimpleNamespace(
            executed=lambda name: dtype, lowered_graphs=graphs, source_kind="bundle", built_by="--trt"
        )

    half, whole = read_bundle(half_bundle("labels")), read_bundle(label_bundle)
    assert _stored_in_half(create_engine("ort", half), half, "unet")
    assert not _stored_in_half(create_engine("eager", load_model(label_model), dtype="fp32"), half, "unet")
    assert not _stored_in_half(create_engine("ort", whole), whole, "unet")
    assert [dtype for dtype in ("fp32", "fp16", "bf16", "int8") if _stored_in_half(on_a_card(dtype), half, "unet")] == [
        "fp32"
    ]


def test_another_precision_of_weights_is_refused(label_model, export_few, tmp_path):
    with pytest.raises(InputError, match="weights 'bf16'"):
        export_few(label_model, tmp_path / "bundle", weights="bf16")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.usefixtures("_graphs_once")
def test_what_overwriting_drops_is_said(half_bundle, label_model, export_few, tmp_path):
    folder = shutil.copytree(half_bundle("labels"), tmp_path / "bundle")
    lines: list[str] = []
    export_few(label_model, folder, overwrite=True, engines=["ort"], say=lines.append)
    expected = (
        f"--overwrite: {folder} had weights in fp16; the new bundle has not, unless the same options are given again"
    )
    assert expected in lines
    assert read_bundle(folder).weights == "fp32"
