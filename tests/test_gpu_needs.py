"""Tests for a GPU skip by the name of what a machine lacks."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
from gpu_needs import NEEDS, lacking

torch = pytest.importorskip("torch")
REPO = Path(__file__).parents[1]


@pytest.fixture
def card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.fixture
def without(monkeypatch):
    """Packages that are not there."""

    def run(*names):
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *rest: None if name in names else find(name, *rest)
        )

    return run


def test_without_a_gpu_the_reason_is_that(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert lacking(["tensorrt"]) == f"needs a CUDA GPU; torch {torch.__version__} sees none"


def test_with_a_gpu_the_reason_is_the_package(card, without):
    assert lacking() is None
    without("tensorrt", "onnxruntime")
    assert lacking(["tensorrt"]) == "needs tensorrt, not installed here"
    assert lacking(["onnxruntime-gpu"]) == "needs onnxruntime, not installed here"


def test_onnxruntime_for_cpus_is_not_enough(card, monkeypatch):
    fake = types.SimpleNamespace(__version__="1.31", get_available_providers=lambda: ["CPUExecutionProvider"])
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: object())
    assert lacking(["onnxruntime-gpu"]) == "needs onnxruntime-gpu; onnxruntime 1.31 has no CUDA provider here"
    fake.get_available_providers = lambda: ["CUDAExecutionProvider"]
    assert lacking(["onnxruntime-gpu"]) is None


def test_tensorrt_for_rtx_needs_a_card_that_it_compiles_for(card, without, monkeypatch):
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: object())
    assert "not for 9.0 (Hopper)" in lacking(["tensorrt-rtx"])
    capability = (8, 9)
    assert lacking(["tensorrt-rtx"]) is None
    without("tensorrt_rtx")
    assert lacking(["tensorrt-rtx"]) == "needs tensorrt_rtx, not installed here"


def test_compilers_are_those_that_the_engine_asks_for(card, monkeypatch):
    from fastgen.engines.compile import package
    from fastgen.errors import InputError

    def refuse(on_gpu):
        raise InputError("engine compile needs CUDA's headers")

    monkeypatch.setattr(package, "check_tools", refuse)
    assert lacking(["compilers"]) == "engine compile needs CUDA's headers"
    monkeypatch.setattr(package, "check_tools", lambda on_gpu: None)
    assert lacking(["compilers"]) is None


def test_a_need_that_is_not_known_is_an_error(card):
    assert set(NEEDS) == {"compilers", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx"}
    with pytest.raises(KeyError):
        lacking(["tensorflow"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="they would run")
def test_all_of_them_skip_here_with_the_reason_and_only_their_files_are_collected():
    mark = ".".join(["pytest", "mark", "gpu"])  # written apart: this file holds no such test
    files = [str(file) for file in (REPO / "tests").rglob("test_*.py") if mark in file.read_text()]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-rs", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "needs a CUDA GPU" in done.stdout
    assert "failed" not in done.stdout
    assert " passed" not in done.stdout


def test_the_script_asks_pytest_for_these_files_alone(tmp_path):
    mark = ".".join(["pytest", "mark", "gpu"])
    for folder in ("bin", "tests/engines", ".venv/bin"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "tests" / "engines" / "test_a.py").write_text(f"@{mark}\n")
    (tmp_path / "tests" / "test_b.py").write_text("# none\n")
    for name in ("bin/test", "bin/setup"):
        shutil.copy(REPO / name, tmp_path / name)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)

    def asked(*words):
        command = ["bash", str(tmp_path / "bin" / "test"), *words]
        done = subprocess.run(command, env=os.environ | {"NO_SETUP": "1"}, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert asked("--gpu", "-x") == "-m pytest -m gpu tests/engines/test_a.py -x"
    assert (
        asked() == "-m pytest -n auto --maxprocesses 8 --dist loadfile --max-worker-restart 0 -m not slow and not gpu"
    )
    assert asked("tests/test_b.py") == "-m pytest tests/test_b.py"
