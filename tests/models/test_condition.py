"""What a model is conditioned on and the space that it works in: the denoiser's inputs, what requests may say, and JSON."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from fastgen.errors import InputError
from fastgen.files.records import builtins, to_record
from fastgen.models.condition import CLASS, GUIDANCE, POOLED, STATES, Condition, Text
from fastgen.models.signatures import model_signatures
from fastgen.models.space import Space

CLIP = Text((77,), (1000,), width=32, pooled=24)
XL = Text((77, 77), (1000, 900), width=56, pooled=24, pooled_input=True, zero_unconditional=True)
CLASSES = {"cat": 0, "dog": 1}
CONDITIONS = [
    Condition(),
    Condition(CLIP),
    Condition(XL, guidance_width=256),
    Condition(labels={"red": 0, "blue": 1, "green": 2}),
    Condition(CLIP, classes=CLASSES, null_class=2),
    Condition(classes=CLASSES),
    Condition(number=True),
]


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_condition_comes_back_from_json(condition: Condition) -> None:
    assert to_record(json.loads(json.dumps(builtins(condition))), Condition) == condition


@pytest.mark.parametrize(
    ("condition", "inputs", "kind", "takes"),
    [
        (CONDITIONS[0], [], "nothing", "nothing but a seed"),
        (CONDITIONS[1], [(STATES, ("batch", 77, 32))], "text", "a prompt"),
        (
            CONDITIONS[2],
            [(STATES, ("batch", 77, 56)), (POOLED, ("batch", 24)), (GUIDANCE, ("batch", 256))],
            "text",
            "a prompt",
        ),
        (CONDITIONS[3], [(CLASS, ("batch", 3))], "labels", "labels"),
        (
            CONDITIONS[4],
            [(STATES, ("batch", 77, 32)), (CLASS, ("batch",))],
            "text and labels",
            "a prompt and one class",
        ),
        (CONDITIONS[6], [(CLASS, ("batch",))], "labels", "one number"),
    ],
)
def test_a_condition_says_which_inputs_follow_sample_and_timestep(
    condition: Condition, inputs: list[Any], kind: str, takes: str
) -> None:
    assert [(name, shape) for name, _, shape, _ in condition.inputs] == inputs
    assert (condition.kind, condition.takes) == (kind, takes)
    unet = model_signatures(condition, Space((3, 8, 8), (3, 8, 8), latent=False))["unet"]
    assert [tensor.name for tensor in unet.inputs] == ["sample", "timestep", *(name for name, _ in inputs)]


def test_class_ids_are_integers_below_all_ids_and_the_null_class() -> None:
    ((name, dtype, shape, high),) = Condition(classes=CLASSES, null_class=7).inputs
    assert (name, dtype, shape, high) == (CLASS, "int64", ("batch",), 8)
    unet = model_signatures(Condition(classes=CLASSES), Space((3, 8, 8), (3, 8, 8), latent=False))["unet"]
    ids = unet.sample_inputs(50, np.random.default_rng(0))[CLASS]
    assert (ids.dtype, set(ids.tolist())) == (np.dtype(np.int64), {0, 1})


@pytest.mark.parametrize("condition", [c for c in CONDITIONS if c.text or c.labels])
def test_what_has_an_unconditional_row_or_takes_its_scale_as_an_input_is_guided(condition: Condition) -> None:
    condition.check_guided(3.0)


@pytest.mark.parametrize(
    ("condition", "reason"),
    [
        (Condition(), "it has no condition"),
        (Condition(classes=CLASSES), "it was trained without an unconditional class"),
        (Condition(number=True), "it was trained without an unconditional class"),
    ],
)
def test_guidance_that_means_nothing_is_refused(condition: Condition, reason: str) -> None:
    condition.check_guided(1.0)
    with pytest.raises(InputError, match=f"guidance_scale is 2.5, but this model cannot be guided: {reason}; give 1"):
        condition.check_guided(2.5)
    Condition(classes=CLASSES, null_class=2).check_guided(2.5)


def test_a_class_is_said_by_its_name_or_its_number() -> None:
    condition = Condition(classes={"cat": 3, "1": 5, "dog": 1})
    assert [condition.class_id([label]) for label in ("cat", "3", "dog", "1")] == [3, 3, 1, 5]  # a name comes first
    for labels, words in (
        (["cow"], "unknown class 'cow'"),
        (["2"], "unknown class '2'"),
        (["-1"], "unknown class '-1'"),
        (["cat", "dog"], "labels: found 2, this model takes exactly one class per image"),
        ([], "labels: found 0, this model takes exactly one class"),
    ):
        with pytest.raises(InputError, match=words):
            condition.check_labels(labels)


def test_a_number_is_any_finite_one() -> None:
    condition = Condition(number=True)
    assert condition.numeric(["-12.5e1"]) == -125
    for text, words in (("north", "expected a number"), ("nan", "a finite number"), ("-inf", "a finite number")):
        with pytest.raises(InputError, match=words):
            condition.check_labels([text])
    with pytest.raises(InputError, match="exactly one number per image"):
        condition.check_labels(["1", "2"])


def test_labels_classes_and_a_number_exclude_each_other() -> None:
    with pytest.raises(InputError, match="found labels and classes"):
        Condition(labels={"a": 0}, classes=CLASSES)


SPACES = [
    Space((3, 8, 6), (3, 8, 6), latent=False),
    Space((4, 8, 8), (3, 64, 64), latent=True, scaling_factor=0.18215),
    Space((2, 4, 4), (3, 8, 8), latent=True, scaling_factor=0.7, shift_factor=0.1159),
    Space((2, 4, 4), (3, 8, 8), latent=True, scaling_factor=0.5, mean=(-1.5, 2.0), std=(8.4, 0.3)),
]


@pytest.mark.parametrize("space", SPACES)
def test_a_space_comes_back_from_json_and_its_two_functions_are_inverse(space: Space) -> None:
    assert to_record(json.loads(json.dumps(builtins(space))), Space) == space
    z = np.random.default_rng(0).standard_normal((2, *space.shape), dtype=np.float32)
    latents = space.to_vae(z)
    assert latents.dtype == np.float32
    np.testing.assert_allclose(space.from_vae(latents), z, atol=1e-5)


def test_latents_are_those_of_diffusers() -> None:
    """`latents / scaling_factor + shift_factor`, or with statistics of each channel `latents * std / scaling_factor + mean`."""
    torch = pytest.importorskip("torch")
    z = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    shifted, normed = SPACES[2:]
    torch.testing.assert_close(shifted.to_vae(z, torch.from_numpy), z / 0.7 + 0.1159)
    mean, std = (torch.tensor(values).view(1, 2, 1, 1) for values in (normed.mean, normed.std))
    torch.testing.assert_close(normed.to_vae(z, torch.from_numpy), z * std / 0.5 + mean)
    torch.testing.assert_close(normed.from_vae(z, torch.from_numpy), (z - mean) * 0.5 / std)
    torch.testing.assert_close(shifted.from_vae(z, torch.from_numpy), (z - 0.1159) * 0.7)


def test_a_space_says_its_size_width_first_and_which_images_are_no_png() -> None:
    assert [space.size for space in SPACES[:2]] == ["6 x 8 px", "64 px"]
    assert [space.pixels for space in SPACES[:2]] == [48, 4096]
    SPACES[0].check_writable()
    with pytest.raises(InputError, match="images have 5 channels; PNG files have 1 to 4"):
        Space((5, 8, 8), (5, 8, 8), latent=False).check_writable()
