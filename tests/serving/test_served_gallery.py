"""People's models are served: every entry of the gallery gives over the batcher what the pipeline gives."""

from __future__ import annotations

import io
import time

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from gallery import ENTRIES  # noqa: E402

from fastgen.generate.pipeline import load  # noqa: E402
from fastgen.models.lora import parse_loras  # noqa: E402
from fastgen.serving.batch import Batcher  # noqa: E402
from fastgen.serving.messages import Failed, Finished, ImageTask, Preview, Refused, Submit  # noqa: E402
from fastgen.serving.preparing import Preparer  # noqa: E402
from fastgen.serving.ready import example_task, first_image, ready_of  # noqa: E402
from fastgen.serving.warm import warm_up  # noqa: E402

FAST = ("text_and_class", "unconditional", "class_ids")  # in bin/test too
pytestmark = pytest.mark.filterwarnings("ignore")


def outcomes(batcher, tasks):
    """What becomes of the tasks, which are submitted one step apart: id -> outcome; and all previews."""
    waiting, ended, previews = list(enumerate(tasks)), {}, []
    while waiting or batcher.busy or batcher.preparing:
        if waiting:
            position, task = waiting.pop(0)
            batcher.submit(Submit(position, task, "", time.monotonic()))
        for outcome in batcher.advance(time.monotonic()):
            if isinstance(outcome, Finished | Failed | Refused):
                ended[outcome.id] = outcome
            elif isinstance(outcome, Preview):
                previews.append(outcome)
    return ended, previews


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in ENTRIES]
)
def test_a_served_folder_gives_the_pictures_of_the_pipeline(name, tmp_path):
    piece = ENTRIES[name](tmp_path / name)
    words = dict(zip(piece.options[::2], piece.options[1::2], strict=False))
    size = (int(words["--height"]), int(words["--width"])) if "--height" in words else None
    loras = parse_loras([words["--lora"]]) if "--lora" in words else None
    pipeline = load(tmp_path / name, "eager", size=size, loras=loras, threads=1)
    condition = pipeline.spec.condition
    warm = warm_up(
        pipeline, guided=condition.guidable and not condition.guidance_width, exact=True, say=lambda line: None
    )
    preparer = Preparer(pipeline)
    batcher = Batcher(pipeline, preparer, warm, max_wait_s=30)
    example = example_task(pipeline)
    first_image(batcher, example)
    ready = ready_of(pipeline, warm, preparer)
    assert (ready.condition.kind, ready.exact) == (condition.kind, True)
    settings = {"num_inference_steps": int(piece.steps), "guidance_scale": float(piece.guidance)}
    tasks = [ImageTask(seed, example.prompt, example.labels, previews=2, **settings) for seed in (0, 5, 6)]
    tasks += [ImageTask(7, example.prompt, example.labels, guidance_scale=1.0, num_inference_steps=int(piece.steps))]
    ended, previews = outcomes(batcher, tasks)
    assert {type(outcome) for outcome in ended.values()} == {Finished}, ended
    for i, task in enumerate(tasks):
        options = {
            "seed": task.seed,
            "num_inference_steps": task.num_inference_steps,
            "guidance_scale": task.guidance_scale,
        }
        given = {
            "prompts": None if task.prompt is None else [task.prompt],
            "labels": None if task.labels is None else [task.labels],
        }
        if task.prompt is None and task.labels is None:
            given = {"count": 1}
        (expected,) = pipeline.generate(**given, seeds=[task.seed], batch_size=1, **options)
        found = np.asarray(Image.open(io.BytesIO(ended[i].data)))
        np.testing.assert_array_equal(found, np.asarray(expected))
    if int(piece.steps) > 2:
        assert previews
    for preview in previews:
        assert np.asarray(Image.open(io.BytesIO(preview.data))).shape == found.shape
