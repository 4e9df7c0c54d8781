"""What `pip install .` gives: every package and preset, and a base install that is light."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import venv
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

from fastgen.models.find import shipped_names

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def packages() -> set[str]:
    """Every folder with an __init__.py below the two packages, dotted."""
    folders = [f.parent for name in ("fastgen", "export") for f in (ROOT / name).rglob("__init__.py")]
    return {".".join(folder.relative_to(ROOT).parts) for folder in folders}


def test_every_folder_of_code_is_a_package_that_setuptools_finds():
    patterns = PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    code = {f.parent for name in ("fastgen", "export") for f in (ROOT / name).rglob("*.py")}
    assert {".".join(folder.relative_to(ROOT).parts) for folder in code} == packages()
    assert [p for p in packages() if not any(fnmatch(p, pattern) for pattern in patterns)] == []


def test_the_base_install_needs_none_of_the_heavy_packages():
    names = {d.split(">")[0].split("[")[0] for d in PROJECT["project"]["dependencies"]}
    assert names.isdisjoint({"torch", "diffusers", "transformers", "onnx", "onnxruntime", "openvino", "scipy"})


def test_the_two_onnxruntime_builds_are_never_installed_together():
    for name, extra in PROJECT["project"]["optional-dependencies"].items():
        builds = {d.split(">")[0] for d in extra if d.startswith("onnxruntime")}
        assert len(builds) < 2, name


@pytest.mark.slow
def test_the_wheel_runs_in_a_clean_environment(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT], check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"{package.replace('.', '/')}/__init__.py" for package in packages()} <= names
    assert {f"fastgen/presets/{f.name}" for f in (ROOT / "fastgen" / "presets").glob("*.toml")} <= names
    models = [
        f.relative_to(ROOT).as_posix() for f in (ROOT / "fastgen" / "models" / "shipped").rglob("*") if f.is_file()
    ]
    assert set(models) == {name for name in names if name.startswith("fastgen/models/shipped/")}
    assert {"fastgen/data/synthetic/held_out.txt", "fastgen/serving/page/index.html"} <= names
    assert not any(name.startswith(("tests/", "benchmarks/", "bin/")) for name in names)

    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", wheel], check=True)
    script = tmp_path / "env" / "bin" / "fastgen"
    listed = subprocess.run(
        [python, "-c", "from fastgen.models.find import *; print(MODELS.parent, *shipped_names())"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "site-packages" in listed.stdout
    assert listed.stdout.split()[1:] == shipped_names()
    data = tmp_path / "data"
    subprocess.run([script, "data", "iclevr", data, "--count", "6", "--size", "32"], check=True, cwd=tmp_path)
    assert len(list((data / "iclevr").glob("*.png"))) == 6
    refused = subprocess.run(
        [script, "train", "iclevr-64", "--data", data], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "pip install" in refused.stderr
