"""The published sweeps run with any text model: theirs stand beside ours, with their solver where the model allows it."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from scoring_helpers import make_clip

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from benchmarks import reference_sweeps
from fastgen.generate.pipeline import load
from fastgen.models.bundle_record import sealed
from fastgen.retrieval.indexing import build_index


@pytest.fixture
def few(monkeypatch):
    """Two values per sweep, of few steps."""
    monkeypatch.setattr(reference_sweeps, "STEPS", 5)
    published = {"steps": (5, 10), "guidance": (1.0, 2.0), "rag-noise": (4, 5)}
    for name, values in published.items():
        varies = reference_sweeps.REFERENCES[name].varies
        found = reference_sweeps.Reference(varies, dict(zip(values, [(200.0, 0.25), (100.0, 0.3)], strict=True)))
        monkeypatch.setitem(reference_sweeps.REFERENCES, name, found)


def test_theirs_and_ours_stand_in_one_row(text_bundle, requests_files, tmp_path, few):
    data = tmp_path / "data"
    data.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for i in range(6):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(data / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"monster number {i}"}) + "\n")
    (data / "metadata.jsonl").write_text("".join(lines))
    build_index(data, load(text_bundle, "ort"), tmp_path / "index")
    options = ["--model", text_bundle, "--engine", "ort", "--index", tmp_path / "index", "--work", tmp_path / "work"]
    options += ["--clip", make_clip(tmp_path / "clip", 77), "--out", tmp_path / "out.json"]
    done = CliRunner().invoke(reference_sweeps.main, [str(word) for word in (requests_files["text"], *options)])
    assert done.exit_code == 0, done.output
    again = [*options, "--also", tmp_path / "work" / "steps"]
    done = CliRunner().invoke(reference_sweeps.main, [str(word) for word in (requests_files["text"], *again)])
    assert done.output.count("already there") == 6
    value = json.loads((tmp_path / "out.json").read_text())
    assert [(row["varies"], row["value"]) for row in value["rows"]] == [
        ("steps", 5),
        ("steps", 10),
        ("guidance", 1.0),
        ("guidance", 2.0),
        ("RAG noise", 4),
        ("RAG noise", 5),
    ]
    evaluations = [row["evaluations_per_image"] for row in value["rows"]]
    assert evaluations[2] * 2 == evaluations[3] == evaluations[0]  # guidance 1 is none
    assert evaluations[0] > 2 * 5  # with the Runge-Kutta warm-up
    assert {"clip_t", "clip_t_standard_error", "copy_distance"} < value["rows"][-1].keys()
    assert [row["evaluations_per_image"] for row in value["steps"]["rows"]] == evaluations[:2]
    assert str(tmp_path) not in json.dumps(value)
    assert value["settings"]["solver"] == "pndm-prk"
    assert "| RAG noise | their FID | their CLIP-T | our evaluations | our clip_t | copy distance |" in done.output


def test_a_schedule_that_pndm_cannot_have_is_swept_with_ddim_and_the_reason(text_bundle, rehash, tmp_path):
    other = shutil.copytree(text_bundle, tmp_path / "other")
    manifest = json.loads((other / "bundle.json").read_text())
    manifest["scheduler_config"]["rescale_betas_zero_snr"] = True
    (other / "bundle.json").write_text(json.dumps(sealed(manifest)))
    solver, reason = reference_sweeps.solver_for(other, "ort")
    assert solver == "ddim"
    assert "rescale_betas_zero_snr" in reason
