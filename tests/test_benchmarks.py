"""The benchmarks run on tiny models and report speed with parity beside it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from benchmarks import engines
from benchmarks.loop_cost import loop_cost
from benchmarks.matrix import Opened, Side, compare, parity


def test_engines_reports_every_engine_with_its_ratio_and_parity(text_model, text_bundle, tmp_path):
    out = tmp_path / "engines.json"
    arguments = [text_model, text_bundle, "--batch-size", 2, "--steps", 2, "--rounds", 2, "--out", out]
    result = CliRunner().invoke(engines.main, [str(a) for a in arguments], catch_exceptions=False)
    report = json.loads(out.read_text())
    rows = {row["side"]: row for row in report["rows"]}
    assert rows["eager"]["ratio"] == 1
    assert rows["ort"]["max_abs_255"] <= 1
    assert all(row["images_per_s"] > 0 and row["side"] in result.output for row in rows.values())
    assert report["environment"]["cores"] >= 1


def test_a_side_that_takes_twice_as_long_has_half_the_speed_and_shows_its_error():
    clock = iter(np.arange(100.0))

    def side(name, seconds, grey):
        def generate():
            for _ in range(seconds):
                next(clock)
            return np.full((3, 2, 2, 3), grey, np.uint8)

        return Side(name, lambda: Opened(generate, "fp32"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.matrix.time.perf_counter", lambda: next(clock))
        fast, slow = compare([side("fast", 1, 100), side("slow", 3, 110)], rounds=2)
    assert (fast["seconds"], slow["seconds"]) == (2, 4)
    assert (slow["ratio"], slow["images_per_s"]) == (0.5, 0.75)
    assert (fast["psnr_db"], slow["max_abs_255"]) == (None, 10)


def test_parity_is_the_textbook_psnr():
    expected = np.zeros((1, 4, 4, 3), np.uint8)
    found = expected.copy()
    found[0, 0, 0, 0] = 255
    assert parity(expected, found) == {"psnr_db": pytest.approx(10 * np.log10(48)), "max_abs_255": 255}


def test_loop_cost_is_the_share_outside_the_networks(label_bundle):
    row = loop_cost(label_bundle, "ort", batch_size=2, rounds=2, num_inference_steps=3)
    assert row["solver"].endswith(":3")
    assert 0 < row["loop_percent"] < 100
