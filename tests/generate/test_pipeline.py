"""generate(): guidance, batches, padding and settings, on real engines over tiny models."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest

import fastgen
from fastgen.errors import InputError
from fastgen.files.names import ICLEVR_OBJECTS
from fastgen.generate.pipeline import load
from fastgen.generate.settings import Settings
from fastgen.models.find import find_model

PROMPTS = [f"monster number {i}, red, with horns" for i in range(5)]
LABELS = [["gray cube"], ["red cube", "blue sphere"], ["green cylinder"], ["yellow cube"], ["cyan sphere"]]
SEEDS = [11, 0, 12, 13, 14]


@pytest.fixture(scope="module")
def text(text_bundle):
    return load(text_bundle, "ort")


@pytest.fixture(scope="module")
def labels(label_bundle):
    return load(label_bundle, "ort")


def arrays(images):
    return np.stack([np.asarray(image) for image in images]).astype(int)


def watch(monkeypatch, pipeline):
    """Every (network, batch size) that the engine is asked to run."""
    calls, run = [], pipeline.engine.run

    def spy(network, *inputs):
        calls.append((network, len(inputs[0])))
        return run(network, *inputs)

    monkeypatch.setattr(pipeline.engine, "run", spy)
    return calls


def test_five_lines_of_python(label_bundle):
    pipeline = fastgen.load(label_bundle, engine="ort")
    images = pipeline.generate(labels=[["red cube"], ["blue sphere", "gray cube"]], seeds=[0, 1])
    assert [image.size for image in images] == [(16, 16)] * 2
    assert arrays(images).std() > 10


def test_guidance_doubles_the_rows_and_a_scale_of_one_turns_it_off(monkeypatch, text):
    calls = watch(monkeypatch, text)
    guided = text.generate(PROMPTS[:3], seeds=SEEDS[:3], guidance_scale=2.0, num_inference_steps=5)
    assert calls.count(("unet", 6)) == 5
    assert ("text_encoder", 4) in calls  # three prompts and the empty one
    calls.clear()
    plain = text.generate(PROMPTS[:3], seeds=SEEDS[:3], guidance_scale=1.0, num_inference_steps=5)
    assert calls.count(("unet", 3)) == 5
    assert ("text_encoder", 3) in calls
    assert np.abs(arrays(guided) - arrays(plain)).max() > 1


def test_guidance_of_zero_is_the_unconditional_model(text):
    first = text.generate(PROMPTS[:1], seeds=[5], guidance_scale=0.0)
    second = text.generate(PROMPTS[1:2], seeds=[5], guidance_scale=0.0)
    assert np.abs(arrays(first) - arrays(second)).max() <= 1


def test_the_guidance_interval_limits_the_doubled_rows(monkeypatch, labels):
    calls = watch(monkeypatch, labels)
    labels.generate(labels=LABELS[:2], guidance_scale=2.0, num_inference_steps=10, guidance_interval=(2, 5))
    assert [batch for network, batch in calls] == [2, 2, 4, 4, 4, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("interval", [(3, 3), (4, 2), (-1, 2), (0, 6)])
def test_a_guidance_interval_outside_the_steps_is_refused(labels, interval):
    with pytest.raises(InputError, match="LO < HI <= 5"):
        labels.generate(labels=LABELS, num_inference_steps=5, guidance_interval=interval)


@pytest.mark.parametrize("kind", ["text", "labels"])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_an_image_does_not_depend_on_its_batch(request, kind, batch_size):
    pipeline = request.getfixturevalue(kind)
    conditions = {"prompts": PROMPTS} if kind == "text" else {"labels": LABELS}
    whole = arrays(pipeline.generate(**conditions, seeds=SEEDS, batch_size=5))
    cut = arrays(pipeline.generate(**conditions, seeds=SEEDS, batch_size=batch_size))
    assert np.abs(whole - cut).max() <= 1
    order = [3, 1, 4]
    chosen = {key: [values[i] for i in order] for key, values in conditions.items()}
    alone = arrays(pipeline.generate(**chosen, seeds=[SEEDS[i] for i in order], batch_size=batch_size))
    assert np.abs(whole[order] - alone).max() <= 1


@pytest.mark.parametrize("kind", ["text", "labels"])
def test_padding_for_static_shapes_changes_no_image(monkeypatch, request, kind):
    pipeline = request.getfixturevalue(kind)
    conditions = {"prompts": PROMPTS} if kind == "text" else {"labels": LABELS}
    monkeypatch.setattr(pipeline.engine, "decode_pixels", 2 * 32**2)
    expected = arrays(pipeline.generate(**conditions, seeds=SEEDS, batch_size=3))
    monkeypatch.setattr(type(pipeline.engine), "static_shapes", True)
    calls = watch(monkeypatch, pipeline)
    padded = arrays(pipeline.generate(**conditions, seeds=SEEDS, batch_size=3))
    assert np.abs(padded - expected).max() <= 1
    shapes = {network: {batch for name, batch in calls if name == network} for network, _ in calls}
    assert all(len(batches) <= 2 for batches in shapes.values()), shapes  # two compilations per network at most
    assert shapes["unet"] == {6, 4}


def test_openvino_compiles_one_shape_per_network_and_agrees(text_bundle, text):
    openvino: Any = load(text_bundle, "openvino", dtype="fp32")
    images = arrays(openvino.generate(PROMPTS, seeds=SEEDS, batch_size=5))
    assert len(openvino.engine._lanes) == 3
    assert np.abs(images - arrays(text.generate(PROMPTS, seeds=SEEDS, batch_size=5))).max() <= 1


def test_large_images_are_decoded_in_several_forwards(monkeypatch, text):
    whole = arrays(text.generate(PROMPTS, seeds=SEEDS))
    monkeypatch.setattr(text.engine, "decode_pixels", 2 * 32**2)
    calls = watch(monkeypatch, text)
    cut = arrays(text.generate(PROMPTS, seeds=SEEDS))
    assert [batch for network, batch in calls if network == "vae_decoder"] == [2, 2, 1]
    assert np.abs(whole - cut).max() <= 1


def test_many_prompts_are_encoded_in_equal_batches_once_each(monkeypatch, text):
    calls = watch(monkeypatch, text)
    prompts = [f"prompt {i}" for i in range(20)] * 2
    text.generate(prompts, guidance_scale=1.0, num_inference_steps=1, batch_size=40)
    assert [batch for network, batch in calls if network == "text_encoder"] == [10, 10]


def test_every_sampler_gives_pictures_and_stochastic_ones_are_reproducible(labels):
    for scheduler in ("ddpm", "ddim", "dpmpp-2m-sde", "euler-ancestral", "kdpm2"):
        images = arrays(labels.generate(labels=LABELS[:2], seeds=[1, 2], scheduler=scheduler, num_inference_steps=10))
        again = arrays(labels.generate(labels=LABELS[:2], seeds=[1, 2], scheduler=scheduler, num_inference_steps=10))
        assert np.array_equal(images, again)
        assert images.std() > 10, scheduler


def test_seeds_decide_and_without_them_the_base_seed_does(labels):
    same, other = (labels.generate(labels=LABELS[:1] * 2, seeds=seeds) for seeds in ([7, 7], [7, 8]))
    assert np.array_equal(*arrays(same))
    assert not np.array_equal(*arrays(other))
    first, second, third = (arrays(labels.generate(labels=LABELS[:2], seed=seed)) for seed in (0, 0, 1))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, third)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "needs prompts, labels, or for a model without conditions a count"),
        ({"labels": []}, "at least one"),
        ({"prompts": ["a"], "labels": [["red cube"]]}, "request 0 holds text and labels; this model takes labels"),
        ({"prompts": "a single string"}, "lists of prompts"),
        ({"prompts": ["a", "b"], "labels": [["red cube"]]}, "or both of the same length"),
        ({"count": 2}, "request 0 holds nothing; this model takes labels"),
        ({"labels": [["red cube"]], "count": 2}, "of the same length"),
        ({"prompts": ["a dragon"]}, "this model takes labels"),
        ({"labels": "red cube"}, "lists of prompts, of label lists"),
        ({"labels": [3]}, "unknown label '3'"),
        ({"labels": [["red cub"]]}, "unknown label 'red cub'; did you mean 'red cube'?"),
        ({"labels": [[]]}, "expected a list of one or more"),
        ({"labels": [["red cube"]], "seeds": [1, 2]}, "2 seeds for 1 images"),
        ({"labels": [["red cube"]], "seeds": [-1]}, "0 <= seed < 2**63"),
        ({"labels": [["red cube"]], "seeds": [2**63]}, "0 <= seed < 2**63"),
        ({"labels": [["red cube"]], "batch_size": 0}, "batch_size is 0"),
        ({"labels": [["red cube"]], "num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"labels": [["red cube"]], "num_inference_steps": -3}, "num_inference_steps is -3"),
        ({"labels": [["red cube"]], "guidance_scale": math.nan}, "guidance_scale is nan"),
        ({"labels": [["red cube"]], "guidance_scale": -1.0}, "guidance_scale is -1.0"),
        ({"labels": [["red cube"]], "scheduler": "dddim"}, "unknown scheduler 'dddim'; did you mean 'ddim'?"),
        ({"labels": [["red cube"]], "scheduler": "ddim:50"}, "scheduler is 'ddim:50', expected a name"),
    ],
)
def test_wrong_arguments_are_one_line(labels, arguments, words):
    with pytest.raises(InputError) as error:
        labels.generate(**arguments)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_text_model_refuses_labels_and_what_is_no_text(text):
    for arguments, words in (
        ({"labels": [["red cube"]]}, "this model takes a prompt"),
        ({"prompts": [3]}, "expected text"),
        ({"prompts": [" "]}, "is empty"),
    ):
        with pytest.raises(InputError, match=words):
            text.generate(**arguments)


def test_one_label_needs_no_list_of_its_own(labels):
    options = {"seeds": [3], "num_inference_steps": 2}
    assert np.array_equal(
        *(arrays(labels.generate(labels=given, **options)) for given in (["red cube"], [["red cube"]]))
    )


def test_values_that_are_not_finite_are_no_images(label_bundle, scaled_weights, tmp_path):
    broken = load(scaled_weights(label_bundle, tmp_path / "bundle", math.nan), "ort")
    with pytest.raises(FloatingPointError, match="image 0: 768 of 768 values are not finite"):
        broken.generate(labels=LABELS[:2])


def test_overflow_on_the_way_is_reported_once_and_not_by_numpy_s_warnings(labels, monkeypatch):
    monkeypatch.setattr(labels.engine, "run", lambda network, x, *rest: (np.full_like(x, np.inf),))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(FloatingPointError, match="not finite"):
            labels.generate(labels=LABELS[:2], scheduler="ddim", guidance_scale=2.0)


def test_settings_fall_back_to_the_model_s_own(text, labels):
    assert text.settings() == Settings("ddim", 5, 3.0)
    assert labels.settings(num_inference_steps=7).solver == "ddpm:7"
    assert not labels.settings(guidance_scale=1).guided


def test_the_objects_of_a_model_are_read_without_loading_it(label_bundle, label_model, text_bundle, text_model):
    assert find_model(label_bundle).objects == find_model(label_model).objects == ICLEVR_OBJECTS
    assert load(label_bundle, "ort").spec.condition.labels == ICLEVR_OBJECTS
    assert find_model(text_bundle).objects is None
    assert find_model(text_model).objects is None
