"""Models that come with the package: found by name and by kind of request, small, whole, and each with its card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scoring_helpers import make_evaluator

from fastgen import load
from fastgen.data.synthetic import write_monsters
from fastgen.engines import source_kind
from fastgen.errors import InputError
from fastgen.models import evaluator, find
from fastgen.models.find import default_model, find_folder, model_kind, output_folder, shipped_model, shipped_names
from fastgen.models.folder import load_model
from fastgen.models.packing import pack
from fastgen.models.runs import RUNS, set_latest

PACKAGE = find.MODELS
NAMES = ["evaluator-iclevr", "evaluator-monsters", "iclevr-64", "monsters-64"]
LIMIT = 40_000_000  # bytes of all together


def check_models(folder: Path) -> None:
    """What is promised of the models of a package: they load, are small, and have a card."""
    assert sorted(f.name for f in folder.iterdir()) == NAMES
    for name in NAMES:
        if name.startswith("evaluator-"):
            judge = evaluator.load(folder / name)
            assert judge.objects if name == "evaluator-iclevr" else judge.attributes
        else:
            assert load_model(folder / name).condition.kind == ("labels" if name.startswith("iclevr") else "text")
        assert (folder / name / "README.md").read_text().startswith("# "), name
        assert (folder / name / "preset.toml").is_file(), name
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) <= LIMIT


@pytest.fixture(scope="module")
def stand_ins(text_model, label_model, tmp_path_factory):
    """A folder as fastgen/models/shipped is to be, with tiny models of random weights."""
    folder = tmp_path_factory.mktemp("package") / "models"
    pack(text_model, folder / "monsters-64")
    pack(label_model, folder / "iclevr-64")
    for name in ("evaluator-iclevr", "evaluator-monsters"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
    return folder


@pytest.fixture
def here(stand_ins, tmp_path, monkeypatch):
    """An empty current folder, and the stand-ins as the package's models."""
    monkeypatch.setattr(find, "MODELS", stand_ins)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def latest(model, bundle=None):
    run = RUNS / "mine-20250101-000000"
    shutil.copytree(model, run)
    if bundle is not None:
        shutil.copytree(bundle, run / "bundle")
    set_latest(run)
    return run.resolve()


@pytest.mark.skipif(not PACKAGE.is_dir(), reason="this checkout has no fastgen/models/shipped")
def test_the_models_of_the_package_load_are_small_and_have_cards():
    check_models(PACKAGE)


def test_models_are_found_by_name_and_by_kind(here, stand_ins):
    assert shipped_names() == NAMES
    assert shipped_model("text") == stand_ins / "monsters-64"
    assert shipped_model("labels") == stand_ins / "iclevr-64"
    assert find_folder("iclevr-64") == stand_ins / "iclevr-64"
    assert find_folder("iclevr-65") == Path("iclevr-65")


def test_a_folder_of_the_same_name_wins(here):
    Path("iclevr-64").mkdir()
    assert find_folder("iclevr-64") == Path("iclevr-64")
    Path("monsters-64").symlink_to("nowhere")
    assert find_folder("monsters-64") == Path("monsters-64")


def test_a_package_without_models_says_so(here, monkeypatch):
    monkeypatch.setattr(find, "MODELS", here / "none")
    assert shipped_names() == []
    for kind, word in (("text", "prompts"), ("labels", "labels")):
        with pytest.raises(InputError, match=f"this build of fastgen comes without a model for {word}; give --model"):
            shipped_model(kind)


def test_kinds_are_those_of_the_loaded_models(text_model, label_model, text_bundle, label_bundle, tmp_path):
    assert [model_kind(f) for f in (text_model, text_bundle)] == ["text"] * 2
    assert [model_kind(f) for f in (label_model, label_bundle)] == ["labels"] * 2
    assert model_kind(tmp_path) is None
    (tmp_path / "model_index.json").write_text("[]")
    assert model_kind(tmp_path) is None


def test_what_is_made_from_a_shipped_model_stays_out_of_the_package(here, stand_ins):
    assert output_folder(stand_ins / "iclevr-64", "bundle") == Path("iclevr-64-bundle")
    assert output_folder(Path("mine"), "bundle") == Path("mine/bundle")


