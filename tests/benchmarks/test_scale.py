"""The benchmark of --ray: a whole run on a tiny model over a real local cluster, its arithmetic, and the page that shows it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("ray")

from benchmarks import scale, scale_arithmetic, scale_job, scale_sections, scale_table
from benchmarks.floor import count
from benchmarks.scale_job import Costs, Job, different, on_this, take
from fastgen.errors import FastgenError, InputError
from fastgen.generate.pipeline import load
from fastgen.models.bundle import read_bundle
from fastgen.models.find import find_model

TINY = scale.Size(((0.02, 3),), 2, (0.02, 2), 1, 1, 0.02, 0.2)


@pytest.mark.slow
def test_a_whole_run_measures_both_sides_of_equal_folders_and_prints_its_tables(label_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "QUICK", TINY)
    out = tmp_path / "scale.json"
    words = [str(label_bundle), "--quick", "--out", str(out), "--engine", "ort"]
    words += [word for name in ("overhead", "workers") for word in ("--only", name)]
    done = CliRunner().invoke(scale.main, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    value = json.loads(out.read_text())
    (row,) = value["rows"]
    assert row["files"] == row["batches"] * row["batch_size"] + 2  # the manifest, the contact sheet
    assert row["different_files"] == 0
    assert min(row["batch_s"], row["local_s"], row["ray_s"]) > 0
    assert 0 <= value["driver_cpu_ms_per_image"] < 100
    threads = {(line["where"], line["workers"], line["threads"]) for line in value["workers"]}
    cores = value["settings"]["cpu"]["cores"]
    assert 0 <= value["idle_cores"] <= cores  # of 0.2 s: it may be less than the kernel's tick of 10 ms
    assert threads == {("local", None, 1), ("local", None, cores), ("ray", cores, 1), ("ray", 1, cores)}
    assert all(line["images_per_s"] > 0 for line in value["workers"])
    assert scale_table.lines({**value, "environment": None}) in done.output


def test_other_bytes_end_the_measurement(label_bundle, tmp_path):
    pipeline = load(label_bundle, "ort", threads=1)
    job = Job("labels", 2, 2, 2)

    def other(job, out):
        on_this(pipeline)(job, out)
        with open(out / "1.png", "ab") as file:
            file.write(b"x")

    sides = {"local": on_this(pipeline), "ray": other}
    with pytest.raises(FastgenError, match="2 files differ"):
        scale_sections._overhead(1.0, job, sides, 2, tmp_path)
    digests = take(on_this(pipeline), job, tmp_path / "out").digests
    assert set(digests) == {"0.png", "1.png", "2.png", "3.png", "manifest.jsonl", "contact_sheet.png"}
    assert different(digests, {**digests, "0.png": "", "more": ""}) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("deaths", [0, 1])
def test_a_worker_that_died_makes_the_times_worthless(deaths, label_bundle, monkeypatch):
    pool = SimpleNamespace(deaths=deaths, wait=lambda: None)
    monkeypatch.setattr(scale_job, "Pool", lambda *arguments: nullcontext(pool))
    opened = scale_job.Cluster(None, read_bundle(label_bundle), "ort").pool(1)
    with pytest.raises(FastgenError, match="1 workers died") if deaths else nullcontext(), opened as found:
        assert found is pool


def test_the_largest_batch_size_with_enough_steps_is_taken(monkeypatch, label_bundle):
    costs = Costs(load(label_bundle, "ort", threads=1))
    monkeypatch.setattr(costs, "_batch", lambda size: (0.01 * size, 0.01 * size))
    assert costs.job(1.0, 3) == Job("labels", 16, 5, 3)
    assert costs.job(0.1, 3) == Job("labels", 2, 4, 3)
    assert costs.job(0.005, 3) == Job("labels", 1, 1, 3)
    assert costs.job(1000.0, 3) == Job("labels", 16, 250, 3)


def test_the_first_image_is_timed_before_the_command_ends_and_a_failure_is_told(tmp_path):
    script = "import sys, time; open(sys.argv[1], 'w'); time.sleep(0.5)"
    first_s, command_s = scale_sections.first_image([sys.executable, "-c", script, tmp_path / "a"], tmp_path / "a")
    assert 0 < first_s < command_s - 0.3
    with pytest.raises(FastgenError, match="no such option"):
        scale_sections.first_image([sys.executable, "-c", "raise SystemExit('no such option')"], tmp_path / "b")


def test_cpu_time_of_processes_below_counts_as_the_cluster_s(monkeypatch):
    spin = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'sum(range(10**7))'])"
    with subprocess.Popen([sys.executable, "-c", spin]) as process:
        share = scale_sections.idle(0.1)
        end = time.monotonic() + 20
        while process.poll() is None and (share or 0) <= 0.05 and time.monotonic() < end:
            share = scale_sections.idle(0.1)
    assert share is not None
    assert share > 0.05
    monkeypatch.setattr(scale_sections, "PROCESSES", scale_sections.PROCESSES / "none")
    assert scale_sections.idle(0.0) is None


def test_hours_and_costs_are_shared_by_the_gpus_and_the_floor_is_the_networks_operations():
    assert scale_arithmetic.hours(3600, 2.0, 4) == 0.5
    assert scale_arithmetic.cost(3600, 2.0, 4, 3.0) == 6.0
    with pytest.raises(InputError, match="0 GPUs"):
        scale_arithmetic.hours(1, 1.0, 0)
    value = scale_arithmetic.arithmetic(["monsters-64"], images=10**6, gpus=8, price=2.0, driver_ms=1.0)
    floor, tenth = value["rows"]
    work = count(find_model("monsters-64").folder)
    flop = 4 * 2 * work.unet_flop + work.vae_flop  # 4 evaluations, guided
    assert floor["gflop_per_image"] == pytest.approx(flop / 1e9)
    assert floor["us_per_image"] >= 1e6 * flop / 989e12
    assert floor["hours"] == pytest.approx(1e6 * floor["us_per_image"] / 1e6 / 8 / 3600)
    assert floor["cost"] == pytest.approx(8 * 2.0 * floor["hours"])
    assert tenth["hours"] == pytest.approx(10 * floor["hours"])
    assert value["driver_hours"] == pytest.approx(1000 / 3600)


@pytest.mark.parametrize(
    ("words", "address", "told"),
    [
        (["B"], "auto", "RAY_ADDRESS is set"),
        (["B", "--engine", "nonsense"], "", "nonsense"),
        (["none"], "", "none: "),
        (["M", "--engine", "eager"], "", "expected a bundle; `fastgen export"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_measured(
    words, address, told, label_bundle, label_model, monkeypatch
):
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(scale, "measure", pytest.fail)
    known = {"B": str(label_bundle), "M": str(label_model)}
    done = CliRunner().invoke(scale.main, [known.get(word, word) for word in words])
    (line,) = done.output.splitlines()
    assert done.exit_code == 1
    assert line.startswith("error: ")
    assert told in line


def test_the_page_says_what_the_result_says(tmp_path):
    text = scale_table.PAGE.read_text(encoding="utf-8")
    assert scale_table.written(text, scale_table.page_lines(scale_table.RESULT)) == text
    result, page = tmp_path / "scale.json", tmp_path / "scale.md"
    page.write_text(f"before\n{scale_table.BEGIN}{scale_table.NOTHING}{scale_table.END}after\n")
    result.write_text(json.dumps(EXAMPLE))
    words = ["--result", str(result), "--page", str(page)]
    assert CliRunner().invoke(scale_table.main, words, catch_exceptions=False).exit_code == 0
    told = page.read_text()
    assert (told.startswith("before\n"), told.endswith("after\n"), scale_table.NOTHING in told) == (True, True, False)
    assert "2 cores work like two threads of one core" in told.replace("the two", "the 2")
    assert "| 1.05 | 16 x 20 | 8 | 8.4 | 8.6 | 25 ms | 2.4% (1 to 3) | 0 of 130 |" in told
    assert "(held). Not in it: the idle cluster takes 2.5% of a core" in told
    assert "| `openvino` | `--ray`, 2 workers | 1 | 20 (19 to 21) | 0 |" in told
    assert "| `--ray` | 6 (5 to 7) | 8 |" in told
    assert "**Estimated, not measured**: 1,000,000 pictures" in told
    assert "| `monsters-64` | 4 | 10% of it | 40 us | 5 s |" in told
    assert "0.5 ms of CPU for each picture" in told


LEVEL = {"target_s": 1.0, "batch_s": 1.05, "batch_size": 16, "steps": 20, "batches": 8, "local_s": 8.4, "ray_s": 8.6}
EXAMPLE = {
    "settings": {"bundle": "B", "engine": "ort", "ray": "2.60.0", "cpu": {"cores": 2, "all_over_one": 1.1}},
    "environment": {"cpu": "any", "cores": 2, "commit": "abc"},
    "rows": [
        {
            **LEVEL,
            "overhead_ms_per_batch": 25.0,
            "overhead_percent": 2.4,
            "spread_percent": "1 to 3",
            "holds": True,
            "files": 130,
            "different_files": 0,
        }
    ],
    "idle_cores": 0.025,
    "workers": [
        {
            "engine": "openvino",
            "where": "ray",
            "workers": 2,
            "threads": 1,
            "images_per_s": 20.0,
            "spread": "19 to 21",
            "different_files": 0,
        }
    ],
    "start": [{"where": "ray", "first_image_s": 6.0, "spread_s": "5 to 7", "command_s": 8.0}],
    "arithmetic": {
        **scale_arithmetic.inputs(10**6, 8, None),
        "driver_cpu_ms_per_image": 0.5,
        "driver_hours": 0.14,
        "rows": [
            {
                "model": "monsters-64",
                "evaluations": 4,
                "share_of_floor": 0.1,
                "us_per_image": 40.0,
                "hours": 5 / 3600,
                "cost": None,
            }
        ],
    },
}
