"""Prompts' states: encoded in fixed batches, to the same bits however often, and never kept for a whole job."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

from fastgen.errors import InputError
from fastgen.generate.conditions import ENCODE_BATCH, PromptConditions, check_requests
from fastgen.generate.pipeline import load
from fastgen.generate.requests import Request
from fastgen.models.condition import Condition, Text

TEXT, CLASSES = Condition(Text((77,), (600,), 32, 32)), Condition(classes={"cat": 0, "dog": 1}, null_class=2)
PROMPTS = [f"a red dragon number {i}" for i in range(10 * ENCODE_BATCH)]


@pytest.fixture(scope="module")
def pipeline(text_bundle):
    return load(text_bundle, "ort")


@pytest.fixture
def encoded(pipeline, monkeypatch):
    """Weak references to everything that the text encoder has said."""
    said, run = [], pipeline.engine.run

    def noted(network, *inputs):
        outputs = run(network, *inputs)
        said.append(weakref.ref(outputs[0]))
        return outputs

    monkeypatch.setattr(pipeline.engine, "run", noted)
    return said


def same(first, second):
    """Whether states and pooled states are the same bits."""
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def requests(prompts):
    return [Request(str(i), f"{i}.png", prompt=prompt) for i, prompt in enumerate(prompts)]


def conditions(pipeline, batches):
    width = pipeline.spec.signatures["text_encoder"].outputs[0]
    size = 4 * int(np.prod(width.with_batch(ENCODE_BATCH)))
    return PromptConditions(pipeline.engine, pipeline.tokenizers, PROMPTS, True, state_bytes=batches * size)


def test_states_of_batches_that_were_used_are_let_go(pipeline, encoded):
    held = conditions(pipeline, 3)
    alive = []
    for start in range(0, len(PROMPTS), 8):
        held(requests(PROMPTS[start : start + 8]))
        alive.append(sum(ref() is not None for ref in encoded))
    assert max(alive) == 3
    assert len(encoded) == 11  # each once: 160 prompts and the empty one


def test_what_was_let_go_is_encoded_again_to_the_same_bits(pipeline, encoded):
    held, whole = conditions(pipeline, 1), conditions(pipeline, 100)
    mixed = [PROMPTS[i] for i in (150, 3, 77, 3, 150, 20)]
    expected = whole(requests(mixed))
    for _ in range(2):
        assert same(held(requests(mixed)), expected)
    assert same(held.uncond(), whole.uncond())


def test_the_unconditional_row_outlives_its_batch_and_is_encoded_once(pipeline, encoded):
    held = conditions(pipeline, 1)
    first = held.uncond()
    held(requests(PROMPTS[-3:]))
    before = len(encoded)
    assert same(held.uncond(), first)
    assert len(encoded) == before
    gc.collect()
    assert encoded[0]() is None


def test_a_batch_of_more_prompts_than_are_kept_is_whole(pipeline):
    mixed = PROMPTS[::7]
    assert same(conditions(pipeline, 1)(requests(mixed)), conditions(pipeline, 100)(requests(mixed)))


@pytest.mark.parametrize(
    ("condition", "asked", "words"),
    [
        (TEXT, {}, "request 7 holds nothing; this model takes a prompt"),
        (TEXT, {"prompt": "a", "labels": ("x",)}, "request 7 holds text and labels; this model takes a prompt"),
        (CLASSES, {"prompt": "a"}, "request 7 holds text; this model takes one class"),
        (
            CLASSES,
            {"labels": ("cat", "dog")},
            "request 7: labels: found 2, this model takes exactly one class per image",
        ),
        (CLASSES, {"labels": ("cow",)}, "request 7: unknown class 'cow'"),
        (Condition(), {"labels": ("cat",)}, "request 7 holds labels; this model takes nothing but a seed"),
        (Condition(number=True), {"labels": ("north",)}, "request 7: class: found 'north', expected a number"),
    ],
)
def test_a_request_holds_what_the_model_takes(condition, asked, words):
    with pytest.raises(InputError, match=words):
        check_requests([Request("7", "7.png", **asked)], condition)


def test_requests_that_hold_what_the_model_takes_pass():
    for condition, asked in (
        (TEXT, {"prompt": "a"}),
        (CLASSES, {"labels": ("1",)}),
        (Condition(), {}),
        (Condition(TEXT.text, labels={"x": 0}), {"prompt": "a", "labels": ("x",)}),
    ):
        check_requests([Request("7", "7.png", **asked)], condition)
