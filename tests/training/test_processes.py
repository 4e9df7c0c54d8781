from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import LABEL_PRESET, labelled, weights  # noqa: F401
from torch import nn

from fastgen.files.jsonfiles import read_jsonl
from fastgen.training.processes import Processes

ROOT = Path(__file__).parents[2]


def run(command: list[str], cache: Path) -> str:
    environment = {**os.environ, "FASTGEN_CACHE": str(cache), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(folder: Path) -> list[dict[str, float]]:
    return [row for _, row in read_jsonl(folder / "log.jsonl")]


def test_two_processes_give_the_curve_and_the_weights_of_one_with_the_same_global_batch(
    labelled: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    preset = tmp_path / "tiny.toml"
    preset.write_text(LABEL_PRESET.replace("batch_size = 4", "batch_size = 6\naccumulation = 2"))
    train = ["-m", "fastgen", "train", str(preset), "--data", str(labelled), "--device", "cpu", "--out"]
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    run([sys.executable, *train, str(tmp_path / "one")], tmp_path / "cache")
    said = run([sys.executable, *launch, *train, str(tmp_path / "two")], tmp_path / "cache")
    assert said.count("model: ") == 1
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for key in ("loss", "grad_norm", "validation_loss"):
        curve = [row[key] for row in one if key in row]
        assert len(curve) >= 2
        assert [row[key] for row in two if key in row] == pytest.approx(curve, rel=1e-5)
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in first)


def test_several_processes_without_an_output_folder_are_refused(labelled: Path, tmp_path: Path) -> None:  # noqa: F811
    environment = {**os.environ, "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "fastgen", "train", "iclevr-64", "--data", str(labelled)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2
    assert "several processes need one output folder: give --out" in done.stderr


@pytest.mark.parametrize(("examples", "count"), [(32, 2), (7, 3), (4, 1)])
def test_the_parts_of_a_batch_are_the_batch_in_order(examples: int, count: int) -> None:
    parts = [Processes(rank, count).part(np.arange(examples)) for rank in range(count)]
    assert np.concatenate(parts).tolist() == list(range(examples))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_one_process_leaves_its_gradients_alone() -> None:
    module = nn.Linear(2, 2)
    module(torch.ones(1, 2)).sum().backward()
    before = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    Processes().sum_gradients(module, 0.5)
    assert all(torch.equal(p.grad, b) for p, b in zip(module.parameters(), before, strict=True) if p.grad is not None)
