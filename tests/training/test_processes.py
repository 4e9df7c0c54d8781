from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_train import LABEL_PRESET, labelled, weights  # noqa: F401
from torch import nn

from fastgen.errors import InputError
from fastgen.files.jsonfiles import read_jsonl
from fastgen.models.runs import RECORD
from fastgen.presets import load_preset
from fastgen.training import train
from fastgen.training.processes import Processes
from fastgen.training.run_folder import check_shared

ROOT = Path(__file__).parents[2]


def environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "FASTGEN_CACHE": str(cache), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def machines(words: list[str], cache: Path) -> list[str]:
    """Start the training command of docs/scale.md on two machines, both of them this one, with a CPU process each, and return
    what each prints."""
    (line,) = re.findall(r"^accelerate launch .*$", (ROOT / "docs" / "scale.md").read_text(), re.MULTILINE)
    shown = shlex.split(line)
    launch = shown[2 : shown.index("-m")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    values = {"--num_processes": "2", "--main_process_ip": "127.0.0.1", "--main_process_port": port}
    for option, value in values.items():
        launch[launch.index(option) + 1] = value
    started = []
    for rank in ("0", "1"):
        launch[launch.index("--machine_rank") + 1] = rank
        command = [sys.executable, "-m", "accelerate.commands.launch", *launch, *words]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=environment(cache / rank), **pipes))
    ends = [process.communicate(timeout=240) for process in started]
    assert [process.returncode for process in started] == [0, 0], ends
    return [said for said, _ in ends]


def rows(folder: Path) -> list[dict[str, float]]:
    return [row for _, row in read_jsonl(folder / "log.jsonl")]


@pytest.mark.slow
def test_two_machines_give_the_curve_and_the_weights_of_one_with_the_same_global_batch(
    labelled: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """And one process goes on from a checkpoint of theirs."""
    file = tmp_path / "tiny.toml"
    file.write_text(LABEL_PRESET.replace("batch_size = 4", "batch_size = 6\naccumulation = 2"))
    preset = load_preset(str(file))
    one = train(preset, labelled, tmp_path / "one", progress=False, device="cpu")
    two = tmp_path / "two"
    words = ["-m", "fastgen", "train", str(file), "--data", str(labelled), "--device", "cpu", "--out", str(two)]
    said = machines(words, tmp_path / "cache")
    assert said[0].count("model: ") == 1
    assert "model: " not in said[1]
    on = train(
        preset, labelled, tmp_path / "on", progress=False, device="cpu", resume=two / "checkpoints/unet/step-000004"
    )
    expected, found = rows(one), [*rows(two), *rows(on)]
    assert [row["step"] for row in rows(two)] == [row["step"] for row in expected]
    assert rows(on)[-1]["step"] == 6
    for row in found:
        for key in ("loss", "grad_norm", "validation_loss"):
            there = next(other for other in expected if other["step"] == row["step"])
            assert row.get(key) == (pytest.approx(there[key], rel=1e-5) if key in there else None), (key, row)
    for folder in (two, on):
        first, second = weights(one), weights(folder)
        assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in first)
    assert sorted(entry.name for entry in two.iterdir()) == sorted(entry.name for entry in one.iterdir())


def test_a_machine_that_does_not_see_the_folder_of_the_main_process_stops(tmp_path: Path) -> None:
    check_shared(tmp_path, Processes(0, 2))
    with pytest.raises(InputError, match=r"process 1 of 2 does not see the \w+\.json of the main process"):
        check_shared(tmp_path, Processes(1, 2))
    (tmp_path / RECORD).touch()
    check_shared(tmp_path, Processes(1, 2))


def test_several_processes_without_an_output_folder_are_refused(labelled: Path, tmp_path: Path) -> None:  # noqa: F811
    variables = environment(tmp_path) | {"WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "fastgen", "train", "iclevr-64", "--data", str(labelled)]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=tmp_path)
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
