"""`fastgen train`: the preset that fits the data, and what is said where preset or data are missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("torch")

SHORT = ["steps=2", "batch_size=4", "validation_limit=4", "validation_fraction=0.25"]
SMALL = [
    "image_size=16",
    "vae.config.sample_size=16",
    "vae.config.block_out_channels=[8, 8, 8, 8]",
    "unet.config.sample_size=2",
    "unet.config.block_out_channels=[8, 8]",
    "unet.config.cross_attention_dim=8",
    "unet.config.attention_head_dim=2",
    *(f"{network}.train.{word}" for network in ("vae", "unet") for word in SHORT),
]


def captioned(root: Path) -> None:
    picture(root / "train" / "0.png")
    (root / "train" / "metadata.csv").write_text("file_name,text\n0.png,a dragon\n")


def sidecar(root: Path) -> None:
    picture(root / "0.png")
    (root / "0.txt").write_text("a dragon")


def labelled(root: Path) -> None:
    picture(root / "iclevr" / "0_0.png")
    (root / "train.json").write_text('{"0_0.png": ["red cube"]}')
    (root / "objects.json").write_text('{"red cube": 0}')


def classes(root: Path, count: int = 2) -> None:
    for i in range(count):
        picture(root / "train" / "cat" / f"{i}.JPG")
        picture(root / "train" / "dog" / f"{i}.jpg")


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 16), (len(str(path)), 100, 200)).save(path)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path / ".cache"))
    return tmp_path


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The presets that a command would train; nothing is trained."""
    presets: list[Any] = []

    def train(preset: Any, data: Any, out: Path, **_: Any) -> Path:
        presets.append(preset)
        out.mkdir(parents=True)
        return out

    monkeypatch.setattr("fastgen.training.train", train)
    return presets


@pytest.mark.parametrize("where", [".", "data", "DATA"])
@pytest.mark.parametrize(
    ("write", "preset", "content"),
    [
        (captioned, "monsters-64", "captions"),
        (sidecar, "monsters-64", "captions"),
        (labelled, "iclevr-64", "labels"),
        (classes, "iclevr-64", "labels"),
    ],
)
def test_without_a_preset_the_data_choose_it_and_it_is_named(fastgen, here, trained, where, write, preset, content):
    write(here / where)
    data = ["--data", where] if where == "DATA" else []
    code, out, err = fastgen("train", *data, "--set", "unet.train.steps=7")
    assert (code, err) == (0, f"preset: {preset}, the default for images with {content}\n")
    assert out.startswith(f"model: runs/{preset}-")
    (loaded,) = trained
    assert (loaded.name, loaded.unet.train.steps) == (preset, 7)


def test_a_preset_that_is_named_is_taken(fastgen, here, trained):
    labelled(here)
    code, _, err = fastgen("train", "iclevr-concat")
    assert (code, err, trained[0].name) == (0, "", "iclevr-concat")


@pytest.mark.parametrize("preset", [[], ["iclevr-64"]])
def test_without_data_it_says_where_it_looked_for_what(fastgen, here, preset):
    code, out, err = fastgen("train", *preset)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "error: no dataset in this folder, nor in data/ or public_data/ (train_info.json + train/, " in err
    assert err.endswith("give --data DATA, or render one: `fastgen data iclevr DATA`\n")


def test_a_folder_in_place_of_the_preset_gets_its_option(fastgen, here):
    labelled(here)
    classes(here / "DATA")
    assert fastgen("train", "DATA") == (2, "", "fastgen: error: DATA is a folder; give it with --data\n")
    code, _, err = fastgen("train", "DATA", "--data", "DATA")
    assert (code, err.count("\n")) == (2, 1)
    assert "unknown preset 'DATA'" in err


def test_a_folder_with_the_name_of_a_preset_does_not_hide_it(fastgen, here, trained):
    labelled(here)
    (here / "iclevr-64").mkdir()
    assert fastgen("train", "iclevr-64")[0] == 0


def test_data_that_are_no_dataset_are_one_line_without_a_preset_too(fastgen, here):
    (here / "D").mkdir()
    code, out, err = fastgen("train", "--data", "D")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("fastgen: error: D: holds no known dataset, expected ")
    assert not (here / "runs").exists()


def test_several_datasets_are_named(fastgen, here):
    for name in "ab":
        (here / "data" / name).mkdir(parents=True)
        labelled(here / "data" / name)
    code, _, err = fastgen("train")
    assert (code, err) == (2, "fastgen: error: found several datasets: data/a, data/b; choose one with --data\n")


def test_a_folder_per_class_trains_and_the_latest_run_generates_from_requests_beside_it(fastgen, here):
    classes(here, count=4)
    (here / "test.json").write_text(json.dumps([["cat"], ["dog"]]))
    (here / "train" / "cat" / "notes.md").touch()
    code, out, err = fastgen("train", "--tracker", "none", "--device", "cpu", *(f"--set={word}" for word in SMALL))
    assert code == 0, err
    assert err.startswith("preset: iclevr-64, the default for images with labels\n")
    assert "note: 1 files in folders of classes that are no images: train/cat/notes.md" in err
    code, out, err = fastgen("generate", "test.json", "--num-inference-steps", 2)
    assert code == 0, err
    assert "2 images, 2 generated" in out
