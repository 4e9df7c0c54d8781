"""The reference of certificates: how much it evaluates, what it stores, and that older ones still certify."""

from __future__ import annotations

import shutil
from collections import Counter
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("diffusers")

from safetensors.numpy import load_file, save_file

from export.certificate import certify
from export.reference import (
    IMAGE_STEPS,
    decode_images,
    image_steps,
    is_current,
    read_reference,
    sample_latents,
    whole_runs,
    write_distances,
    write_reference,
)
from fastgen.engines import create_engine
from fastgen.engines.eager.engine import Engine as Eager
from fastgen.errors import InputError
from fastgen.generate.pipeline import Pipeline
from fastgen.models.bundle import REFERENCE, read_bundle
from fastgen.models.folder import load_model

# Rows that each network is evaluated on for a text-to-image model with guidance. The denoiser: 16, and 8 requests in 5 steps,
# guided, of which 3 are decoded.
NETWORKS = {"text_encoder": 9, "unet": 16, "vae_decoder": 2, "vae_encoder": 2}
WHOLE_RUNS = {"text_encoder": 9, "unet": 8 * 5 * 2, "vae_decoder": 3}  # text: the 8 prompts and the empty one


@pytest.fixture
def three_decoded(monkeypatch):
    monkeypatch.setattr("export.reference.DECODED_PIXELS", 3 * 32 * 32)


def count_rows(monkeypatch, cls) -> Counter[str]:
    """Network -> rows that engines of this class evaluate from now on."""
    rows: Counter[str] = Counter()
    run = cls.run

    def counted(engine, network, *inputs):
        rows[network] += len(inputs[0])
        return run(engine, network, *inputs)

    monkeypatch.setattr(cls, "run", counted)
    return rows


def test_an_export_evaluates_no_more_than_this(three_decoded, text_model, text_bundle, tmp_path, monkeypatch):
    model, reference = load_model(text_model), tmp_path / "reference.safetensors"
    rows = count_rows(monkeypatch, Eager)
    write_reference(model, reference)
    assert rows == Counter(NETWORKS) + Counter(WHOLE_RUNS)
    rows.clear()
    write_distances(model, reference, "bf16", tmp_path / "reference.bf16.json")
    assert rows == NETWORKS

    bundle = with_reference(text_bundle, tmp_path, load_file(reference))
    engine = create_engine("ort", bundle)
    rows = count_rows(monkeypatch, type(engine))
    assert certify(engine, bundle).passed
    assert rows == Counter(NETWORKS) + Counter(WHOLE_RUNS)


def with_reference(bundle, folder, tensors):
    """A copy of a bundle with this reference."""
    copy = shutil.copytree(bundle, folder / "bundle")
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, copy / REFERENCE)
    held = read_bundle(copy)
    held._verified.add(REFERENCE)  # it is not what bundle.json says
    return held


def test_a_reference_holds_the_final_states_of_all_requests_and_as_many_pictures_as_have_so_many_pixels(
    three_decoded, text_bundle, text_model, tmp_path
):
    whole = whole_runs(read_reference(text_bundle / REFERENCE))
    assert (whole.steps, whole.latents.shape, whole.images.shape) == (5, (8, 4, 8, 8), (8, 3, 32, 32))
    write_reference(load_model(text_model), tmp_path / "fewer.safetensors")
    fewer = whole_runs(read_reference(tmp_path / "fewer.safetensors"))
    assert np.array_equal(fewer.latents, whole.latents)
    np.testing.assert_allclose(fewer.images, whole.images[:3], atol=1e-5)


