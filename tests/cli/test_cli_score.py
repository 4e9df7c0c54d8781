"""`fastgen score` from end to end with tiny networks: table, JSON, warnings, and one line for what is wrong."""

from __future__ import annotations

import json

import pytest
from scoring_helpers import PROMPTS, make_clip, make_evaluator, make_images

from fastgen.files.installing import hint

torch = pytest.importorskip("torch")
pytest.importorskip("torchmetrics")
pytest.importorskip("transformers")
torch.set_num_threads(1)

LABELS = [["gray cube"], ["red cube"], ["gray cube", "blue cube"], ["red cube"], ["yellow cylinder", "red sphere"]]


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return make_evaluator(tmp_path_factory.mktemp("judge"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def requests(tmp_path):
    (tmp_path / "labels.json").write_text(json.dumps(LABELS))
    (tmp_path / "prompts.json").write_text(json.dumps([{"prompt": prompt} for prompt in PROMPTS]))
    return {"labels": tmp_path / "labels.json", "text": tmp_path / "prompts.json"}


def test_two_runs_are_scored_and_compared_by_every_metric(fastgen, judge, clip, requests, tmp_path):
    a = [make_images(tmp_path / f"a{seed}", seed, metadata={}) for seed in (0, 1)]
    b = [make_images(tmp_path / f"b{seed}", seed + 2, tint=200, metadata={"normalize": "min-max"}) for seed in (0, 1)]
    reference = make_images(tmp_path / "reference", 5, count=8)
    options = ["--evaluator", judge, "--reference", reference, "--features", "evaluator", "--clip", clip]
    against = [word for folder in b for word in ("--against", folder)]
    code, out, err = fastgen("score", *a, "--requests", requests["labels"], *options, *against)
    assert code == 0, err
    value = json.loads((a[0] / "score.json").read_text())
    keys = ["label_accuracy", "fid", "kid", "clip_i"]
    assert list(value["metrics"]) == list(value["against"]["metrics"]) == list(value["comparison"]["metrics"]) == keys
    for key in keys:
        found = value["comparison"]["metrics"][key]
        assert found["difference"] == value["metrics"][key]["value"] - value["against"]["metrics"][key]["value"]
    assert value["comparison"]["metrics"]["fid"]["verdict"] == "A"  # b is far brighter than the reference
    assert (value["saving"], value["against"]["saving"]) == ("clamp", "min-max")
    assert value["accuracy"] == value["metrics"]["label_accuracy"]["value"]
    for words in (f"fid (evaluator features: {judge})", f"against {b[0]}, {b[1]}", "95% intervals of A - B: paired"):
        assert words in out
    assert [line.partition(":")[0] for line in err.splitlines()] == ["warning", "warning"]
    assert "5 images against 8 of the reference" in err
    assert "the runs were saved differently (clamp and min-max)" in err


def test_prompts_are_scored_by_clip(fastgen, clip, requests, tmp_path):
    images = make_images(tmp_path / "out", count=4)
    code, out, err = fastgen(
        "score", images, "--requests", requests["text"], "--clip", clip, "--out", tmp_path / "result.json"
    )
    assert (code, err) == (0, "")
    assert f"clip-t ({clip}: patch 8, 32 px" in out
    value = json.loads((tmp_path / "result.json").read_text())
    assert set(value["metrics"]) == {"clip_t"}
    assert value["clip"]["preprocessing"].endswith("(CLIP's defaults)")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["OUT"], "nothing to measure: give --evaluator E (label accuracy, attributes)"),
        (
            ["OUT", "--evaluator", "JUDGE", "--requests", "TEXT"],
            "holds prompts; label accuracy needs requests with labels",
        ),
        (["OUT", "--clip", "CLIP", "--requests", "LABELS"], "CLIP-T needs --requests with prompts"),
        (["OUT", "--clip", "nobody/no-clip", "--requests", "TEXT"], "add --download to fetch it"),
        (["OUT", "--clip", "OUT", "--requests", "TEXT"], "no CLIP folder (config.json is missing)"),
        (["OUT", "--reference", "OUT"], "add --features evaluator, or inception.pth"),
        (["OUT", "--reference", "OUT", "--features", "no.pth"], "no.pth: no such file"),
        (["nowhere", "--evaluator", "JUDGE", "--requests", "LABELS"], "nowhere: no such folder"),
        (["OUT", "--against", "nowhere", "--evaluator", "JUDGE", "--requests", "LABELS"], "nowhere: no such folder"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(fastgen, judge, clip, requests, tmp_path, arguments, words):
    images = make_images(tmp_path / "out")
    stand_in = {"OUT": images, "JUDGE": judge, "CLIP": clip, "TEXT": requests["text"], "LABELS": requests["labels"]}
    code, out, err = fastgen("score", *(stand_in.get(word, word) for word in arguments))
    assert (code, out) == (2, "")
    assert err.startswith("fastgen: error: ")
    assert err.count("\n") == 1
    assert words in err
    assert not (images / "score.json").exists()


def test_without_torchmetrics_the_error_says_what_to_install(fastgen_process, judge, tmp_path):
    images = make_images(tmp_path / "out")
    options = ["--evaluator", judge, "--reference", images, "--features", "evaluator"]
    done = fastgen_process("score", images, *options, blocked=["torchmetrics"])
    assert done.returncode == 1
    assert done.stderr == (f"fastgen: error: scoring needs torchmetrics, which is not installed: {hint('score')}\n")


def test_the_progress_of_the_reference_is_not_written_into_a_file(fastgen_process, judge, tmp_path):
    images = make_images(tmp_path / "out")
    options = ["--evaluator", judge, "--reference", make_images(tmp_path / "r", 1), "--features", "evaluator"]
    done = fastgen_process("score", images, *options)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if not line.startswith("warning: FID and KID")] == []
