"""NVIDIA's own parser and builder (TensorRT for RTX), which need no GPU: what we export goes through them, in every precision.

What comes out has not been executed here: that needs a card.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from small_presets import SMALL
from trt_helpers import press_ctrl_c_at_the_first_step

from export.trt_build import Rows, build_plan
from export.trt_rtx import DEFAULT_CAPABILITIES, _set_targets, build_plans
from fastgen.engines.cache.artifacts import bundled
from fastgen.engines.trt.plan import CAPABILITIES, PLAN
from fastgen.engines.trt.platform import open_library
from fastgen.engines.trt.product import RTX
from fastgen.errors import FastgenError
from fastgen.files.names import ICLEVR_OBJECTS
from fastgen.models.bundle import read_bundle
from fastgen.models.condition import CLASS, STATES, Condition, Text
from fastgen.models.signatures import Signature, model_signatures
from fastgen.models.space import Space
from fastgen.presets import load_preset

pytest.importorskip("torch")
pytest.importorskip("tensorrt_rtx")
pytest_plugins = ("trt_fixtures",)
ROWS = Rows(1, 8, 8)
TURING = """
import sys
from pathlib import Path

from test_trt_rtx_real import build

from fastgen.errors import FastgenError
from fastgen.models.bundle import read_bundle

bundle = read_bundle(Path(sys.argv[1]))
try:
    build(bundle.network("unet", "fp16"), bundle.spec.signatures["unet"], "fp16", ["7.5"])
except FastgenError as error:
    print(error)
"""
REFERENCES = ("monsters-pndm-rag", "iclevr-class-embed", "iclevr-concat")  # the other networks have parts of these


def build(graph: Path, signature: Signature, dtype: str, cards: Any = DEFAULT_CAPABILITIES) -> bytes:
    """One plan of a graph for batches of up to 8 rows, in its serialised form."""
    library = open_library(RTX)
    prepare = partial(_set_targets, library, cards, "unet")
    return bytes(build_plan(library, graph, signature, dtype, ROWS, "unet", lambda line: None, prepare).plan)


def test_a_graph_with_weights_in_fp16_builds_in_fp32(label_bundle, tmp_path):
    from export.half_weights import halve_weights

    bundle = read_bundle(label_bundle)
    for file in ("model.onnx", "model.onnx.data"):
        shutil.copy(label_bundle / "unet" / file, tmp_path / file)
    halve_weights(tmp_path / "model.onnx")
    assert len(build(tmp_path / "model.onnx", bundle.spec.signatures["unet"], "fp32")) > 10_000


def small_unet(name: str) -> tuple[Any, Signature]:
    """The UNet of a preset at small widths, weights random, and its signature."""
    from diffusers import UNet2DConditionModel

    from fastgen.models.networks.denoiser import Denoiser
    from fastgen.models.networks.labels import LabelConditioner, unet_class

    preset = load_preset(name, SMALL[name])
    assert preset.unet is not None
    if preset.kind == "text":
        text, space = Text((77,), (600,), width=32, pooled=32), Space((4, 16, 16), (3, 64, 64), latent=True)
        unet = UNet2DConditionModel(**preset.unet.config)
        return Denoiser(unet, [STATES]).eval(), model_signatures(Condition(text), space)["unet"]
    assert preset.conditioner is not None
    pixels = unet_class(preset.conditioner["kind"], preset.unet.config)(**preset.unet.config)
    conditioner = LabelConditioner(num_labels=len(ICLEVR_OBJECTS), **preset.conditioner)
    shape = (3, preset.image_size, preset.image_size)
    signatures = model_signatures(Condition(labels=ICLEVR_OBJECTS), Space(shape, shape, latent=False))
    return Denoiser(pixels, [CLASS], conditioner).eval(), signatures["unet"]


def test_the_real_builder_puts_a_plan_for_every_card_into_the_bundle_and_prints_nothing(half_copy, capfd):
    held = build_plans(read_bundle(half_copy), batch_sizes=[1, 4])
    (artifact,) = bundled(held)
    artifact.verify()
    assert artifact.recipe.fields["tensorrt_rtx"] == open_library(RTX).version
    assert artifact.recipe.fields[CAPABILITIES] == "8.0 8.6 8.9 12.0"
    assert len(artifact.file(PLAN).read_bytes()) > 10_000
    assert capfd.readouterr() == ("", "")


def test_an_operator_that_the_parser_does_not_know_is_one_line(labels, tmp_path, capfd):
    onnx = pytest.importorskip("onnx")
    model = onnx.load(labels.network("unet"))
    node = next(node for node in model.graph.node if node.op_type == "Conv")
    node.op_type, node.domain = "FourierConv", "example.org"
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(FastgenError, match=r"model\.onnx: cannot be parsed: .*FourierConv") as raised:
        build(tmp_path / "model.onnx", labels.spec.signatures["unet"], "fp32")
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


def test_a_card_that_the_builder_does_not_serve_is_one_line(half_bundle):
    """In a process of its own: after a build for Turing, the next one computes fewer layers in eight bits in that process, even
    if it is for other cards (TensorRT for RTX 1.7). `export` refuses Turing before it asks the builder."""
    done = subprocess.run(
        [sys.executable, "-c", TURING, str(half_bundle)],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"unet: cannot be built: TensorRT for RTX .*Turing \(SM75\).*\n", done.stdout)
    assert done.stderr == ""
    assert not hasattr(open_library(RTX).trt.ComputeCapability, "SM90")


def test_a_graph_of_another_precision_is_refused_by_the_types_of_its_layers(half_bundle):
    bundle = read_bundle(half_bundle)
    signature = bundle.spec.signatures["unet"]
    with pytest.raises(FastgenError, match=r"unet: the graph does not compute in fp16: .*\(convolution\) is FLOAT"):
        build(bundle.network("unet"), signature, "fp16")
    with pytest.raises(FastgenError, match=r"unet: the graph does not compute in fp32: .* is HALF"):
        build(bundle.network("unet", "fp16"), signature, "fp32")


def test_ctrl_c_stops_the_real_builder(half_copy, monkeypatch):
    press_ctrl_c_at_the_first_step(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        build_plans(read_bundle(half_copy), batch_sizes=[4])
    assert bundled(read_bundle(half_copy)) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dtype"), [("text", "fp32"), ("text", "bf16"), ("labels", "fp16"), ("labels", "bf16")]
)
def test_bundles_of_both_families_build_in_every_precision(kind, dtype, exports, lowered_bundle, tmp_path, capfd):
    source = exports(kind)[0] if dtype == "fp32" else lowered_bundle(kind, dtype)
    folder = shutil.copytree(source, tmp_path / "bundle")
    capfd.readouterr()
    held = build_plans(read_bundle(folder), dtype=dtype, batch_sizes=[1, 4])
    decoders = [("vae_decoder", each) for each in sorted({dtype, "fp32"})]
    text = [("text_encoder", "fp32"), *decoders] if kind == "text" else []
    found = [(a.recipe.fields["network"], a.recipe.fields["dtype"]) for a in bundled(held)]
    assert sorted(found) == sorted([("unet", dtype), *text])
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize("name", REFERENCES)
def test_the_reference_architectures_build_at_small_widths(name, tmp_path, capfd):
    from export.onnx import export_onnx

    network, signature = small_unet(name)
    export_onnx(network, signature, tmp_path / "model.onnx", "fp16")
    capfd.readouterr()
    assert len(build(tmp_path / "model.onnx", signature, "fp16")) > 10_000
    assert capfd.readouterr() == ("", "")
