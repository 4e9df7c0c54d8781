"""Pictures without a requests file: --prompt, --labels, --count, and --out x.png."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastgen.engines.machine import Gpu
from fastgen.errors import InputError
from fastgen.files.png import png_bytes, read_metadata
from fastgen.generate.job_input import read_input
from fastgen.generate.requests import typed_requests

FEW = ("--num-inference-steps", 2)


@pytest.fixture
def generate(fastgen, label_model, tmp_path, monkeypatch):
    """`fastgen generate ARGUMENTS` by the label model, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: fastgen("generate", *arguments, "--model", label_model, *FEW)


def refused(result):
    code, out, err = result
    assert (code, out, err.count("\n")) == (2, "", 1), err
    return err.removeprefix("fastgen: error: ").strip()


def test_typed_requests_depend_on_nothing_but_what_is_typed():
    alone = typed_requests(labels=["red cube, blue sphere"], seed=4).requests[0]
    among = typed_requests(labels=["gray cube", " red cube ,blue sphere"], seed=3, count=2).requests
    assert [(r.labels, r.seed) for r in among[2:]] == [(alone.labels, 3), (alone.labels, 4)]
    assert alone.labels == ("red cube", "blue sphere")
    assert [r.image_name for r in among] == ["0.png", "1.png", "2.png", "3.png"]


def test_typed_prompts_share_a_list_of_labels_and_without_either_images_have_no_condition():
    both = typed_requests(["a cube", "a sphere"], ["red cube, blue cube"], seed=2).requests
    assert [(r.prompt, r.labels, r.seed, r.kind) for r in both] == [
        (prompt, ("red cube", "blue cube"), 2, "text and labels") for prompt in ("a cube", "a sphere")
    ]
    neither = typed_requests(seed=5, count=2).requests
    assert [(r.prompt, r.labels, r.seed, r.kind) for r in neither] == [(None, None, s, "nothing") for s in (5, 6)]
    assert read_input(None, [], [], None, count=1).out == Path("generated/image-0.png")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompts": ["  "]}, "--prompt '  ': prompt: is empty"),
        ({"labels": ["red cube,, blue cube"]}, "--labels 'red cube,, blue cube': labels: is empty"),
        ({"labels": ["red cube, red cube"]}, "'red cube' occurs twice"),
        ({"labels": ["red cube"], "seed": -1}, "seed: found -1, expected an integer with 0 <= seed"),
        (
            {},
            "give REQUESTS.json, or --prompt TEXT or --labels NAMES; found none; a model without conditions takes --count N",
        ),
        (
            {"labels": ["red cube"], "file": Path("r.json")},
            "REQUESTS.json, or --prompt TEXT or --labels NAMES; found both",
        ),
        (
            {"labels": ["a", "b"], "prompts": ["a"]},
            "--prompt with 2 lists of --labels; give one list, which every prompt gets",
        ),
        ({"labels": ["a", "b"], "out": Path("x.png")}, "--out x.png: is one file, and there are 2 images"),
        ({"labels": ["a"], "count": 2, "out": Path("x.PNG")}, "--out x.PNG: is one file, and there are 2 images"),
        ({"labels": ["a"], "out": Path("a/x.jpg")}, "--out a/x.jpg: images are PNG files; give a/x.png, or a folder"),
        ({"file": Path("r.json"), "count": 2}, "--count goes with --prompt and --labels"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, words):
    given = {"file": None, "prompts": [], "labels": [], "out": None} | options
    with pytest.raises(InputError) as error:
        read_input(**given)
    assert words in str(error.value)


def test_without_out_the_name_comes_from_the_words_and_the_seed():
    name = "A small, purple monster: with ÄÖÜ and one big eye, wielding an axe, moving"
    asked = read_input(None, [name], [], None, seed=7)
    assert asked.single
    assert asked.out == Path("generated/a-small-purple-monster-with-and-one-big-eye-wielding-an-axe-7.png")
    assert read_input(None, ["猫"], [], None).out == Path("generated/image-0.png")
    several = read_input(None, [], ["red cube"], None, count=3)
    assert (several.out, several.single) == (Path("generated/red-cube-0"), False)


def test_out_that_is_no_png_is_a_folder_even_for_one_image(generate):
    assert generate("--labels", "red cube", "--out", "some.folder")[0] == 0
    assert {f.name for f in Path("some.folder").iterdir()} == {
        "0.png",
        "contact_sheet.png",
        "job.json",
        "manifest.jsonl",
    }


def test_a_single_file_has_the_pixels_and_the_metadata_that_a_job_gives(generate, tmp_path):
    code, out, err = generate("--labels", "red cube, blue sphere", "--seed", 5, "--out", "deep/x.png")
    assert (code, err) == (0, "")
    assert out.startswith("deep/x.png: 1 image in ")
    assert [f.name for f in Path("deep").iterdir()] == ["x.png"]
    (tmp_path / "r.json").write_text(
        json.dumps([{"labels": ["red cube", "blue sphere"], "seed": 5, "image_name": "x.png"}])
    )
    assert generate("r.json", "--out", "job")[0] == 0
    assert Path("job/x.png").read_bytes() == Path("deep/x.png").read_bytes()
    assert read_metadata(Path("deep/x.png"))["seed"] == 5


