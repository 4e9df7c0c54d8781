"""The benchmark of the targets fits its minutes: nothing is made twice, and only what a job uses is compiled."""

from __future__ import annotations

import collections
import importlib
import json
import math
import time

import pytest
from click.testing import CliRunner

pytest.importorskip("torch")
pytest.importorskip("diffusers")

from benchmarks import floor, gpu, gpu_sections
from benchmarks.gpu_targets import checks, judge, measured, targets
from benchmarks.measure import Matrix
from benchmarks.parts import Run, kept_for_all_parts
from fastgen.engines.compile import engine as engine_compile

JOB = {"side": "eager:fp16:graphs", "dtype": "fp16", "batch": 119, "steps": 70, "psnr_db": 40.0, "max_abs_255": 9}
JOB |= {"job_s": 30.0, "images_per_s": 35.0, "floor_percent": 40.0}


class Counted:
    """How often references were made, and what was measured and compiled. In place of each package its module runs."""

    def __init__(self, monkeypatch):
        self.references, self.rates, self.compiled = collections.Counter(), collections.Counter(), collections.Counter()
        references, measure = Matrix.references, floor.measure

        def counted_references(matrix):
            self.references[matrix.plan.model.name] += 1
            return references(matrix)

        def counted_measure(device, dtype, **options):
            self.rates[dtype] += 1
            return measure(device, dtype, threads=1, seconds=0)

        def module(engine, network, rows):
            self.compiled[engine._source.folder.name, network, rows] += 1
            engine._packages[network, rows] = InPlace(engine, network)
            return engine._packages[network, rows]

        monkeypatch.setattr(Matrix, "references", counted_references)
        monkeypatch.setattr(floor, "measure", counted_measure)
        monkeypatch.setattr(engine_compile.Engine, "_load", module)


class InPlace:
    """A network's module in the place of its package."""

    def __init__(self, engine, network):
        self.engine, self.network = engine, network

    def run(self, inputs):
        return self.engine._run_module(self.network, inputs)


@pytest.fixture
def run(tmp_path):
    with kept_for_all_parts(tmp_path):
        yield Run("cpu", tmp_path, tmp_path, tiny=True, deadline=time.monotonic() + 300, images=11)


@pytest.fixture
def models(text_model, label_model, monkeypatch):
    monkeypatch.setattr(gpu_sections, "text_model", lambda run: text_model)
    monkeypatch.setattr(gpu_sections, "label_model", lambda run: label_model)
    return text_model.name, label_model.name


def sections(run, *left_out):
    """All facts of the sections, by section, in this process."""
    found = {}
    for part in gpu.SECTIONS:
        if part.name not in left_out:
            module, _, name = part.run.partition(":")
            found[part.name] = list(getattr(importlib.import_module(module), name)(run, **part.arguments))
    return found


def test_references_and_rates_are_made_once_and_only_what_a_job_uses_is_compiled(run, models, monkeypatch):
    counted = Counted(monkeypatch)
    text, labels = models
    found = sections(run, "bundles", "compiled-peer")
    assert counted.references == {text: 1, labels: 1}
    assert counted.rates == {"fp32": 1, "bf16": 1}
    (job,) = [fact["row"] for fact in found["compiled-job"] if "row" in fact]
    assert job["batches"] == [11]
    unets = {(key, size) for key, network, size in counted.compiled if network == "unet"}
    assert unets == {(text, 2 * 11), (text, 2), (labels, 2 * 2)}
    decoders = {size for key, network, size in counted.compiled if network == "vae_decoder"}
    assert decoders == {11, 1}  # on a GPU what the decoder takes at once, whatever the job's batch, and one image


def test_a_job_is_measured_at_the_batch_size_that_run_job_chooses(run, models, monkeypatch):
    monkeypatch.setattr(gpu_sections, "automatic_batch_size", lambda pipeline, settings: 4)
    (fact,) = gpu_sections.job(run)
    row = fact["row"]
    assert (row["batch"], row["batches"], row["images"], row["job"]) == (4, [4, 3], 11, 11)
    assert (row["psnr_db"] or math.inf) > 30  # None: the same bytes
    assert row["job_s"] > 0
    assert 0 < row["floor_percent"] < 200


