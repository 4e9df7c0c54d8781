"""The batcher: faults of single images, memory that runs out, previews, deadlines, and what is told of all that."""

from __future__ import annotations

import io
import time

import numpy as np
import pytest
from PIL import Image

from fastgen.generate.pipeline import load
from fastgen.serving.batch import Batcher
from fastgen.serving.messages import Accepted, Begun, Failed, Finished, ImageTask, Preview, Refused, Submit
from fastgen.serving.picture import preview_rows
from fastgen.serving.preparing import Preparer
from fastgen.serving.warm import Warm, warm_up

pytest.importorskip("onnxruntime")
PROMPT = "A red dragon with wings and horns. The monster is idling."


@pytest.fixture(scope="module")
def pipeline(text_bundle):
    return load(text_bundle, "ort", threads=1)


@pytest.fixture(scope="module")
def warm(pipeline) -> Warm:
    found = warm_up(pipeline, guided=True, exact=True, say=lambda line: None)
    sizes = (1, 2, 4)  # whatever was measured, so that the tests do not depend on the machine
    costs = type(found.costs)(dict.fromkeys(sizes, 0.01), dict.fromkeys(sizes, 0.01), dict.fromkeys(sizes, 0.01))
    return Warm(sizes, sizes, sizes, 4, found.exact, costs)


@pytest.fixture
def batcher(pipeline, warm):
    return Batcher(pipeline, Preparer(pipeline), warm, max_wait_s=30)


def submit(batcher, id, deadline=None, **fields):
    task = ImageTask(**{"seed": id, "prompt": PROMPT, "num_inference_steps": 5, **fields})
    batcher.submit(Submit(id, task, "", time.monotonic(), deadline))


def told(batcher, ticks=400):
    """All that is told until nothing is left to do."""
    outcomes = []
    for _ in range(ticks):
        outcomes += batcher.advance(time.monotonic())
        if not (batcher.busy or batcher.preparing):
            return outcomes
        time.sleep(0.001 if batcher.preparing else 0)
    raise AssertionError("there is still something to do")


def of(outcomes, kind):
    return {outcome.id: outcome for outcome in outcomes if isinstance(outcome, kind)}


def test_everything_about_an_image_is_told_in_order(batcher):
    submit(batcher, 7, previews=2)
    outcomes = told(batcher)
    assert [type(outcome) for outcome in outcomes] == [Accepted, Begun, Preview, Preview, Finished]
    accepted, _, first, second, finished = outcomes
    assert (accepted.rows, accepted.guided) == (5, 5)
    assert [(p.index, p.row) for p in (first, second)] == [(0, 2), (1, 4)]
    assert finished.line["seed"] == 7
    assert finished.queue_s >= 0
    report = batcher.report()
    assert (report.positions, report.steps, report.used) == ({7: 5}, 5, 10)
    assert batcher.report() is None


def test_the_last_preview_looks_like_the_picture(batcher):
    submit(batcher, 1, previews=9, num_inference_steps=10, guidance_scale=1.0)
    outcomes = told(batcher)
    pixels = [np.asarray(Image.open(io.BytesIO(o.data)), float) for o in outcomes if isinstance(o, Preview | Finished)]
    distances = [np.abs(image - pixels[-1]).mean() for image in pixels[:-1]]
    assert len(distances) == 9
    assert distances[-1] < 0.5 * distances[0]


@pytest.mark.parametrize("output_format", ["jpeg", "webp", "png"])
def test_files_have_the_format_that_was_asked_for(batcher, output_format):
    submit(batcher, 1, output_format=output_format, previews=1)
    outcomes = told(batcher)
    for outcome in [*of(outcomes, Finished).values(), *of(outcomes, Preview).values()]:
        assert Image.open(io.BytesIO(outcome.data)).format.lower() == output_format


