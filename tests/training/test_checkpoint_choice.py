from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file
from test_train import LABEL_PRESET, labelled, preset_of, small  # noqa: F401

from fastgen.errors import InputError
from fastgen.generate.job import run_job
from fastgen.generate.pipeline import load
from fastgen.generate.requests import read_requests
from fastgen.generate.run import Run
from fastgen.models.bundle import read_bundle
from fastgen.models.checkpoint_choice import check_made_from, is_called
from fastgen.models.find import find_model
from fastgen.models.folder import load_model
from fastgen.training import stages, train

OVERRIDES = ("unet.train.checkpoint_limit=0", "unet.train.further_ema_decays=[0.5]")


@pytest.fixture
def run(labelled: Path, tmp_path: Path) -> Path:  # noqa: F811
    return train(preset_of(LABEL_PRESET, tmp_path, OVERRIDES), labelled, tmp_path / "run", progress=False)


@pytest.fixture
def bundle(run: Path, tmp_path: Path, export_few: Any, _graphs_once: None) -> Path:
    export_few(run, tmp_path / "bundle", engines=["ort"], checkpoint="4")
    return tmp_path / "bundle"


@pytest.fixture
def unfinished(labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    class StopError(Exception):
        pass

    fit = stages.fit

    def stopped(task: Any, recipe: Any, run: Any) -> None:
        fit(task, replace(recipe, steps=4), run)
        raise StopError

    monkeypatch.setattr(stages, "fit", stopped)
    with pytest.raises(StopError):
        train(preset_of(LABEL_PRESET, tmp_path, OVERRIDES), labelled, tmp_path / "run", progress=False)
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("name", "label", "file"),
    [
        ("last", "last@6", "step-000006/model"),
        ("ema", "ema@6", "step-000006/ema"),
        ("ema-0.5", "ema-0.5@6", "step-000006/ema-0.5"),
        ("4", "ema@4", "step-000004/ema"),
        ("best", "best@", "best/ema"),
    ],
)
def test_the_named_weights_are_loaded(run: Path, name: str, label: str, file: str) -> None:
    model = load_model(run, name)
    assert model.spec.checkpoint.startswith(label)  # type: ignore[union-attr]
    expected = load_file(run / "checkpoints" / "unet" / f"{file}.safetensors")
    found = model.networks()["unet"].state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, found[key]) for key, value in expected.items())


def test_weights_of_different_checkpoints_are_different_models(run: Path) -> None:
    hashes = {load_model(run, name).spec.sha256 for name in ("last", "ema", "4", None)}
    assert len(hashes) == 4
    assert load_model(run, "ema").spec.sha256 == load_model(run, "6").spec.sha256


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("5", r"no checkpoint of step 5; there are 2, 4, 6"),
        ("newest", r"checkpoint is 'newest', expected best, last, ema, ema-DECAY or a step"),
        ("ema-0.7", r"holds no average 'ema-0\.7'; there are: ema, ema-0\.5"),
    ],
)
def test_a_checkpoint_that_is_not_there_is_one_line_that_lists_those_that_are(
    run: Path, name: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load_model(run, name)


def test_a_folder_without_checkpoints_says_so(label_model: Path) -> None:
    with pytest.raises(InputError, match=r"holds no checkpoints/unet, so there is no checkpoint 'best'"):
        load_model(label_model, "best")


def test_the_manifest_and_the_bundle_record_the_checkpoint(run: Path, bundle: Path, tmp_path: Path) -> None:
    assert read_bundle(bundle).spec.checkpoint == "ema@4"
    requests_file = tmp_path / "requests.json"
    requests_file.write_text(json.dumps([["red cube"]]))
    requests = read_requests(requests_file, find_model(run).objects)
    images = {}
    for engine, folder in (("eager", run), ("ort", bundle)):
        pipeline = load(folder, engine, checkpoint="4")
        run_job(Run(pipeline, requests, pipeline.settings()), tmp_path / engine, progress=False)
        line = json.loads((tmp_path / engine / "manifest.jsonl").read_text())
        assert line["checkpoint"] == "ema@4"
        images[engine] = np.asarray(pipeline.generate(labels=[["red cube"]], seeds=[0])[0]).astype(int)
    assert np.abs(images["eager"] - images["ort"]).max() <= 2


def test_a_bundle_of_other_weights_is_refused(bundle: Path) -> None:
    for asked in ("last", "best", "2"):
        said = rf"was exported from checkpoint ema@4, not from checkpoint {asked}; `fastgen"
        with pytest.raises(InputError, match=said):
            load(bundle, "ort", checkpoint=asked)


def test_an_unfinished_run_generates_from_its_checkpoints(unfinished: Path) -> None:
    with pytest.raises(InputError, match=r"its training is not finished; choose weights with --checkpoint \(best"):
        load(unfinished, "eager")
    images = load(unfinished, "eager", checkpoint="last").generate(labels=[["red cube"]], seeds=[0])
    assert images[0].size == (16, 16)
    assert find_model(unfinished, "last").objects == {"red cube": 0, "green cube": 1, "blue cube": 2}


@pytest.mark.parametrize(
    ("label", "name", "called"),
    [
        ("ema@500", "ema", True),
        ("ema@500", "500", True),
        ("last@500", "500", True),  # of a recipe without averages
        ("best@500", "500", False),
        ("best@500", "best", True),
        ("ema-0.9@500", "ema", False),
        (None, "last", False),
    ],
)
def test_what_weights_may_be_called(label: str | None, name: str, called: bool) -> None:
    assert is_called(label, name) is called
    if not called:
        with pytest.raises(InputError, match=rf"images: images are .*, expected checkpoint {name}"):
            check_made_from(label, name, [Path("images")])


def test_a_sweep_over_checkpoints_scores_each_ones_own_weights(run: Path, tmp_path: Path) -> None:
    from scoring_helpers import make_evaluator

    from fastgen.scoring import Scorer
    from fastgen.sweep import Grid, sweep

    (tmp_path / "requests.json").write_text(json.dumps([["red cube"], ["blue cube"]]))
    grid = Grid(checkpoints=("4", "last", "ema-0.5"), num_inference_steps=(2,))
    options: dict[str, Any] = {"scorer": Scorer(evaluator=make_evaluator(tmp_path / "judge")), "engine": "eager"}
    found = sweep(run, tmp_path / "requests.json", tmp_path / "out", grid, **options)
    assert [row.point.weights for row in found.rows] == ["ema@4", "last@6", "ema-0.5@6"]
    for row, name in zip(found.rows, grid.checkpoints, strict=True):
        line = json.loads((row.folders[0] / "manifest.jsonl").read_text().splitlines()[0])
        assert line["model_sha256"] == load_model(run, name).spec.sha256
