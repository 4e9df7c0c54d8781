"""A certificate says what an engine really computes: it fails when the weights are not the model's."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from export.certificate import _image_row, certify
from export.reference import write_reference
from fastgen.engines import create_engine
from fastgen.errors import FastgenError
from fastgen.models.bundle import read_bundle

ROWS = {
    "text": ["text_encoder", "unet", "vae_decoder", "vae_encoder", "latents", "images"],
    "labels": ["unet", "images"],
}


def shifted(bundle, networks, by):
    """An ort engine whose outputs of these networks are off by `by`."""
    engine: Any = create_engine("ort", bundle)
    run = engine.run

    def wrong(network, *inputs):
        outputs = run(network, *inputs)
        return tuple(y + np.float32(by) for y in outputs) if network in networks else outputs

    engine.run = wrong
    return engine


@pytest.mark.parametrize("kind", ["text", "labels"])
def test_engines_that_compute_the_model_are_certified_row_by_row(exports, kind):
    bundle, certificates = exports(kind)
    assert {c.engine for c in certificates} == {"ort", "openvino"}
    for certificate in certificates:
        assert certificate.passed, certificate.table()
        assert [row.what for row in certificate.rows] == ROWS[kind]
        assert "certified" in certificate.table().splitlines()[0]
        assert len(certificate.table().splitlines()) == 1 + len(ROWS[kind])
        images = certificate.rows[-1]
        assert images.psnr_db > 30
        name = f"{certificate.engine}-{certificate.dtype}-{certificate.device}.json"
        filed = json.loads((bundle / "certificates" / name).read_text())
        assert filed["passed"] is True
        assert filed["bundle_sha256"] == hashlib.sha256((bundle / "bundle.json").read_bytes()).hexdigest()
        assert (filed["engine"], filed["dtype"], filed["device"]) == tuple(name.removesuffix(".json").split("-"))
        assert {"python", "machine", "numpy"} <= set(filed["versions"])


def test_a_dtype_of_its_own_gets_a_certificate_of_its_own(label_bundle, tmp_path):
    bundle = read_bundle(shutil.copytree(label_bundle, tmp_path / "bundle"))
    shutil.rmtree(bundle.folder / "certificates")
    certificate = certify(create_engine("openvino", bundle, dtype="fp32"), bundle)
    assert certificate.passed, certificate.table()
    assert [f.name for f in (bundle.folder / "certificates").iterdir()] == ["openvino-fp32-cpu.json"]


@pytest.mark.parametrize(("by", "passed"), [(5e-5, True), (3e-4, False)])
def test_fp32_is_held_to_the_stated_tolerance(label_bundle, tmp_path, by, passed):
    bundle = read_bundle(shutil.copytree(label_bundle, tmp_path / "bundle"))
    certificate = certify(shifted(bundle, {"unet"}, by), bundle)
    assert certificate.rows[0].passed is passed
    assert certificate.rows[0].max_abs == pytest.approx(by, rel=0.1)
    assert certificate.rows[-1].passed  # far below a grey level
    assert certificate.passed is passed


@pytest.mark.parametrize("fixed_sizes", [(2, 16), (64,)])
def test_engines_with_fixed_batch_sizes_are_certified_in_those(text_bundle, tmp_path, fixed_sizes):
    bundle = read_bundle(shutil.copytree(text_bundle, tmp_path / "bundle"))
    engine: Any = create_engine("ort", bundle)
    run, sizes = engine.run, set()

    def fixed(network, *inputs):
        sizes.add(len(inputs[0]))
        return run(network, *inputs)

    engine.run, engine.static_shapes, engine.batch_sizes = fixed, True, lambda network: fixed_sizes
    certificate = certify(engine, bundle)
    assert certificate.passed, certificate.table()
    assert sizes <= set(fixed_sizes)


def test_what_an_engine_keeps_in_fp32_is_held_to_fp32(label_bundle, tmp_path):
    bundle = read_bundle(shutil.copytree(label_bundle, tmp_path / "bundle"))
    for executed, passed in (("bf16", True), ("fp32", False)):
        engine = shifted(bundle, {"unet"}, 3e-4)
        engine.run("unet", *bundle.spec.signatures["unet"].sample_inputs(1, np.random.default_rng(0)).values())
        engine.dtype, engine.executed = "bf16", lambda network, dtype=executed: dtype
        row = certify(engine, bundle).rows[0]
        assert row.passed is passed
        assert ("eager's" in row.allowed) is passed


def test_only_the_networks_asked_for_are_certified(text_bundle, tmp_path):
    bundle = read_bundle(shutil.copytree(text_bundle, tmp_path / "bundle"))
    rows = certify(create_engine("ort", bundle), bundle, ["unet", "vae_decoder"]).rows
    assert [row.what for row in rows] == ["unet", "vae_decoder", "latents", "images"]


def test_whole_images_are_compared_too(text_bundle, tmp_path):
    bundle = read_bundle(shutil.copytree(text_bundle, tmp_path / "bundle"))
    rows = {row.what: row for row in certify(shifted(bundle, {"vae_decoder"}, 3 / 127.5), bundle).rows}
    assert rows["unet"].passed
    assert not rows["vae_decoder"].passed
    assert not rows["images"].passed
    assert rows["images"].max_abs * 127.5 == pytest.approx(3, abs=0.1)  # grey levels


@pytest.mark.parametrize(("area", "levels", "passed"), [(4, 20, True), (64, 3, False)])
def test_with_a_codebook_another_code_of_one_latent_is_no_miss_and_a_shift_of_all_is(area, levels, passed):
    expected = np.random.default_rng(0).uniform(-0.5, 0.5, (1, 3, 64, 64)).astype(np.float32)
    images = expected.copy()
    images[..., :area, :area] += levels / 127.5
    assert _image_row(expected, images, "fp32", codebook=True).passed is passed
    assert not _image_row(expected, images, "fp32").passed


@pytest.mark.parametrize(("engine", "factor"), [("ort", 1.02), ("openvino", 1.05)])
def test_weights_that_are_not_the_model_s_are_a_miss_and_exit_code_1(
    fastgen, label_bundle, scaled_weights, tmp_path, engine, factor
):
    bundle = scaled_weights(label_bundle, tmp_path / "bundle", factor)
    code, out, err = fastgen("export", bundle, "--engine", engine)
    assert code == 1
    title, unet = out.splitlines()[:2]
    assert "MISSED" in title
    assert unet.split()[:2] == ["MISS", "unet"]
    assert err.splitlines()[-1] == f"fastgen: error: not certified: {engine} (see the table above)"
    (filed,) = [f for f in (bundle / "certificates").iterdir() if f.name.startswith(engine)]
    assert json.loads(filed.read_text())["passed"] is False


def test_values_that_are_not_finite_are_named_and_withdraw_an_earlier_certificate(
    fastgen, label_bundle, scaled_weights, tmp_path
):
    bundle = scaled_weights(label_bundle, tmp_path / "bundle", math.nan)
    assert (bundle / "certificates" / "ort-fp32-cpu.json").exists()
    code, out, err = fastgen("export", bundle, "--engine", "ort")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == "fastgen: error: engine ort fp32: unet produced values that are not finite"
    assert not (bundle / "certificates" / "ort-fp32-cpu.json").exists()


@pytest.mark.parametrize(("value", "words"), [(math.nan, "unet itself .* not finite"), (0.0, "whole image 0: flat")])
def test_a_model_that_is_broken_itself_is_named_before_any_engine_is_blamed(label_model, tmp_path, value, words):
    import torch

    from fastgen.models.folder import load_model

    model = load_model(label_model)
    if value == 0.0:  # the clean sample it predicts is constant
        model.scheduler_config = model.scheduler_config | {"prediction_type": "sample"}
        model.sampling = type(model.sampling)("ddim", 5, 1.0)
    with torch.no_grad():
        for parameter in model.unet.get_submodule("conv_out").parameters():
            parameter.fill_(value)
    with pytest.raises(FastgenError, match=words):
        write_reference(model, tmp_path / "reference.safetensors")
    assert not any(tmp_path.iterdir())


def test_a_bundle_is_certified_elsewhere_without_torch(fastgen_process, label_bundle, tmp_path):
    bundle = shutil.copytree(label_bundle, tmp_path / "bundle")
    before = json.loads((bundle / "certificates" / "ort-fp32-cpu.json").read_text())
    shutil.rmtree(bundle / "certificates")
    blocked = ["torch", "diffusers", "transformers", "onnx", "onnxscript"]
    done = fastgen_process("export", bundle, "--engine", "ort", blocked=blocked)
    assert done.returncode == 0, done.stderr
    assert "certified" in done.stdout
    assert (
        json.loads((bundle / "certificates" / "ort-fp32-cpu.json").read_text())["bundle_sha256"]
        == before["bundle_sha256"]
    )
