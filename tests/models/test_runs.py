"""Runs go to folders of their own, continue when unfinished, and the newest finished one is found again."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from fastgen.errors import InputError
from fastgen.models.runs import RUNS, latest_model, latest_run, new_run, set_latest


@pytest.fixture(autouse=True)
def _inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make(name, finished):
    folder = RUNS / name
    folder.mkdir(parents=True)
    if finished is not None:
        (folder / "training.json").write_text(json.dumps({"finished": finished}))
    return folder


def test_a_new_run_is_named_by_preset_and_time():
    assert re.fullmatch(r"runs/monsters-64-\d{8}-\d{6}", new_run("monsters-64").as_posix())


def test_an_unfinished_run_of_the_same_preset_continues():
    make("iclevr-20250101-000000", finished=True)
    unfinished = make("iclevr-20250102-000000", finished=False)
    assert new_run("iclevr") == unfinished
    (unfinished / "training.json").write_text('{"finished": true}')
    assert new_run("iclevr") not in RUNS.iterdir()


def test_runs_of_other_presets_and_other_folders_are_not_continued():
    make("iclevr-64-20250101-000000", finished=False)
    make("iclevr-notes", finished=False)
    make("iclevr-20250101-000000", finished=None)
    (RUNS / "iclevr-20250102-000000").write_text("a file")
    assert not new_run("iclevr").exists()


def test_latest_is_the_run_that_was_set_last():
    first, second = make("a-20250101-000000", finished=True), make("b-20250101-000000", finished=True)
    for run in (first, second):
        set_latest(run)
        assert latest_run() == run.resolve()
    assert [f.name for f in RUNS.iterdir() if f.is_symlink()] == ["latest"]


def test_without_a_run_the_command_that_trains_one_is_named():
    with pytest.raises(InputError, match=r"no runs/latest here; train one with `fastgen train"):
        latest_run()
    run = make("a-20250101-000000", finished=True)
    set_latest(run)
    shutil.rmtree(run)
    with pytest.raises(InputError, match="no runs/latest here"):
        latest_run()


def test_generate_takes_the_bundle_of_the_latest_run_where_there_is_one():
    run = make("a-20250101-000000", finished=True)
    set_latest(run)
    assert latest_model(None) == run.resolve()
    assert latest_model("model") == run.resolve()
    with pytest.raises(InputError, match="has no bundle yet; `fastgen export` makes it"):
        latest_model("bundle")
    (run / "bundle").mkdir()
    (run / "bundle" / "bundle.json").write_text("{}")
    assert latest_model(None) == latest_model("bundle") == run.resolve() / "bundle"
    assert latest_model("model") == run.resolve()


def test_the_three_lines_work_in_a_folder_with_a_finished_run(
    fastgen, label_model, label_bundle, requests_files, tmp_path
):
    run = RUNS / "labels-20250101-000000"
    shutil.copytree(label_model, run)
    shutil.copytree(label_bundle, run / "bundle")
    set_latest(run)
    code, out, err = fastgen("generate", requests_files["labels"])
    assert code == 0, err
    assert out.startswith("generated/labels: 4 images, 4 generated")
    assert len(list((tmp_path / "generated" / "labels").glob("?.png"))) == 4
