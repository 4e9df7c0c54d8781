"""Building TensorRT plans: what the builder asks of TensorRT, keeps, and refuses; over the recording double."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import tensorrt_double as double
from tensorrt_double import BEHAVIOUR, CALLS, called
from trt_helpers import build, inputs, press_ctrl_c_at_the_first_step

from export.trt_build import network_rows
from export.trt_layers import check_layers
from fastgen.engines import create_engine
from fastgen.engines.cache import artifacts
from fastgen.engines.trt import platform
from fastgen.engines.trt.plan import LAYERS, PLAN
from fastgen.errors import FastgenError, InputError
from fastgen.models.bundle import read_bundle

torch = pytest.importorskip("torch")
pytest_plugins = ("trt_fixtures",)


def order(*names: str) -> list[str]:
    return [call[0] for call in CALLS if call[0] in names]


def test_unet_rows_are_b_and_2b_text_rows_fixed_and_vae_rows_bounded():
    assert network_rows("unet", [1, 8, 2], 256**2) == [1, 2, 4, 8, 16]
    assert network_rows("text_encoder", [1, 64], 256**2) == [16]
    assert network_rows("vae_decoder", [1, 8, 64], 256**2) == [1, 8, 16]
    assert network_rows("vae_decoder", [8], 4096**2) == [1]


def test_builds_are_strongly_typed_static_detailed_without_tf32_and_in_order(card, labels):
    (artifact,) = build(labels, batch_sizes=[2], networks=["unet"], workspace_gib=2)[:1]
    assert artifact.recipe.fields["batch"] == 2
    steps = ("Builder", "Builder.create_network", "OnnxParser.parse_from_file", "Builder.build_serialized_network")
    assert order(*steps, "Runtime.deserialize_cuda_engine")[:5] == [*steps, "Runtime.deserialize_cuda_engine"]
    assert called("Builder.create_network")[0] == (1 << double.NetworkDefinitionCreationFlag.STRONGLY_TYPED,)
    profile = {name: shapes for name, *shapes in called("IOptimizationProfile.set_shape")[:3]}
    assert profile == {
        "sample": [(2, 3, 16, 16)] * 3,
        "timestep": [(2,)] * 3,
        "class_labels": [(2, 24)] * 3,
    }
    assert called("IBuilderConfig.profiling_verbosity")[0] == (double.ProfilingVerbosity.DETAILED,)
    assert called("IBuilderConfig.clear_flag")[0] == (double.BuilderFlag.TF32,)
    assert called("IBuilderConfig.set_memory_pool_limit")[0] == (double.MemoryPoolType.WORKSPACE, 2 * 2**30)
    last = "Builder.build_serialized_network"
    settings = ("IBuilderConfig.progress_monitor", "IBuilderConfig.set_timing_cache")
    assert sorted(order(*settings, last)[:3]) == sorted([*settings, last])
    assert order(*settings, last)[2] == last


def test_plan_and_inspector_report_lie_in_the_cache_with_the_fields_they_depend_on(card, labels):
    two, four = build(labels)
    assert json.loads(two.file(PLAN).read_text())["shapes"]["sample"][0] == [2, 3, 16, 16]
    assert json.loads(two.file(LAYERS).read_text())["Layers"]
    fields = dict(two.recipe.fields)
    assert fields["graph_sha256"] == labels.files["unet/model.onnx"].sha256
    assert (fields["gpu"], fields["compute_capability"]) == (double.GPU, double.CAPABILITY)
    assert (fields["tensorrt"], fields["dtype"], fields["network"]) == (double.VERSION, "fp32", "unet")
    assert [d.field for d in artifacts.differences(two.recipe, four.recipe)] == ["batch"]


def test_what_is_built_is_not_built_again_and_a_larger_request_builds_the_rest(card, labels):
    build(labels)
    assert len(called("Builder.build_serialized_network")) == 2
    build(labels, batch_sizes=[2, 4])
    assert len(called("Builder.build_serialized_network")) == 3  # 8 rows; 2 and 4 are there


def test_other_weights_are_another_plan(card, labels, scaled_weights, tmp_path):
    other = read_bundle(scaled_weights(labels.folder, tmp_path / "scaled", 2.0))
    assert build(labels)[0].recipe.digest != build(other)[0].recipe.digest


def test_a_text_model_leaves_out_the_vae_encoder_and_keeps_the_text_encoder_exact(card, text_bundle):
    built = {
        (a.recipe.fields["network"], a.recipe.fields["batch"]) for a in build(read_bundle(text_bundle), batch_sizes=[1])
    }
    assert built == {("text_encoder", 16), ("unet", 1), ("unet", 2), ("vae_decoder", 1)}


def test_a_later_build_starts_from_the_timings_of_earlier_ones_and_keeps_those_of_others(card, labels, tmp_path):
    build(labels, batch_sizes=[2], networks=["unet"])
    (path,) = (tmp_path / "cache" / "timings").glob("*.timing")
    assert double.VERSION in path.name
    assert called("IBuilderConfig.set_timing_cache") == [([], False), (["model.onnx"], False)]
    assert path.stat().st_mode & 0o077 == 0 or path.parent.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("damage", [b"short", bytes(32) + b'["10.13.3.9", "x"]'])
def test_damaged_timings_are_announced_and_not_handed_to_tensorrt(card, labels, tmp_path, damage):
    path = tmp_path / "kernels.timing"
    lines: list[str] = []
    path.write_bytes(damage)
    build(labels, timing_cache=path, say=lines.append)
    assert f"{path}: damaged; measuring anew" in lines
    assert called("IBuilderConfig.set_timing_cache")[0] == ([], False)


# What is refused


def test_parser_errors_are_one_line_with_every_node(card, labels):
    BEHAVIOUR["parse"] = "fails"
    with pytest.raises(
        FastgenError, match=r"model\.onnx: cannot be parsed: .* GroupNormalization node_7: Assertion failed"
    ):
        build(labels)
    assert artifacts.artifacts("trt") == []


def test_a_build_that_gives_nothing_fails_with_tensorrts_words(card, labels):
    BEHAVIOUR.update(build="fails", reason="no implementation\nfor node_7")
    with pytest.raises(
        FastgenError, match=r"unet, batch 2, fp32: cannot be built: .* no implementation for node_7"
    ) as raised:
        build(labels)
    assert "\n" not in str(raised.value)
    assert not isinstance(raised.value, MemoryError)
    assert not list(artifacts.leftovers())


def test_memory_that_runs_out_is_known_as_such(card, labels):
    BEHAVIOUR.update(build="fails", reason="Error Code 2: OutOfMemory (Requested size was 99 bytes.)")
    with pytest.raises(MemoryError, match="OutOfMemory"):
        build(labels)


def test_ctrl_c_stops_the_build_and_leaves_nothing(card, labels, monkeypatch):
    steps = press_ctrl_c_at_the_first_step(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        build(labels)
    assert steps == [0]  # of 4: step_complete said no
    assert artifacts.artifacts("trt") == []
    assert not list(artifacts.leftovers())


def test_a_graph_without_the_precision_names_the_export_that_adds_it(card, labels):
    with pytest.raises(InputError, match="has no fp16 graph of unet"):
        build(labels, dtype="fp16")
    assert called("Builder") == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_sizes": []}, "batch sizes are"),
        ({"batch_sizes": [0]}, "batch sizes are"),
        ({"networks": ["unett"]}, "did you mean 'unet'"),
        ({"dtype": "int4"}, "unknown dtype 'int4'"),
        ({"dtype": "fp8"}, r"has no fp8-fp16 graph of unet; .* --dtype fp8 --trt"),
        ({"optimization_level": 6}, "expected 0 to 5"),
        ({"workspace_gib": 0}, "expected more than 0"),
    ],
)
def test_options_out_of_range_are_named(card, labels, options, message):
    with pytest.raises(InputError, match=message):
        build(labels, **options)


def test_bf16_is_refused_before_the_build_on_a_card_without_it(card, labels, monkeypatch):
    monkeypatch.setattr(platform, "open_gpu", lambda device, product=None: replace(card, compute_capability="7.5"))
    with pytest.raises(InputError, match=r"7\.5\) has no bf16.*--dtype fp16"):
        build(labels, dtype="bf16")


def test_fp16_graphs_pass_with_their_islands_and_run(card, half_bundle):
    bundle = read_bundle(half_bundle)
    build(bundle, dtype="fp16")
    engine, exact = create_engine("trt", bundle), create_engine("ort", bundle)
    assert engine.dtype == "fp16"
    values = inputs(bundle, "unet", 2)
    found, expected = engine.run("unet", *values)[0].numpy(), exact.run("unet", *(v.numpy() for v in values))[0]
    assert 1e-6 < np.abs(found - expected).max() < 0.05


@pytest.mark.parametrize("kind", [pytest.param("text", marks=pytest.mark.slow), "labels"])
def test_export_trt_builds_and_certifies_in_fp16(card, lowered_bundle, export_few, tmp_path, kind):
    folder = shutil.copytree(lowered_bundle(kind, "fp16"), tmp_path / "bundle")
    certificate = export_few(folder, folder, dtype="fp16", trt=True, batch_sizes=[2], engines=["ort"])[-1]
    assert (certificate.engine, certificate.dtype) == ("trt", "fp16")
    assert certificate.passed, certificate.table()
    found = {(a.recipe.fields["network"], a.recipe.fields["dtype"]) for a in artifacts.artifacts("trt")}
    decoders = {("vae_decoder", "fp16"), ("vae_decoder", "fp32")}  # the latter for pictures that come out broken
    text = {("text_encoder", "fp32"), *decoders} if kind == "text" else set()
    assert found == {("unet", "fp16"), *text}


def test_an_fp32_convolution_in_an_fp16_network_is_named(card, half_bundle):
    import onnx

    bundle = read_bundle(half_bundle)
    node = next(
        n
        for n in onnx.load(half_bundle / "unet/model.onnx", load_external_data=False).graph.node
        if n.op_type == "Conv"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(bundle), "network", lambda self, *which: self.folder / "unet/model.onnx")
        with pytest.raises(
            FastgenError, match=rf"does not compute in fp16: .*{node.name} \(convolution\) is FLOAT.*in all\)"
        ):
            build(bundle, dtype="fp16")
    assert artifacts.artifacts("trt") == []


@pytest.mark.parametrize(
    ("dtype", "layer", "refused"),
    [
        (
            "fp16",
            {"LayerType": "CaskConvolution", "Inputs": [{"Format/Datatype": "Row major linear FP32"}]},
            "executes fp32",
        ),
        ("fp16", {"LayerType": "gemm", "Inputs": [{"Format/Datatype": "Float"}]}, "executes fp32"),
        (
            "fp16",
            {"LayerType": "kgen", "TacticName": "_gemm_mha_v2", "Inputs": [{"Format/Datatype": "BFloat16"}]},
            "bf16",
        ),
        ("fp16", {"LayerType": "Reformat", "Inputs": [{"Format/Datatype": "Float"}], "Name": "copy to conv"}, None),
        ("fp16", {"LayerType": "kgen", "Inputs": [{"Format/Datatype": "Float"}]}, None),
        ("fp16", {"LayerType": "gemm", "Inputs": [{"Format/Datatype": "Half"}, {"Format/Datatype": "Float"}]}, None),
        (
            "fp16",
            {
                "LayerType": "correlation",
                "Inputs": [{"Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}],
            },
            None,
        ),
        (
            "fp16",
            {"LayerType": "gemm", "Inputs": [{"Format/Datatype": "Float"}], "Metadata": "[ONNX Layer: island]"},
            None,
        ),
        ("bf16", {"LayerType": "gemm", "Inputs": [{"Format/Datatype": "Half"}]}, "executes fp16"),
        ("bf16", {"LayerType": "gemm", "Inputs": [{"Format/Datatype": "BFloat16"}]}, None),
        ("fp32", {"LayerType": "gemm", "Inputs": [{"Format/Datatype": "Half"}]}, "executes fp16"),
        ("fp32", {"LayerType": "gemm", "TacticName": "sm80_xmma_gemm_f32f32_tf32f32_f32", "Inputs": []}, "tf32"),
        ("fp32", {"LayerType": "gemm", "Inputs": [{"Format/Datatype": "Float"}]}, None),
    ],
)
def test_the_inspectors_words_decide_whether_a_plan_executes_its_precision(dtype, layer, refused):
    report = json.dumps({"Layers": [{"Name": "one"} | layer]})
    with pytest.raises(FastgenError, match=rf"one.*{refused}") if refused else nullcontext():
        check_layers(report, dtype, {"island"}, "unet", print)


def test_a_report_without_precisions_is_said_not_taken_for_proof():
    lines: list[str] = []
    check_layers('{"Layers": ["conv + relu"]}', "fp16", set(), "unet", lines.append)
    assert "tells no precisions" in lines[0]
    with pytest.raises(FastgenError, match="gives no JSON"):
        check_layers("Layers:\n", "fp16", set(), "unet", lines.append)


def test_a_plan_whose_report_shows_another_precision_is_not_kept(card, labels):
    layer = {"Name": "node_conv", "LayerType": "CaskConvolution", "Inputs": [{"Format/Datatype": "Half"}]}
    BEHAVIOUR["plan"] = {"report": [layer]}
    with pytest.raises(FastgenError, match="the plan does not execute fp32: node_conv"):
        build(labels)
    assert artifacts.artifacts("trt") == []
