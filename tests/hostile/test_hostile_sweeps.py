"""Grids and sweep folders that lie: every one is refused, a line per problem, before anything is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from attacks import REMOVE, Attack, json_attacks, text_attacks

SWEEP = ["sweep", "r.json", "--out", "out", "--model", "model", "--engine", "eager", "--evaluator", "judge"]
GRID = ["--scheduler", "ddim", "--num-inference-steps", "2"]
OPTIONS = [
    ("--num-inference-steps", "0", "found 0"),
    ("--num-inference-steps", "-1", "found '-1'"),
    ("--num-inference-steps", "10001", "found 10001"),
    ("--num-inference-steps", "9" * 400, "found '999"),
    ("--num-inference-steps", "2,,3", "found ''"),
    ("--num-inference-steps", "2,2", "given twice"),
    ("--num-inference-steps", "nan", "found 'nan'"),
    ("--num-inference-steps", "2;3", "found '2;3'"),
    ("--num-inference-steps", "٣", "found '٣'"),
    ("--num-inference-steps", ",".join(map(str, range(1, 202))), "found 201 values"),
    ("--guidance-scale", "nan", "found nan"),
    ("--guidance-scale", "inf", "found inf"),
    ("--guidance-scale", "-1", "found -1"),
    ("--guidance-scale", "1e300", "found 1e+300"),
    ("--guidance-scale", "1,1.0", "given twice"),
    ("--guidance-scale", "high", "found 'high'"),
    ("--scheduler", "ddim,", "found ''"),
    ("--scheduler", "ddim:5", "expected a name"),
    ("--scheduler", "dimm", "did you mean 'ddim'?"),
    ("--noise-steps", "1", "give --rag INDEX"),
    ("--noise-steps", "x", "found 'x'"),
    ("--checkpoint", "best,", "found ''"),
    ("--checkpoint", "nope", "nope"),
    ("--seeds", "0,0", "given twice"),
    ("--seeds", "-1", "found '-1'"),
    ("--seeds", "9" * 20, "found '999"),
    ("--seeds", "1.5", "found '1.5'"),
    ("--within", "nan%", "found 'nan%'"),
    ("--within", "9" * 400 + "%", "within"),
    ("--within", "-1%", "found '-1%'"),
    ("--rule", "bst", "did you mean 'best'?"),
    ("--against", "nope", "nope"),
    ("--metric", "label_accurcy", "did you mean 'label_accuracy'?"),
    ("--minutes", "nan", "--minutes: found 'nan'"),
    ("--limit", "0", "--limit: found '0'"),
    ("--device", "nope", "--device: found 'nope'"),
    ("--evaluator", "nowhere", "nowhere"),
    ("--rag", "nowhere", "nowhere"),
]
JSON, SCORE = "out/sweep.json", "out/points/ddim-2steps-g1.5/score.json"
RECORDS = [
    (JSON, "", [], "sweep.json: found []"),
    (JSON, "requests_sha256", REMOVE, "requests_sha256 is missing"),
    (JSON, "requests_sha256", 3, "requests_sha256: found 3"),
    (JSON, "requests_sha256", "0" * 64, "holds a sweep over other requests"),
    (SCORE, "", [], "score.json: found []"),
    (SCORE, "metrics", REMOVE, "metrics is missing"),
    (SCORE, "metrics", [], "metrics: found []"),
    (SCORE, "metrics.label_accuracy", 1, "found 1"),
    (SCORE, "metrics.label_accuracy.value", "1", "found '1'"),
    (SCORE, "metrics.label_accuracy.value", REMOVE, "value is missing"),
    (SCORE, "metrics.label_accuracy.better", "more", "found 'more'"),
    (SCORE, "metrics.label_accuracy.more", 1, "unknown field 'more'"),
    (SCORE, "warnings", "none", "warnings: found 'none'"),
    (SCORE, "manifests", [1], "manifests: found [1]"),
]
TEXTS = [
    (JSON, "", "is empty"),
    (JSON, "{", "malformed JSON"),
    (SCORE, "", "is empty"),
    (SCORE, '{"metrics": NaN}', "NaN"),
    (SCORE, b"\xff", "UTF-8"),
]


@pytest.fixture(scope="session")
def judge(once) -> Path:
    from scoring_helpers import make_evaluator

    return once("hostile-judge", lambda folder: make_evaluator(folder))


@pytest.fixture(scope="session")
def swept(once, label_model, judge, requests_files, fork_server) -> Path:
    """The folder of a finished sweep of one point."""

    def run(folder: Path) -> None:
        workspace = folder.parent / "hostile-sweep-workspace"
        workspace.mkdir()
        for name, source in (("model", label_model), ("judge", judge)):
            shutil.copytree(source, workspace / name)
        shutil.copy(requests_files["labels"], workspace / "r.json")
        outcome = fork_server.run([*SWEEP, *GRID], workspace, {"FASTGEN_CACHE": str(workspace / "cache")}, 100)
        assert outcome.code == 0, outcome.stderr
        shutil.copytree(workspace / "out", folder)

    return once("hostile-sweep", run)


@pytest.mark.parametrize(
    "attack", [Attack(f"{o}={v[:20]}", [*SWEEP, *GRID, o, v], word) for o, v, word in OPTIONS], ids=str
)
def test_a_grid_that_lies_is_refused(attack, refused, label_model, judge, requests_files):
    refused(attack, **{"model": label_model, "judge": judge, "r.json": requests_files["labels"]})


FOREIGN = [
    Attack("file", [*SWEEP, *GRID], "is not a folder", lambda w: (w / "out").write_text("mine")),
    Attack("foreign", [*SWEEP, *GRID], "holds points", lambda w: (w / "out" / "points").mkdir(parents=True)),
]


@pytest.mark.parametrize("attack", FOREIGN, ids=str)
def test_a_folder_of_something_else_is_refused(attack, refused, label_model, judge, requests_files):
    refused(attack, **{"model": label_model, "judge": judge, "r.json": requests_files["labels"]})


@pytest.mark.parametrize(
    "attack",
    [*json_attacks("sweep", [*SWEEP, *GRID], RECORDS), *text_attacks("sweep", [*SWEEP, *GRID], TEXTS)],
    ids=str,
)
def test_a_sweep_folder_that_lies_is_refused(attack, refused, label_model, judge, requests_files, swept):
    refused(attack, **{"model": label_model, "judge": judge, "r.json": requests_files["labels"], "out": swept})


def test_the_swept_folder_itself_is_continued(fork_server, tmp_path, label_model, judge, requests_files, swept):
    for name, source in (("model", label_model), ("judge", judge), ("out", swept)):
        shutil.copytree(source, tmp_path / name)
    shutil.copy(requests_files["labels"], tmp_path / "r.json")
    outcome = fork_server.run([*SWEEP, *GRID], tmp_path, {"FASTGEN_CACHE": str(tmp_path / "cache")}, 100)
    assert outcome.code == 0, outcome.stderr
    assert "already there" in outcome.stderr
    assert json.loads((tmp_path / JSON).read_text())["rows"]
