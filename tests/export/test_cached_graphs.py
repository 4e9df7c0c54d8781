"""`fastgen export --feature-cache`: the graphs of a split UNet, and the engines that run them."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import numpy as np
import pytest

from fastgen import load
from fastgen.engines import base
from fastgen.errors import InputError
from fastgen.models.bundle import read_bundle

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.usefixtures("_graphs_once")
W, S = "unet_whole", "unet_shallow"
ENGINES = ["ort", "openvino"]
KINDS = ["text", "labels"]


@pytest.fixture(scope="session")
def split_bundle(exports, text_model, label_model, export_few, once):
    """kind -> a copy of the bundle of that kind to which `--feature-cache` added its graphs."""
    models = {"text": text_model, "labels": label_model}

    def get(kind):
        def fill(folder):
            shutil.copytree(exports(kind)[0], folder)
            export_few(models[kind], folder, feature_cache=True, engines=["ort"])

        return once(f"{kind}-split", fill)

    return get


def guided_inputs(engine, network, batch):
    sample, timestep, *conds = engine.samples(network, batch)
    return sample, timestep, *(np.concatenate([-c if c.dtype == np.float32 else c, c]) for c in conds)


def images(pipeline, kind, seeds=(1, 2, 3), **settings):
    prompts = ["a red dragon", "a blue slime", "a robot"][: len(seeds)]
    labels = [["red cube"], ["gray cube", "red sphere"], ["blue cube"]][: len(seeds)]
    given = {"prompts": prompts} if kind == "text" else {"labels": labels}
    return np.stack([np.asarray(image) for image in pipeline.generate(**given, seeds=list(seeds), **settings)])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_with_its_own_deep_feature_the_shallow_graph_is_the_whole_one(split_bundle, kind, engine, batch):
    pytest.importorskip("openvino" if engine == "openvino" else "onnxruntime")
    engine = load(split_bundle(kind), engine, dtype="fp32", threads=2).engine
    sample, timestep, *cond = engine.samples("unet", batch)
    expected = engine.run("unet", sample, timestep, *cond)[0]
    prediction, deep = engine.run(W, sample, timestep, *cond)
    assert np.abs(prediction - expected).max() < 1e-5
    assert np.abs(engine.run(S, sample, timestep, *cond, deep)[0] - prediction).max() < 1e-5
    assert np.abs(engine.run(S, sample, timestep, *cond, deep + 1)[0] - prediction).max() > 1e-4


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_guided_batch_is_what_two_batches_would_be(split_bundle, kind, engine, batch):
    pytest.importorskip("openvino" if engine == "openvino" else "onnxruntime")
    engine = load(split_bundle(kind), engine, dtype="fp32", threads=2).engine
    for network in (W, S):
        inputs = guided_inputs(engine, network, batch)
        outputs = engine.run_halves(network, *inputs)
        both = base.Engine.run_halves(engine, network, *inputs)
        assert len(outputs) == len(both) == (2 if network == W else 1)
        for found, expected in zip(outputs, both, strict=True):
            assert found.shape == expected.shape
            assert np.abs(found - expected).max() < 1e-5
        assert np.abs(both[0][:batch] - both[0][batch:]).max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ENGINES)
def test_images_are_those_of_eager(request, split_bundle, kind, engine):
    pytest.importorskip("openvino" if engine == "openvino" else "onnxruntime")
    eager = load(request.getfixturevalue(f"{kind.removesuffix('s')}_model"), "eager")
    pipeline = load(split_bundle(kind), engine, dtype="fp32")
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "cache_interval": 2, "scheduler": "ddim"}
    found, expected = images(pipeline, kind, **settings).astype(int), images(eager, kind, **settings).astype(int)
    assert np.abs(found - expected).max() <= 2
    assert np.abs(found - images(eager, kind, **settings | {"cache_interval": 1})).max() > 2


@pytest.mark.parametrize("engine", ENGINES)
def test_half_of_the_evaluations_are_shallow(split_bundle, engine, monkeypatch):
    pytest.importorskip("openvino" if engine == "openvino" else "onnxruntime")
    pipeline = load(split_bundle("text"), engine, dtype="fp32")
    calls, forward = Counter(), pipeline.engine.run_halves

    def counted(network, *inputs):
        calls[network] += 1
        return forward(network, *inputs)

    monkeypatch.setattr(pipeline.engine, "run_halves", counted)
    images(pipeline, "text", num_inference_steps=6, cache_interval=2)
    assert calls == {W: 3, S: 3}
    images(pipeline, "text", num_inference_steps=6, cache_interval=1)
    assert calls == {W: 3, S: 3, "unet": 6}


@pytest.mark.parametrize("engine", ENGINES)
def test_without_caching_the_graphs_change_no_byte(split_bundle, text_bundle, engine):
    pytest.importorskip("openvino" if engine == "openvino" else "onnxruntime")
    with_graphs, without = load(split_bundle("text"), engine, dtype="fp32"), load(text_bundle, engine, dtype="fp32")
    plain = images(without, "text", num_inference_steps=3)
    assert np.array_equal(images(with_graphs, "text", num_inference_steps=3), plain)
    assert np.array_equal(images(with_graphs, "text", num_inference_steps=3, cache_interval=1), plain)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_image_does_not_depend_on_its_batch(split_bundle, engine):
    pytest.importorskip("openvino" if engine == "openvino" else "onnxruntime")
    pipeline = load(split_bundle("text"), engine, dtype="fp32")
    settings = {"num_inference_steps": 4, "cache_interval": 2}
    sizes = [images(pipeline, "text", batch_size=size, **settings) for size in (1, 2, 3)]
    assert all(np.array_equal(sizes[0], other) for other in sizes[1:])


def test_a_low_precision_of_openvino_keeps_the_time_embedding_exact(split_bundle):
    openvino = pytest.importorskip("openvino")
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no bf16")
    exact, low = (load(split_bundle("text"), "openvino", dtype=dtype).engine for dtype in ("fp32", "bf16"))
    for network in (W, S):
        inputs = guided_inputs(exact, network, 2)
        found, expected = low.run_halves(network, *inputs)[0], exact.run_halves(network, *inputs)[0]
        assert np.linalg.norm(found - expected) < 0.03 * np.linalg.norm(expected)


def test_a_bundle_without_the_graphs_says_what_adds_them(fastgen, text_bundle, requests_files, tmp_path):
    words = [requests_files["text"], "--model", text_bundle, "--engine", "ort", "--out", tmp_path / "x"]
    code, _, err = fastgen("generate", *words, "--cache-interval", 2)
    assert code == 2
    assert "has no graphs for --cache-interval" in err
    assert f"`fastgen export MODEL --out {text_bundle} --feature-cache`, with the model folder, adds them" in err


def test_the_command_adds_the_graphs_once(split_bundle, text_bundle, text_model, tmp_path, export_few):
    bundle = read_bundle(split_bundle("text"))
    assert bundle.spec.deep_feature == (32, 8, 8)
    assert json.loads((bundle.folder / "bundle.json").read_text())["deep_feature"] == [32, 8, 8]
    assert bundle.spec.bundle_extends == (read_bundle(text_bundle).spec.bundle_sha256,)
    assert {"unet_whole/model.onnx", "unet_shallow/model.onnx"} <= set(bundle.files)
    shallow, whole = ((bundle.folder / name / "model.onnx.data").stat().st_size for name in (S, W))
    assert shallow < whole / 2
    bundle.verify()
    said = []
    export_few(text_model, bundle.folder, feature_cache=True, engines=["ort"], say=said.append)
    assert any("holds these weights already" in line for line in said)
    assert not any("exporting" in line for line in said)


def test_a_new_bundle_has_the_graphs_at_once(label_model, tmp_path, export_few, split_bundle):
    export_few(label_model, tmp_path / "bundle", feature_cache=True, engines=["ort"])
    new, extended = read_bundle(tmp_path / "bundle"), read_bundle(split_bundle("labels"))
    assert new.spec.deep_feature == extended.spec.deep_feature == (16, 16, 16)
    assert set(new.files) == set(extended.files)
    export_few(label_model, tmp_path / "bundle", overwrite=True, engines=["ort"])  # files that exports write
    assert read_bundle(tmp_path / "bundle").spec.deep_feature is None


def test_a_damaged_graph_is_found(split_bundle, tmp_path):
    shutil.copytree(split_bundle("labels"), tmp_path / "bundle")
    with (tmp_path / "bundle/unet_shallow/model.onnx").open("ab") as file:
        file.write(b"x")
    pipeline = load(tmp_path / "bundle", "ort", dtype="fp32")
    images(pipeline, "labels", num_inference_steps=2)  # needs it not
    with pytest.raises(InputError, match=r"unet_shallow/model\.onnx"):
        images(pipeline, "labels", num_inference_steps=2, cache_interval=2)


def test_int8_has_no_such_graphs(split_bundle):
    pipeline = load(split_bundle("labels"), "ort", dtype="int8")
    with pytest.raises(InputError, match="--cache-interval: there are no graphs in int8 for it"):
        images(pipeline, "labels", num_inference_steps=2, cache_interval=2)


def test_a_model_that_cannot_be_split_is_refused_before_the_export(monkeypatch, label_model, tmp_path, export_few):
    monkeypatch.setattr("fastgen.models.folder.why_whole", lambda unet: "it has one level")
    with pytest.raises(InputError, match="--cache-interval: it has one level, which cannot be split"):
        export_few(label_model, tmp_path / "bundle", feature_cache=True, engines=["ort"])
    assert not (tmp_path / "bundle").exists()


def test_a_certificate_holds_the_split_networks_to_the_unets_tolerance(split_bundle, tmp_path, rehash):
    from export.certificate import certify

    shutil.copytree(split_bundle("text"), tmp_path / "bundle")
    filed = json.loads((tmp_path / "bundle/certificates/ort-fp32-cpu.json").read_text())
    assert filed["passed"]
    assert {row["what"] for row in filed["rows"]} >= {"unet", W, S}
    data = tmp_path / "bundle/unet_shallow/model.onnx.data"
    data.write_bytes((np.fromfile(data, np.float32) * np.float32(1.1)).tobytes())
    rehash(tmp_path / "bundle")
    certificate = certify(load(tmp_path / "bundle", "ort").engine, read_bundle(tmp_path / "bundle"))
    assert [row.what for row in certificate.rows if not row.passed] == [S]


def test_the_doctor_checks_the_graphs_of_a_split_unet(fastgen, split_bundle, tmp_path, rehash):
    shutil.copytree(split_bundle("labels"), tmp_path / "bundle")
    assert fastgen("doctor", tmp_path / "bundle")[0] == 0
    shutil.copy(tmp_path / "bundle/unet/model.onnx", tmp_path / "bundle/unet_shallow/model.onnx")
    rehash(tmp_path / "bundle")
    code, out, err = fastgen("doctor", tmp_path / "bundle")
    assert code != 0
    assert "unet_shallow/model.onnx" in out + err


@pytest.mark.parametrize("kind", KINDS)
def test_a_bundle_states_the_share_of_the_shallow_network(
    split_bundle, text_model, label_model, export_few, kind, tmp_path
):
    from fastgen.models.folder import load_model

    model = load_model({"text": text_model, "labels": label_model}[kind])
    share = read_bundle(split_bundle(kind)).shallow_share()
    assert 0.05 < share < 0.95
    assert share == pytest.approx(model.shallow_share(), abs=1e-4)
    old = shutil.copytree(split_bundle(kind), tmp_path / "old")
    record = json.loads((old / "bundle.json").read_text())
    del record["shallow_share"], record["record_sha256"]
    (old / "bundle.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"shallow_share is missing; `fastgen export MODEL --out .* --feature-cache`"):
        read_bundle(old).shallow_share()
    export_few(model.folder, old, feature_cache=True, engines=["ort"])
    assert read_bundle(old).shallow_share() == share
