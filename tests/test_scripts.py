"""The scripts in bin/, in a copy of the repository, with the environment of the tests: short where they can be."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from documents import REPO

pytest.importorskip("torch")

MODELS = ("iclevr-64", "monsters-64", "evaluator-iclevr", "evaluator-monsters")
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A copy of what the scripts use, but for the shipped models."""
    copy = tmp_path_factory.mktemp("scripts") / "repository"
    for name in ("bin", "fastgen", "export", "benchmarks"):
        shutil.copytree(REPO / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "shipped", "results"))
    return copy


@pytest.fixture(scope="module")
def script(repository, tmp_path_factory) -> Run:
    """Run SCRIPT ARGUMENTS with further environment variables, in that copy."""
    programs = tmp_path_factory.mktemp("programs")
    (programs / "fastgen").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m fastgen "$@"\n')
    (programs / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    for program in programs.iterdir():
        program.chmod(0o755)

    def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"NO_SETUP": "1", "PATH": path, "PYTHONPATH": str(repository)} | variables
        return subprocess.run(words, cwd=repository, env=environment, capture_output=True, text=True, check=False)

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


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("options", [["--quick"], ["--train", "--quick"]])
def test_the_demo_runs_and_its_page_shows_pictures_scores_timings_and_certificates(
    trained, repository, script, options
):
    done = script("bin/demo", *options)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    folder = repository / "-".join(["demo", *(option.strip("-") for option in options)])
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
    if "--train" not in options:
        assert (folder / "monster.png").is_file()
        assert len(list((folder / "scenes").glob("[0-9].png"))) == 4