def test_a_lower_quality_makes_a_smaller_file(batcher):
    for id, quality in enumerate((5, 95)):
        submit(batcher, id, seed=3, output_format="jpeg", output_compression=quality)
    low, high = of(told(batcher), Finished).values()
    assert len(low.data) < len(high.data)


def test_a_text_encoder_that_fails_concerns_one_image(batcher, pipeline, monkeypatch):
    run = pipeline.engine.run

    def failing(network, *inputs):
        if network == "text_encoder":
            raise RuntimeError("no words")
        return run(network, *inputs)

    submit(batcher, 1)
    assert set(of(told(batcher), Finished)) == {1}  # its prompt is known from here on
    monkeypatch.setattr(pipeline.engine, "run", failing)
    submit(batcher, 2)
    submit(batcher, 3, prompt="A prompt that nobody has asked for yet")
    outcomes = told(batcher)
    assert set(of(outcomes, Finished)) == {2}
    assert of(outcomes, Failed)[3].code == "engine_error"
    assert "no words" in of(outcomes, Failed)[3].message


def test_a_decoder_that_fails_concerns_one_image(batcher, pipeline, monkeypatch):
    start, calls = pipeline.decoder.start, []

    def failing(x, normalize="clamp", limit=None):
        calls.append(len(x))
        if len(calls) in (1, 3):  # together, and then the second one alone
            raise RuntimeError("no picture")
        return start(x, normalize, limit)

    monkeypatch.setattr(pipeline.decoder, "start", failing)
    for id in (1, 2, 3):
        submit(batcher, id, num_inference_steps=1)
    outcomes = told(batcher)
    assert calls == [4, 1, 1, 1]
    assert set(of(outcomes, Finished)) == {1, 3}
    assert of(outcomes, Failed)[2].message == "RuntimeError: no picture"


def test_where_memory_runs_out_steps_have_fewer_images(batcher, pipeline, monkeypatch):
    guided, sizes = pipeline.engine.run_guided, []

    def short(sample, timestep, *conds):
        sizes.append(len(sample))
        if len(sample) > 2:
            raise MemoryError("too many")
        return guided(sample, timestep, *conds)

    monkeypatch.setattr(pipeline.engine, "run_guided", short)
    for id in range(4):
        submit(batcher, id, num_inference_steps=3)
    outcomes = told(batcher)
    assert set(of(outcomes, Finished)) == {0, 1, 2, 3}
    assert sizes[:5] == [4, 1, 1, 1, 1]
    assert max(sizes[5:]) == 2


def test_a_deadline_and_a_cancellation_free_the_slot(batcher):
    submit(batcher, 1, deadline=time.monotonic() + 60, num_inference_steps=150, scheduler="ddpm")
    submit(batcher, 2, num_inference_steps=150, scheduler="ddpm")
    accepted = []
    while len(accepted) < 2:
        accepted += [o for o in batcher.advance(time.monotonic()) if isinstance(o, Accepted)]
    list(batcher.advance(time.monotonic()))
    batcher.cancel(2)
    outcomes = list(batcher.advance(time.monotonic() + 61))
    assert of(outcomes, Failed)[1].code == "deadline"
    assert batcher._slots.free == batcher._slots._capacity


def test_what_the_model_does_not_take_is_refused_before_it_begins(batcher):
    submit(batcher, 1, prompt=None, labels=("red cube",))
    submit(batcher, 2, scheduler="nothing")
    submit(batcher, 3, num_inference_steps=1)
    outcomes = told(batcher)
    assert {id: refused.param for id, refused in of(outcomes, Refused).items()} == {1: "prompt", 2: "scheduler"}
    assert set(of(outcomes, Finished)) == {3}


@pytest.mark.parametrize(("rows", "previews", "expected"), [(10, 3, [3, 5, 8]), (2, 5, [1]), (1, 3, []), (4, 0, [])])
def test_previews_are_evenly_spaced_before_the_last_row(rows, previews, expected):
    assert preview_rows(rows, previews) == expected
