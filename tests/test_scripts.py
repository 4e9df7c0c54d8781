"""The scripts in bin/, in a copy of the repository, with the environment of the tests: short where they can be."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from documents import REPO

pytest.importorskip("torch")

MODELS = ("iclevr-64", "monsters-64", "evaluator-iclevr", "evaluator-monsters")
NARROW: dict[str, dict[str, dict[str, Any]]] = {  # preset -> network -> what is changed in its config
    "iclevr-64": {
        "vae": {"block_out_channels": [8, 8, 8, 16], "latent_channels": 4},
        "unet": {
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": [16, 32],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "cross_attention_dim": 32,
        },
    },
    "monsters-64": {
        "vae": {"block_out_channels": [8, 8, 16]},
        "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1},
        "unet": {
            "block_out_channels": [16, 32],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "cross_attention_dim": 32,
        },
    },
}
Run = Callable[..., subprocess.CompletedProcess[str]]


def copied(folder: Path) -> Path:
    """A copy of what the scripts use, but for the shipped models."""
    for name in ("bin", "fastgen", "export", "benchmarks"):
        shutil.copytree(REPO / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "shipped", "results"))
    return folder


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    return copied(tmp_path_factory.mktemp("repository"))


@pytest.fixture(scope="module")
def script(repository, tmp_path_factory) -> Run:
    """Run SCRIPT ARGUMENTS with further environment variables, in that copy or in another."""
    programs = tmp_path_factory.mktemp("programs")
    (programs / "fastgen").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m fastgen "$@"\n')
    (programs / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    for program in programs.iterdir():
        program.chmod(0o755)

    def run(*words: str, copy: Path = repository, **variables: str) -> subprocess.CompletedProcess[str]:
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"NO_SETUP": "1", "PATH": path, "PYTHONPATH": str(copy)} | variables
        return subprocess.run(words, cwd=copy, env=environment, capture_output=True, text=True, check=False)

    return run


@pytest.fixture(scope="module")
def trained(repository, script) -> Path:
    """What a rehearsal of bin/train-models makes from nothing, as the copy's shipped models."""
    done = script("bin/train-models", QUICK="1")
    assert done.returncode == 0, done.stderr[-3000:]
    shipped = repository / "fastgen" / "models" / "shipped"
    return Path(shutil.copytree(repository / "train-models-quick" / "models", shipped))


@pytest.mark.parametrize("name", sorted(file.name for file in (REPO / "bin").iterdir() if file.suffix != ".txt"))
def test_a_script_is_executable_and_its_syntax_is_right(name):
    file = REPO / "bin" / name
    assert os.access(file, os.X_OK)
    assert file.read_text().startswith("#!/usr/bin/env bash\n")
    assert subprocess.run(["bash", "-n", file], check=False).returncode == 0


def test_an_unknown_part_or_option_is_refused_with_the_choices(script):
    done = script("bin/train-models", "evaluator")
    assert (done.returncode, done.stdout) == (2, "")
    assert "unknown part 'evaluator' (parts: data evaluators iclevr-64 monsters-64 pack score)" in done.stderr
    done = script("bin/demo", "--fast")
    assert (done.returncode, done.stderr) == (2, "usage: bin/demo [--train] [--quick]\n")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_train_models_goes_from_nothing_to_packed_and_scored_models(trained, repository, script):
    assert sorted(folder.name for folder in trained.iterdir()) == sorted(MODELS)
    for name in MODELS:
        assert not (trained / name / "checkpoints").exists()
        assert (trained / name / "preset.toml").is_file()
    for file, metric in {
        "iclevr-64/scores/test.json": "label_accuracy",
        "iclevr-64/scores/new_test.json": "label_accuracy",
        "monsters-64/scores/test.json": "attributes",
    }.items():
        figure = json.loads((trained / file).read_text())["metrics"][metric]
        assert 0 <= figure["value"] <= 1
        assert figure["over"] == "seeds"

    done = script("bin/train-models", "data", "iclevr-64", QUICK="1")
    assert done.returncode == 0, done.stderr
    assert "fastgen data" not in done.stdout
    assert "train-models-quick/iclevr-64: already finished" in done.stderr

    packed = repository / "train-models-quick" / "models" / "evaluator-iclevr"
    (packed / "README.md").write_text("a card\n")
    assert script("bin/train-models", "pack", QUICK="1").returncode == 0
    assert (packed / "README.md").read_text() == "a card\n"


@pytest.fixture
def narrow(tmp_path) -> Path:
    """A copy with narrow networks in its presets, and tables of three numbers of steps in its exports."""
    copy = copied(tmp_path / "repository")
    for name, changes in NARROW.items():
        file = copy / "fastgen" / "presets" / f"{name}.toml"
        preset = tomllib.loads(file.read_text())
        for network, config in changes.items():
            preset[network]["config"] |= config
        file.write_text(tomli_w.dumps(preset))
    file = copy / "fastgen" / "sampling" / "compile.py"
    text, count = re.subn(r"(?m)^COMMON_STEPS = .*", "COMMON_STEPS = (1, 5, 10)", file.read_text())
    assert count == 1
    file.write_text(text)
    return copy


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_trains_and_with_models_there_trains_nothing_and_its_page_shows_all_of_it(narrow, script):
    done = script("bin/demo", "--train", "--quick", copy=narrow)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    folder = narrow / "demo-train-quick"
    assert_page_shows_all(folder)

    for name in MODELS:  # the trained models are now those that come with the package
        shutil.copytree(folder / name, narrow / "fastgen" / "models" / "shipped" / name)
    for name in ("data", "generated", "scores"):
        shutil.rmtree(folder / name)
    (folder / "index.html").unlink()
    done = script("bin/demo", "--quick", copy=narrow, DEMO_DIR=str(folder))
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert "fastgen train" not in done.stdout
    assert done.stderr.count("holds these weights already") == 2, done.stderr[-3000:]
    assert_page_shows_all(folder)
    assert (folder / "monster.png").is_file()
    assert len(list((folder / "scenes").glob("[0-9].png"))) == 4


def assert_page_shows_all(folder: Path) -> None:
    page = (folder / "index.html").read_text()
    for title in (
        "iclevr-0",
        "monsters-0",
        "Scores: iclevr",
        "Scores: monsters",
        "Engines: iclevr",
        "Certificate: monsters",
    ):
        assert title in page