def test_the_latest_run_generates_what_it_can_and_a_shipped_model_the_rest(here, stand_ins, label_model, label_bundle):
    assert str(default_model("text", None)) == "monsters-64 (shipped with fastgen; no runs/latest here)"
    run = latest(label_model, label_bundle)
    assert default_model("labels", None).folder == run / "bundle"
    for engine, folder in {"eager": run, "compile": run, "ort": run / "bundle", "trt": run / "bundle"}.items():
        assert default_model("labels", source_kind(engine)).folder == folder
    assert default_model("labels", None).why == "the latest run"
    other = default_model("text", None)
    assert other.folder == stand_ins / "monsters-64"
    assert other.why == "shipped with fastgen; the latest run, mine-20250101-000000, takes labels"


def test_a_latest_run_that_fits_but_lacks_a_bundle_is_not_passed_over(here, label_model):
    latest(label_model)
    with pytest.raises(InputError, match="has no bundle yet; `fastgen export` makes it"):
        default_model("labels", "bundle")


def test_the_python_api_takes_names(here):
    assert load("iclevr-64").spec.condition.kind == "labels"
    with pytest.raises(InputError, match=r"iclevr: neither .*, nor the name of a model that comes with fastgen \(eval"):
        load("iclevr")


def test_generate_without_a_model_says_which_one_it_took(fastgen, here, requests_files):
    code, out, err = fastgen("generate", requests_files["text"], "--num-inference-steps", 2, "--limit", 2)
    assert (code, err) == (0, "model: monsters-64 (shipped with fastgen; no runs/latest here)\n")
    assert out.startswith("generated/prompts: 2 images, 2 generated")
    code, out, err = fastgen("generate", requests_files["labels"], "--num-inference-steps", 2, "--limit", 2)
    assert (code, err) == (0, "model: iclevr-64 (shipped with fastgen; no runs/latest here)\n")


def test_a_sweep_without_a_model_takes_the_shipped_one_that_fits(fastgen, here, requests_files):
    judge = make_evaluator(here / "judge")
    grid = ["--num-inference-steps", "1,2", "--guidance-scale", "2", "--scheduler", "ddim", "--limit", 2]
    code, _, err = fastgen("sweep", requests_files["labels"], *grid, "--out", "SWEEP", "--evaluator", judge)
    assert code == 0, err
    assert "model: iclevr-64 (shipped with fastgen; no runs/latest here)\n" in err
    assert sorted(f.name for f in Path("SWEEP/points").iterdir()) == ["ddim-1steps-g2", "ddim-2steps-g2"]


def test_an_index_without_a_model_takes_the_shipped_one_for_prompts(fastgen, here):
    write_monsters(here / "data", count=2, frames=1, size=32, test_count=4, workers=1, progress=False)
    code, out, err = fastgen("index", "data", "--limit", 4)
    assert code == 0, err
    assert err.startswith("model: monsters-64 (shipped with fastgen; no runs/latest here)\n")
    assert out.startswith("monsters-64-index: 4 images")


@pytest.mark.usefixtures("_graphs_once")
def test_a_named_model_generates_exports_and_stays_as_it_was(fastgen, here, stand_ins, export_few, monkeypatch):
    before = sorted(stand_ins.rglob("*"))
    monkeypatch.setattr("fastgen.sampling.compile.COMMON_STEPS", (2,))
    code, out, _ = fastgen("export", "iclevr-64", "--engine", "ort")
    assert code == 0
    assert out.splitlines()[-1] == "bundle: iclevr-64-bundle"
    for model in ("iclevr-64", "iclevr-64-bundle"):
        asked = ["generate", "--labels", "red cube", "--num-inference-steps", 2, "--out", f"{model}.png"]
        assert fastgen(*asked, "--model", model)[0] == 0
    eager, bundled = (np.asarray(Image.open(f"{m}.png"), int) for m in ("iclevr-64", "iclevr-64-bundle"))
    assert abs(eager - bundled).max() <= 2
    assert sorted(stand_ins.rglob("*")) == before
    line = fastgen("generate", "--labels", "red cube", "--model", "iclevr-64", "--engine", "ort")[2]
    assert "`fastgen export iclevr-64 --out BUNDLE` makes one" in line


def test_labels_that_the_shipped_model_does_not_know_name_it(fastgen, here, monkeypatch):
    file = here / "r.json"
    file.write_text(json.dumps([["red cub"]]))
    monkeypatch.setitem(__import__("sys").modules, "torch", None)  # refused before a model is loaded
    code, out, err = fastgen("generate", file)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "r.json: entry [0]: unknown label 'red cub'; did you mean 'red cube'?" in err
    assert err.endswith("; the model is iclevr-64 (shipped with fastgen; no runs/latest here)\n")
