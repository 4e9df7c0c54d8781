"""diffusers at the authors' sampling against an engine at the model's own: both sides' pictures, their scores and the ratio."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("onnxruntime")

from click.testing import CliRunner
from gallery import labels_on_latents
from PIL import Image

from benchmarks import authors
from fastgen.generate.job import run_job
from fastgen.generate.pipeline import load
from fastgen.generate.recipe import Recipe
from fastgen.generate.requests import Request, read_requests

HOW = {"batch": 2, "threads": 1}


@pytest.fixture
def requests_file(tmp_path):
    file = tmp_path / "test.json"
    file.write_text(json.dumps([["red cube"], ["red cube", "blue sphere"], ["gray cylinder"]]))
    return file


def pictures(folder, requests):
    return np.stack([np.asarray(Image.open(folder / request.image_name)).astype(int) for request in requests])


def test_diffusers_starts_from_the_noise_of_the_engine(label_model, label_bundle, requests_file, tmp_path):
    pipeline, requests = load(label_bundle, "ort", dtype="fp32"), read_requests(requests_file)
    side = authors.by_diffusers(label_model, pipeline, requests, "ddim:4", 2.0, HOW)
    assert side.evaluations == 8
    side.make(tmp_path / "diffusers", 3)
    sampling = {"seed": 3, "scheduler": "ddim", "num_inference_steps": 4, "guidance_scale": 2.0}
    run_job(Recipe(requests, sampling).run(pipeline, None), tmp_path / "engine", progress=False)
    expected, found = (pictures(tmp_path / name, requests) for name in ("diffusers", "engine"))
    assert len(expected) == 3
    assert np.abs(expected - found).max() <= 1
    assert np.ptp(expected, axis=0).max() > 50  # noise of each request's own


def test_latents_of_labels_are_decoded_with_their_scale(tmp_path):
    labels_on_latents(tmp_path / "model")
    pipeline = load(tmp_path / "model", "eager", dtype="fp32")
    assert pipeline.spec.space.scaling_factor != 1
    requests = [Request(str(i), f"{i}.png", labels=[f"label {i}"]) for i in range(2)]
    authors.by_diffusers(tmp_path / "model", pipeline, requests, "ddim:4", 2.0, HOW).make(tmp_path / "diffusers", 3)
    sampling = {"seed": 3, "scheduler": "ddim", "num_inference_steps": 4, "guidance_scale": 2.0}
    run_job(Recipe(requests, sampling).run(pipeline, None), tmp_path / "engine", progress=False)
    expected, found = (pictures(tmp_path / name, requests) for name in ("diffusers", "engine"))
    assert np.abs(expected - found).max() <= 1
    assert np.ptp(expected) > 50


def test_the_ratio_is_of_turns_and_scores_have_standard_errors(label_model, label_bundle, requests_file, tmp_path):
    words = [requests_file, "--model", label_model, "--bundle", label_bundle, "--evaluator", "evaluator-iclevr"]
    words += ["--solver", "ddim:4", "--guidance", 2, "--engine", "ort", "--dtype", "fp32", "--seeds", 2, "--threads", 1]
    words += ["--own", "ddim:3", "--own", "ddim:2", "--own", "ddim:3"]
    words += ["--work", tmp_path / "work", "--out", tmp_path / "out.json"]
    done = CliRunner().invoke(authors.main, list(map(str, words)), catch_exceptions=False)
    assert done.exit_code == 0
    found = json.loads((tmp_path / "out.json").read_text())
    first, second, third = found["rows"]
    assert [row["sampling"].partition(",")[0] for row in found["rows"]] == ["ddim:4", "ddim:3", "ddim:2"]
    assert second["evaluations_per_image"] == 1.5 * third["evaluations_per_image"]
    assert (first["side"], first["sampling"], first["evaluations_per_image"]) == (
        "diffusers fp32",
        "ddim:4, guidance 2",
        8,
    )
    assert second["side"] == "ort fp32"
    assert first["ratio"] == 1
    assert second["ratio"] > 0
    assert first["images_per_s"] > 0
    again = CliRunner().invoke(authors.main, list(map(str, words)))
    assert (
        str(again.exception)
        == f"error: {tmp_path / 'work'}: exists already; pictures that are there would not be made again"
    )
    scores = [name for name in first if f"{name}_se" in first]
    assert scores
    assert all(0 <= row[name] <= 1 for row in (first, second) for name in scores)


@pytest.mark.parametrize("solver", ["nope:4", "ddim:4:2"])
def test_a_solver_that_does_not_exist_is_one_line(label_model, label_bundle, requests_file, tmp_path, solver):
    words = [requests_file, "--model", label_model, "--bundle", label_bundle, "--evaluator", "evaluator-iclevr"]
    words += ["--solver", solver, "--guidance", 2, "--engine", "ort", "--dtype", "fp32", "--work", tmp_path / "work"]
    done = CliRunner().invoke(authors.main, [*map(str, words), "--out", str(tmp_path / "out.json")])
    assert str(done.exception).startswith("error: ")
    assert not (tmp_path / "out.json").exists()