def test_a_single_file_is_overwritten_and_the_seed_changes_it(generate):
    assert generate("--labels", "red cube", "--out", "x.png")[0] == 0
    first = Path("x.png").read_bytes()
    assert generate("--labels", "red cube", "--out", "x.png")[0] == 0
    assert Path("x.png").read_bytes() == first
    assert generate("--labels", "red cube", "--out", "x.png", "--seed", 1)[0] == 0
    assert Path("x.png").read_bytes() != first


def test_an_image_that_failed_leaves_the_old_file(fastgen, text_bundle, scaled_weights, tmp_path):
    bundle = scaled_weights(text_bundle, tmp_path / "bundle", float("nan"))
    file = tmp_path / "x.png"
    old = png_bytes(np.zeros((8, 8, 3), np.uint8), {"image_name": "x.png"})
    file.write_bytes(old)
    code, out, err = fastgen("generate", "--prompt", "a", "--model", bundle, "--engine", "ort", "--out", file)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert f"{file}: not written: 3072 of 3072 values are not finite" in err
    assert file.read_bytes() == old
    assert sorted(f.name for f in tmp_path.iterdir()) == ["bundle", "x.png"]


def test_count_makes_a_folder_with_one_seed_after_another(generate):
    assert generate("--labels", "red cube", "--labels", "gray cube", "--count", 2, "--seed", 6, "--out", "many")[0] == 0
    lines = [json.loads(line) for line in Path("many/manifest.jsonl").read_text().splitlines()]
    assert [(line["labels"], line["seed"]) for line in lines] == [
        (["red cube"], 6),
        (["red cube"], 7),
        (["gray cube"], 6),
        (["gray cube"], 7),
    ]
    assert generate("--labels", "gray cube", "--seed", 7, "--out", "one.png")[0] == 0
    one, among = (np.asarray(Image.open(f), int) for f in ("one.png", "many/3.png"))
    assert abs(one - among).max() <= 1  # the batch size moves a float's last bit


def test_prompts_work_with_a_bundle_and_a_long_one_is_a_warning(fastgen, text_bundle, tmp_path):
    arguments = ["--model", text_bundle, "--engine", "ort", "--out", tmp_path / "x.png", *FEW]
    code, _, err = fastgen("generate", "--prompt", "a red dragon " * 60, *arguments)
    assert code == 0
    assert err.startswith("warning: a prompt of ")
    assert read_metadata(tmp_path / "x.png")["truncated_from_tokens"] > 77


@pytest.mark.parametrize(
    "option", [("--strip", "900,0"), ("--grid",), ("--shard", "1/2"), ("--devices", "cpu,cpu")], ids=lambda o: o[0]
)
def test_what_needs_a_job_is_refused_for_a_single_file_and_works_in_a_folder(generate, option, monkeypatch):
    ran = []
    monkeypatch.setattr("fastgen.generate.shards.subprocess.Popen", lambda line, **_: ran.append(line) or Done())
    line = refused(generate("--labels", "red cube", "--out", "x.png", *option))
    assert line == f"{option[0]} belongs to a folder of images, and x.png is a file; give --out FOLDER"
    assert generate("--labels", "red cube", "--labels", "gray cube", "--out", "folder", *option)[0] == 0
    assert len(ran) == (2 if option[0] == "--devices" else 0)
    for words in ran:
        assert [words[i + 1] for i, word in enumerate(words) if word == "--labels"] == ["red cube", "gray cube"]


class Done:
    stderr = io.BytesIO()

    def wait(self):
        return 0


def test_devices_hand_the_model_that_was_found_to_every_process(fastgen, label_model, tmp_path, monkeypatch):
    ran = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastgen.generate.shards.subprocess.Popen", lambda line, **_: ran.append(line) or Done())
    monkeypatch.setattr("fastgen.models.find.MODELS", label_model.parent)
    cards = [Gpu("NVIDIA H200", 143771, "9.0")] * 2
    monkeypatch.setattr("fastgen.generate.shards.gpus", lambda: (cards, None))
    assert fastgen("generate", "--labels", "red cube", "--count", 2, "--devices", "0,1")[0] == 0
    assert [words[words.index("--model") + 1] for words in ran] == [str(label_model)] * 2


def test_a_dry_run_of_a_single_image_writes_nothing(generate, tmp_path):
    code, out, _ = generate("--labels", "red cube", "--out", "x.png", "--dry-run")
    assert code == 0
    assert out.startswith("1 images in 1 batches")
    assert not any(tmp_path.iterdir())


def test_bad_words_are_refused_before_the_model_is_loaded(generate, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    line = refused(generate("--labels", "red cub, blue sphere", "--out", "x.png"))
    assert line.startswith(
        "--labels 'red cub, blue sphere': unknown label 'red cub'; did you mean 'red cube'? (choices:"
    )
    assert "found both" in refused(generate("r.json", "--labels", "red cube"))
    (tmp_path / "file").write_text("x")
    assert "file is not a folder" in refused(generate("--labels", "red cube", "--out", "file/x.png"))
    (tmp_path / "folder.png").mkdir()
    assert "is a folder, expected a new file" in refused(generate("--labels", "red cube", "--out", "folder.png"))


def test_a_prompt_for_a_label_model_is_refused(generate):
    assert "request 0 holds text; this model takes labels" in refused(generate("--prompt", "a cube", "--out", "x.png"))
