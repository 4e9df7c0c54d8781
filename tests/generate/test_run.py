"""What a run refuses before anything is computed, whoever asks for it: a job, a notebook, a certificate."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastgen.errors import InputError
from fastgen.generate.pipeline import load
from fastgen.generate.requests import Request
from fastgen.generate.run import Run

LABELS = [Request("0", "0.png", labels=("red cube",))]


@pytest.fixture(scope="module")
def labels(label_bundle):
    return load(label_bundle, "ort")


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_generate_refuses_a_guidance_interval_outside_the_solver_s_rows(labels, scale):
    with pytest.raises(InputError, match="guidance interval 2 9, expected 0 <= LO < HI <= 4, the rows of ddim:4"):
        labels.generate(
            labels=[["red cube"]],
            scheduler="ddim",
            num_inference_steps=4,
            guidance_scale=scale,
            guidance_interval=(2, 9),
        )


def test_a_late_start_and_its_latents_go_together(labels):
    with pytest.raises(InputError, match="give both or neither"):
        Run(labels, LABELS, labels.settings().late())

    class Latents:
        """Of no use without steps to skip."""

    with pytest.raises(InputError, match="give both or neither"):
        Run(labels, LABELS, labels.settings(), Latents())


@pytest.mark.parametrize("options", [{"noise_steps": 2}, {"strength": 0.5}, {"rag_top_k": 1}])
def test_what_concerns_a_start_is_refused_without_one(labels, options):
    with pytest.raises(InputError, match="give --rag INDEX too"):
        labels.generate(labels=[["red cube"]], **options)


def test_requests_of_another_kind_are_refused(labels):
    with pytest.raises(InputError, match="request 0 holds text; this model takes labels"):
        Run(labels, [Request("0", "0.png", prompt="a dragon")], labels.settings())


def test_a_run_s_batches_cover_its_requests_and_its_rows_are_guided_where_the_settings_say(labels):
    requests = [replace(LABELS[0], id=str(i), image_name=f"{i}.png", seed=i) for i in range(5)]
    settings = labels.settings(scheduler="ddim", num_inference_steps=4, guidance_interval=(1, 3))
    run = Run(labels, requests, settings)
    assert (len(run.table), run.guided) == (4, (1, 3))
    assert [(b.start, b.stop) for b in run.batches(2)] == [(0, 2), (2, 4), (4, 5)]
    rows = []
    for batch in run.batches(2):
        pictures = run.begin(batch, on_row=rows.append)()
        assert pictures.pixels.shape == (len(batch), 16, 16, 3)
    assert rows == [-1, 0, 1, 2, 3] * 3
