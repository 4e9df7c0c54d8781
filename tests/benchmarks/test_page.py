"""The demo's page shows the best view first: monsters before scenes, one contact sheet per task, other seeds behind a fold."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from benchmarks.page import main
from benchmarks.rows import UNITS


def write(file: Path, value: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


@pytest.fixture
def demo(tmp_path) -> Path:
    """A demo's folder: two tasks of several seeds, another task of one, scores, timings and certificates."""
    settings = {"engine": "ort", "dtype": "fp32", "scheduler": "ddim", "num_inference_steps": 20, "guidance_scale": 2.0}
    runs = [{"seconds": 1.5, "images": 2}, {"seconds": 0.5, "images": 1}]
    for name in ("iclevr-0", "iclevr-1", "monsters-0", "monsters-10", "monsters-2", "faces-0"):
        write(tmp_path / "generated" / name / "job.json", {"job": settings, "runs": runs})
        Image.new("RGB", (8, 8)).save(tmp_path / "generated" / name / "contact_sheet.png")
    row = dict.fromkeys(UNITS) | {"side": "ort", "dtype": "fp32", "batch": 4, "steps": 20, "images_per_s": 2.0}
    rows = [row | {"note": "1 of 3 rounds: the time was used up"}, row | {"side": "a<b", "images_per_s": None}]
    figure = {"label": "accuracy", "value": 0.5, "standard_error": None, "over": "requests"}
    for task in ("iclevr", "monsters"):
        write(tmp_path / "scores" / f"{task}.json", {"metrics": {"accuracy": figure}})
        write(tmp_path / f"engines-{task}.json", {"rows": rows})
        write(tmp_path / f"{task}-bundle" / "certificates" / "ort.json", {"engine": "ort", "dtype": "fp32", "rows": []})
    Image.new("RGB", (8, 8)).save(tmp_path / "monster.png")
    return tmp_path


@pytest.fixture
def page(demo) -> str:
    done = CliRunner().invoke(main, [str(demo)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return (demo / "index.html").read_text()


def test_monsters_come_first_and_every_picture_is_there(page, demo):
    pictures = re.findall(r'<img src="([^"]+)"', page)
    runs = ("monsters-0", "monsters-2", "monsters-10", "iclevr-0", "iclevr-1", "faces-0")
    assert pictures == ["monster.png", *(f"generated/{name}/contact_sheet.png" for name in runs)]
    assert all((demo / picture).is_file() for picture in pictures)
    for kind in ("Scores: {}", "Engines: {}", "Certificate: {}-bundle"):
        assert 0 < page.index(f"<h2>{kind.format('monsters')}</h2>") < page.index(f"<h2>{kind.format('iclevr')}</h2>")


def test_one_sheet_per_task_is_open_and_other_seeds_are_behind_a_fold(page):
    folds = re.findall(r"<details>(.*?)</details>", page, re.DOTALL)
    assert [re.findall(r"<h2>(.*?)</h2>", fold) for fold in folds] == [["monsters-2", "monsters-10"], ["iclevr-1"]]
    assert [re.findall(r"<summary>(.*?)</summary>", fold) for fold in folds] == [
        ["monsters: 2 other seeds"],
        ["iclevr: 1 other seed"],
    ]
    unfolded = re.sub(r"<details>.*?</details>", "", page, flags=re.DOTALL)
    assert re.findall(r"<h2>(\w+-\d+)</h2>", unfolded) == ["monsters-0", "iclevr-0", "faces-0"]
    assert unfolded.count("3 images in 2.0 s: ort fp32, ddim 20 steps, guidance 2.0") == 3


def test_what_a_time_limit_left_out_is_said_below_the_timings(page):
    assert page.count("<p>ort: 1 of 3 rounds: the time was used up</p>") == 2
