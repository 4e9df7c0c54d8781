"""The README's sheet shows the first images of runs, in the order of their requests, and says when there are too few."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from click.testing import CliRunner
from PIL import Image

from benchmarks.sheet import main


def run_of(folder: Path, values: list[int]) -> Path:
    """A finished run of images of one value each, listed in the given order."""
    folder.mkdir()
    for value in values:
        Image.new("RGB", (4, 4), (value, value, value)).save(folder / f"{value}.png")
    lines = (json.dumps({"image_name": f"{value}.png"}) + "\n" for value in values)
    (folder / "manifest.jsonl").write_text("".join(lines))
    return folder


def test_images_stand_in_the_order_of_the_runs_and_their_requests(tmp_path):
    runs = [run_of(tmp_path / "a", [200, 10]), run_of(tmp_path / "b", [90, 40, 70])]
    out = tmp_path / "sheet.png"
    done = CliRunner().invoke(main, [*map(str, runs), "--out", str(out), "--count", "4", "--columns", "2"])
    assert done.exit_code == 0, done.output
    sheet = np.asarray(Image.open(out))
    assert sheet.shape == (14, 14, 3)
    assert [int(sheet[y, x, 0]) for y in (4, 10) for x in (4, 10)] == [200, 10, 90, 40]


def test_too_few_images_are_an_error_that_counts_them(tmp_path):
    run = run_of(tmp_path / "a", [1, 2])
    done = CliRunner().invoke(main, [str(run), "--out", str(tmp_path / "sheet.png")])
    assert done.exit_code != 0
    assert "2 images, expected at least 256" in str(done.exception)
    assert not (tmp_path / "sheet.png").exists()
