"""Prompts' states: encoded in fixed batches, to the same bits however often, and never kept for a whole job."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

from fastgen.generate.conditions import ENCODE_BATCH, PromptConditions
from fastgen.generate.pipeline import load
from fastgen.generate.requests import Request

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


def requests(prompts):
    return [Request(str(i), f"{i}.png", prompt=prompt) for i, prompt in enumerate(prompts)]


def conditions(pipeline, batches):
    width = pipeline.spec.signatures["text_encoder"].outputs[0]
    size = 4 * int(np.prod(width.with_batch(ENCODE_BATCH)))
    return PromptConditions(pipeline.engine, pipeline.tokenizer, PROMPTS, True, state_bytes=batches * size)


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
        assert np.array_equal(held(requests(mixed)), expected)
    assert np.array_equal(held.uncond(), whole.uncond())


def test_the_unconditional_row_outlives_its_batch_and_is_encoded_once(pipeline, encoded):
    held = conditions(pipeline, 1)
    first = held.uncond()
    held(requests(PROMPTS[-3:]))
    before = len(encoded)
    assert np.array_equal(held.uncond(), first)
    assert len(encoded) == before
    gc.collect()
    assert encoded[0]() is None


def test_a_batch_of_more_prompts_than_are_kept_is_whole(pipeline):
    mixed = PROMPTS[::7]
    assert np.array_equal(conditions(pipeline, 1)(requests(mixed)), conditions(pipeline, 100)(requests(mixed)))