@pytest.mark.parametrize(("off", "passed"), [(0.0, True), (3 / 127.5, False)])
@pytest.mark.parametrize("kind", ["text", "labels"])
def test_a_reference_that_an_older_fastgen_stored_still_certifies(
    kind, off, passed, exports, text_model, label_model, tmp_path
):
    """It has eight pictures after 20 steps."""
    folder = exports(kind)[0]
    model = load_model(text_model if kind == "text" else label_model)
    eager = Pipeline(model, Eager(model, device="cpu"))
    tensors = {k: v for k, v in read_reference(folder / REFERENCE).items() if not k.endswith(".5")}
    tensors["images"] = decode_images(eager, sample_latents(eager, 20)) + np.float32(off)
    bundle = with_reference(folder, tmp_path, tensors)
    rows = certify(create_engine("ort", bundle), bundle).rows
    assert "latents" not in [row.what for row in rows]
    assert {row.what: row.passed for row in rows} == {row.what: row.what != "images" or passed for row in rows}


@pytest.mark.parametrize("name", ["latents.5", "images.5"])
@pytest.mark.parametrize("change", ["missing", "shape", "nan"])
def test_a_reference_without_sound_whole_runs_is_one_line(text_bundle, tmp_path, name, change):
    tensors = read_reference(text_bundle / REFERENCE)
    if change == "missing":
        del tensors[name]
    elif change == "shape":
        tensors[name] = tensors[name][..., :4]
    else:
        tensors[name][7, 0, 0, 0] = np.nan
    bundle = with_reference(text_bundle, tmp_path, tensors)
    with pytest.raises(InputError, match=rf"reference.safetensors: {name}.*; export the model again"):
        certify(create_engine("ort", bundle), bundle)


def test_a_fault_in_a_request_whose_picture_is_not_decoded_is_a_miss(three_decoded, text_model, text_bundle, tmp_path):
    write_reference(load_model(text_model), tmp_path / "reference.safetensors")
    bundle = with_reference(text_bundle, tmp_path, load_file(tmp_path / "reference.safetensors"))
    engine: Any = create_engine("ort", bundle)
    run_guided = engine.run_guided

    def wrong(sample, *rest):
        predictions = run_guided(sample, *rest).copy()
        predictions[len(sample) - 1] *= 1.1  # the last request's unconditional row
        return predictions

    engine.run_guided = wrong
    rows = {row.what: row.passed for row in certify(engine, bundle).rows}
    assert not rows.pop("latents")
    assert all(rows.values())


@pytest.mark.parametrize(("refused", "steps"), [([], 5), ([5], 10), ([5, 10, 20], 20)])
def test_the_first_number_of_steps_that_the_solver_can_do_is_taken(text_model, monkeypatch, refused, steps):
    model, table = load_model(text_model), type(load_model(text_model)).table

    def coarse(self, key):
        if int(key.partition(":")[2]) in refused:
            raise InputError("too coarse")
        return table(self, key)

    monkeypatch.setattr(type(model), "table", coarse)
    assert image_steps(model) == steps
    assert steps in IMAGE_STEPS


@pytest.mark.parametrize(("schedule", "steps"), [("squaredcos_cap_v2", 20), ("scaled_linear", 5)])
def test_the_model_s_own_solver_takes_no_steps_that_are_too_coarse_for_its_schedule(text_model, schedule, steps):
    model = load_model(text_model)
    model.scheduler_config |= {"_class_name": "HeunDiscreteScheduler", "beta_schedule": schedule}
    model.sampling = type(model.sampling)("heun", 30, 3.0)
    assert image_steps(model) == steps


def test_the_decoder_is_compared_on_states_that_the_model_makes(text_bundle, label_bundle, tmp_path):
    """Not on noise: eight bits hold what the model's own states span, whose deviation may be far from 1."""
    tensors = read_reference(text_bundle / REFERENCE)
    bundle = read_bundle(text_bundle)
    states = np.asarray(bundle.spec.space.to_vae(whole_runs(tensors).latents[:2]), np.float32)
    name = f"vae_decoder.{bundle.spec.signatures['vae_decoder'].inputs[0].name}"
    assert np.array_equal(tensors[name], states)
    assert is_current(bundle)
    assert is_current(read_bundle(label_bundle))  # it has no decoder
    older = tensors | {name: np.random.default_rng(0).standard_normal(states.shape).astype(np.float32)}
    assert not is_current(with_reference(text_bundle, tmp_path, older))
