"""`fastgen export --triton`: the folders of the repository, their configs by Triton's own definition, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from export.triton import write_repository
from export.triton_config import plan_config
from export.trt import build_engines
from fastgen.engines.trt.plan import PLAN
from fastgen.models.bundle import read_bundle
from fastgen.models.signatures import Signature, TensorSpec

pytest_plugins = ("trt_fixtures",)
text_format = pytest.importorskip("google.protobuf.text_format")
ModelConfig = pytest.importorskip("tritonclient.grpc.model_config_pb2").ModelConfig
ort = pytest.importorskip("onnxruntime")
TYPES = {"tensor(float)": "TYPE_FP32", "tensor(int64)": "TYPE_INT64"}


def config_of(folder: Path):
    """config.pbtxt as Triton reads it: an unknown field, or a value of another type, is an error."""
    return text_format.Parse((folder / "config.pbtxt").read_text(), ModelConfig())


def type_of(tensor) -> str:
    field = tensor.DESCRIPTOR.fields_by_name["data_type"]
    return field.enum_type.values_by_number[tensor.data_type].name


def shape_of(tensor) -> list[int]:
    """What the backend gets after the batch."""
    return list(tensor.reshape.shape) if tensor.HasField("reshape") else list(tensor.dims)


@pytest.fixture(scope="module")
def repository(text_bundle, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("triton") / "repository"
    write_repository(read_bundle(text_bundle), folder, batch_sizes=(1, 8))
    return folder


def test_there_is_a_folder_for_each_network_and_one_that_makes_images(repository, text_bundle):
    networks = {"text_encoder", "unet", "vae_decoder", "vae_encoder"}
    assert {folder.name for folder in repository.iterdir()} == {*networks, "fastgen"}
    assert all((repository / name / "1/model.onnx").is_file() for name in networks)
    for name in networks:  # the onnx library refuses weights with several hard links, in the copy and in the bundle
        original = onnx.load(text_bundle / name / "model.onnx")
        assert onnx.load(repository / name / "1/model.onnx") == original
    held = read_bundle(repository / "fastgen/1/bundle")
    held.verify()
    assert held.sha256 == read_bundle(text_bundle).sha256
    assert {f.name for f in (held.folder / "certificates").iterdir()} == {
        f.name for f in (text_bundle / "certificates").iterdir()
    }


@pytest.mark.parametrize("name", ["text_encoder", "unet", "vae_decoder", "vae_encoder"])
def test_the_config_of_a_network_says_what_its_graph_says(repository, name):
    config = config_of(repository / name)
    session = ort.InferenceSession(repository / name / "1/model.onnx", providers=["CPUExecutionProvider"])
    for tensors, nodes in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        assert [tensor.name for tensor in tensors] == [node.name for node in nodes]
        assert [type_of(tensor) for tensor in tensors] == [TYPES[node.type] for node in nodes]
        assert [shape_of(tensor) for tensor in tensors] == [node.shape[1:] for node in nodes]
        assert all(isinstance(node.shape[0], str) for node in nodes)  # any number of rows
        assert all(tensor.dims for tensor in tensors)  # Triton has no empty dims
    assert config.backend == "onnxruntime"
    assert config.max_batch_size == {"text_encoder": 16, "unet": 16}.get(name, 8)
    assert config.HasField("dynamic_batching")
    rng, size = np.random.default_rng(0), config.max_batch_size
    feed = {
        tensor.name: np.zeros((size, *shape_of(tensor)), np.int64)
        if type_of(tensor) == "TYPE_INT64"
        else rng.standard_normal((size, *shape_of(tensor)), np.float32)
        for tensor in config.input
    }
    values = session.run(None, feed)
    assert [list(value.shape) for value in values] == [[size, *shape_of(tensor)] for tensor in config.output]


def test_the_model_that_makes_images_is_decoupled_and_takes_the_fields_of_the_api(repository, label_bundle, tmp_path):
    from fastgen.serving.wire import FIELDS

    config = config_of(repository / "fastgen")
    assert (config.backend, config.max_batch_size, config.model_transaction_policy.decoupled) == ("python", 0, True)
    names = [tensor.name for tensor in config.input]
    assert names[0] == "prompt"
    assert "labels" not in names
    assert set(names) <= set(FIELDS)
    assert all(tensor.optional for tensor in config.input)
    assert {tensor.name: type_of(tensor) for tensor in config.input}["guidance_scale"] == "TYPE_FP64"
    assert [tensor.name for tensor in config.output] == ["image", "seed", "metadata"]
    write_repository(read_bundle(label_bundle), tmp_path / "labels", batch_sizes=(1,))
    labels = config_of(tmp_path / "labels/fastgen").input[0]
    assert (labels.name, list(labels.dims)) == ("labels", [-1])
    assert {folder.name for folder in (tmp_path / "labels").iterdir()} == {"unet", "fastgen"}


def test_an_fp16_graph_finds_its_data_and_takes_the_same_tensors(half_bundle, tmp_path):
    write_repository(read_bundle(half_bundle), tmp_path / "r", dtype="fp16", batch_sizes=(1,))
    graph = tmp_path / "r/unet/1/model.onnx"
    assert graph.read_bytes() == (half_bundle / "unet/model.fp16.onnx").read_bytes()
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    assert {node.type for node in session.get_inputs()} <= TYPES.keys()


def test_tensorrt_plans_have_a_folder_for_each_number_of_rows(card, labels, tmp_path):
    plans: dict = {}
    for artifact in build_engines(labels, dtype="fp32", batch_sizes=[1, 4]):
        plans.setdefault("unet", {})[artifact.recipe.fields["batch"]] = artifact
    write_repository(labels, tmp_path / "r", batch_sizes=(1, 4), plans=plans)
    assert {f.name for f in (tmp_path / "r").iterdir()} == {"unet-1", "unet-2", "unet-4", "unet-8", "fastgen"}
    config = config_of(tmp_path / "r/unet-8")
    assert (config.platform, config.max_batch_size) == ("tensorrt_plan", 0)
    shapes = {tensor.name: list(tensor.dims) for tensor in config.input}
    assert shapes == {"sample": [8, 3, 16, 16], "timestep": [8], "class_labels": [8, 24]}
    assert (tmp_path / "r/unet-8/1/model.plan").read_bytes() == plans["unet"][8].file(PLAN).read_bytes()


def test_one_command_builds_certifies_and_writes_the_repository(card, label_bundle, export_few, tmp_path):
    options = {"trt": True, "dtype": "fp32", "batch_sizes": [1, 2], "engines": ["ort"], "triton": tmp_path / "r"}
    bundle = shutil.copytree(label_bundle, tmp_path / "bundle")
    certificates = export_few(bundle, bundle, **options)
    assert [certificate.engine for certificate in certificates] == ["ort", "trt"]
    assert {f.name for f in (tmp_path / "r").iterdir()} == {"unet-1", "unet-2", "unet-4", "fastgen"}
    assert read_bundle(tmp_path / "r/fastgen/1/bundle").sha256 == read_bundle(tmp_path / "bundle").sha256


def test_where_no_engine_can_be_built_no_repository_is_written(fastgen, label_bundle, tmp_path):
    code, _, err = fastgen(
        "export", label_bundle, "--engine", "ort", "--trt", "--dtype", "fp32", "--triton", tmp_path / "r"
    )
    assert (code, "no TensorRT engines were built" in err) == (1, True), err
    assert not (tmp_path / "r").exists()


def test_a_name_with_every_dtype_parses():
    signature = Signature((TensorSpec("a", "int64", ("batch", 7), 9), TensorSpec("b", "float32", ("batch",))), ())
    config = text_format.Parse(plan_config(signature, 3), ModelConfig())
    assert [(type_of(t), list(t.dims)) for t in config.input] == [("TYPE_INT64", [3, 7]), ("TYPE_FP32", [3])]


def test_the_command_writes_the_repository_of_a_bundle_and_exports_nothing(fastgen, label_bundle, tmp_path):
    before = {f: f.stat().st_mtime_ns for f in label_bundle.rglob("*")}
    code, out, err = fastgen("export", label_bundle, "--triton", tmp_path / "r", "--batch-sizes", "3")
    assert (code, "certifying" in err) == (0, False), err
    assert f"Triton model repository: {tmp_path / 'r'}" in out
    assert config_of(tmp_path / "r/unet").max_batch_size == 6
    assert {f: f.stat().st_mtime_ns for f in label_bundle.rglob("*")} == before
    code, _, err = fastgen("export", label_bundle, "--triton", tmp_path / "r", "--batch-sizes", "3")
    assert (code, "holds this bundle already" in err) == (0, True)
    code, _, err = fastgen("export", label_bundle, "--triton", tmp_path / "r")
    assert (code, "holds another repository (batch_sizes differs)" in err) == (2, True)
    assert fastgen("export", label_bundle, "--triton", tmp_path / "r", "--overwrite")[0] == 0
    assert config_of(tmp_path / "r/unet").max_batch_size == 128


def test_what_must_not_be_written_over_stays(fastgen, label_bundle, tmp_path):
    def refused(folder, *options):
        code, _, err = fastgen("export", label_bundle, "--triton", folder, *options)
        [line] = err.splitlines()
        assert line.startswith("fastgen: error: "), line
        assert len(line) <= 300
        assert code == 2
        return line

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    assert "is not empty and no repository of fastgen" in refused(mine, "--overwrite")
    (tmp_path / "file").write_text("")
    assert "is not a folder" in refused(tmp_path / "file")
    inside = label_bundle / "triton"
    assert "is not apart from the bundle" in refused(inside)
    assert not inside.exists()
    assert "found --dtype bf16" in refused(tmp_path / "new", "--dtype", "bf16")
    assert "has no fp16 graph" in refused(tmp_path / "new", "--dtype", "fp16")
    assert not (tmp_path / "new").exists()
    ours = tmp_path / "ours"
    write_repository(read_bundle(label_bundle), ours, batch_sizes=(1,))
    config = ours / "unet/config.pbtxt"
    config.write_text(config.read_text() + "\nversion_policy { all { } }\n")
    assert "'unet/config.pbtxt' is not as it was written" in refused(ours, "--overwrite")
    shutil.copyfile(label_bundle / "bundle.json", ours / "fastgen/1/more.json")
    assert "more.json" in refused(ours, "--overwrite")
    (ours / "fastgen/1/repository.json").write_text("[]")
    assert "found no list of files" in refused(ours, "--overwrite")
    assert (mine / "thesis.txt").read_text() == "mine"


def test_a_damaged_bundle_and_one_without_its_graph_are_refused(fastgen, label_bundle, rehash, tmp_path):
    copy = shutil.copytree(label_bundle, tmp_path / "bundle")
    with open(copy / "unet/model.onnx", "ab") as file:
        file.write(b"!")
    code, _, err = fastgen("export", copy, "--triton", tmp_path / "r")
    assert (code, "truncated or replaced" in err) == (2, True)
    manifest = json.loads((copy / "bundle.json").read_text())
    for name in [name for name in manifest["files"] if name.startswith("unet/model")]:
        (copy / name).unlink()
        del manifest["files"][name]
    (copy / "bundle.json").write_text(json.dumps(manifest))
    rehash(copy)
    code, _, err = fastgen("export", copy, "--triton", tmp_path / "r")
    assert (code, "has no fp32 graph of unet" in err) == (2, True)
    assert not (tmp_path / "r").exists()