def test_a_job_that_is_fitted_to_its_limit_is_whole_batches_and_extrapolated(run, models, monkeypatch):
    monkeypatch.setattr(gpu_sections, "automatic_batch_size", lambda pipeline, settings: 2)
    monkeypatch.setattr(gpu_sections, "SPARE", run.left)
    (fact,) = gpu_sections.job(run, fit=True)
    assert (fact["row"]["images"], fact["row"]["job"]) == (2, 11)
    assert fact["row"]["job_s"] == pytest.approx(11 / fact["row"]["images_per_s"])


@pytest.mark.slow
def test_the_script_runs_through_on_a_cpu_each_section_under_a_limit(tmp_path):
    arguments = ["--out", tmp_path, "--work", tmp_path / "work", "--device", "cpu", "--tiny"]
    chosen = [part for name in ("job", "one", "labels", "growth", "profile") for part in ("--only", name)]
    result = CliRunner().invoke(gpu.main, [str(a) for a in (*arguments, *chosen)], catch_exceptions=False)
    assert result.exit_code == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["job"][0]["images"] == 6
    assert found["notes"] == {}
    assert "share of the floor" in result.output
    assert not (tmp_path / "kept").exists()
    assert len(json.loads((tmp_path / "growth.json").read_text())["rows"]) == 2


def test_a_section_that_failed_is_a_note_and_rows_are_kept(tmp_path):
    results = gpu.Results(tmp_path / "gpu.json")
    results.put("job", {"what": "eager", "row": JOB})
    results.put(
        "one", {"what": "limit", "passed": False, "error": {"type": "TimeLimit", "message": "ended", "frames": []}}
    )
    results.put("peers", {"what": "the part", "skipped": "needs 40 s, 3 s are left"})
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["job"] == [JOB]
    assert found["notes"] == {"one": "TimeLimit: ended", "peers": "skipped: needs 40 s, 3 s are left"}


def test_targets_say_what_was_met_missed_and_not_measured():
    peers = [{"batch": 1, "images_per_s": 5.0}, {"batch": 64, "images_per_s": 25.0}]
    found = {row["target"]: (row["measured"], row["verdict"]) for row in targets({"job": [JOB], "peers": peers})}
    assert found["whole job, s"] == (30.0, "met")
    assert found["against diffusers fp16, its best batch"] == (1.4, "MISSED")
    assert found["against diffusers fp16, batch 1"] == (7.0, "met")
    assert found["guided step at batch 1, ms"] == (None, "not measured")
    assert found["correctness"] == ("1 passed, 0 failed", "met")


def test_a_faster_job_counts_where_its_pictures_are_right():
    compiled = JOB | {"side": "compile:fp16:graphs", "job_s": 20.0}
    whole = {row["target"]: row["measured"] for row in targets({"job": [JOB], "compiled-job": [compiled]})}
    assert whole["whole job, s"] == 20.0
    wrong = targets({"job": [JOB], "compiled-job": [compiled | {"psnr_db": 12.0}]})
    assert wrong[0]["measured"] == 30.0
    assert wrong[-1]["verdict"] == "MISSED"


def row(side, psnr_db, max_abs_255=40):
    return {"side": side, "dtype": "fp16", "batch": 4, "steps": 10, "psnr_db": psnr_db, "max_abs_255": max_abs_255}


def test_lower_precision_may_be_1_5_times_as_far_as_eager_is_in_it():
    eager = row("eager:fp16", 25.0)
    assert not judge(eager | {"side": "compile:fp16"}, [])["passed"]
    assert judge(row("compile:fp16", 22.0), [eager])["passed"]
    assert not judge(row("compile:fp16", 21.0), [eager])["passed"]
    assert judge(row("compile:fp16", 31.0), [row("eager:fp16", 60.0)])["passed"]
    assert not judge(row("eager:fp32", 60.0, 3) | {"dtype": "fp32"}, [])["passed"]


def test_eager_with_graphs_is_no_yardstick_of_its_own():
    graphs = row("eager:fp16:graphs", 12.0)
    assert not judge(graphs, [graphs])["passed"]
    assert [check["passed"] for check in checks({"one": [row("eager:fp16", 40.0), graphs]})] == [False]


def test_a_step_that_was_not_measured_is_none_of_the_steps():
    own = row("eager:fp16:graphs", 40.0) | {"images_per_s": 3.0}
    assert "step_ms" not in measured({"one": [own | {"step_ms": None}]})
    assert measured({"one": [own | {"step_ms": None}, own | {"step_ms": 2.0}]})["step_ms"] == 2.0
