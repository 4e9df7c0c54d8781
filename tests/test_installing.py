"""Every hint names packages that an index has, and nothing tells users to install fastgen from an index, which lacks it."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fastgen.files.installing import DISTRIBUTION, Install, hint

REPO = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
FOLDERS = ("fastgen", "export", "benchmarks", "bin", "docs")
FILES = [file for folder in FOLDERS for file in (REPO / folder).rglob("*") if file.is_file()] + [*REPO.glob("*.md")]
TEXTS = {
    str(file.relative_to(REPO)): file.read_text(encoding="utf-8")
    for file in FILES
    if file.suffix in ("", ".py", ".md", ".sh", ".toml", ".txt", ".json")
}
ASKED = re.compile(r"""\b(?:hint|Install)\(["'](\w+)["']""")
FROM_AN_INDEX = re.compile(r"""install\s+(?:-\S+\s+)*["'`]*fastgen\b(?!\.)|fastgen[-_.]diffusion\[""", re.IGNORECASE)
EXTRAS = sorted({extra for text in TEXTS.values() for extra in ASKED.findall(text)})


def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What pip would install into an empty environment; it installs nothing."""
    constraints = ["--constraint", str(REPO / "bin" / "constraints-cpu.txt")]
    command = [sys.executable, "-m", "pip", *arguments, "--dry-run", "--ignore-installed", *constraints]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def _index():
    """Skips where no package index is reachable: not even for a package that fastgen itself needs."""
    done = pip("install", "--no-deps", "--retries", "0", "click")
    if done.returncode:
        pytest.skip(f"no package index is reachable: {done.stderr.strip().splitlines()[-1]}")


def test_the_source_asks_for_extras_that_there_are():
    assert {"cpu", "cuda", "train", "export", "score", "bench", "parquet", "ray", "trt", "rtx"} == set(EXTRAS)
    by_variables = {"serve", "ray-serve", "s3", "gcs", "azure"}
    assert {*EXTRAS, *by_variables} <= set(PROJECT["optional-dependencies"])


@pytest.mark.slow
@pytest.mark.usefixtures("_index")
@pytest.mark.parametrize("extra", EXTRAS)
def test_pip_finds_all_that_a_hint_names(extra):
    program, *arguments = shlex.split(hint(extra))
    assert program == "pip"
    if extra == "trt":  # its libraries are on NVIDIA's own index, which a package of PyPI asks
        arguments.append("--no-deps")
    done = pip(*arguments)
    assert done.returncode == 0, done.stderr
    would_install = done.stdout.splitlines()[-1]
    for package in arguments[1:]:
        if package[0] != "-":
            name = re.split("[>=]", package)[0].replace("-", "[-_]")
            assert re.search(f" {name}-[0-9]", would_install)


def test_no_file_tells_users_to_install_fastgen_from_an_index():
    assert "README.md" in TEXTS
    assert {file for file, text in TEXTS.items() if FROM_AN_INDEX.search(text)} == set()


@pytest.mark.parametrize("name", ["fastgen-diffusion", '"fastgen-diffusion[cpu]"', "-U fastgen-diffusion", "fastgen"])
def test_such_a_command_would_be_noticed(name):
    assert FROM_AN_INDEX.search(f"first `pip install {name}`, then")


def test_a_hint_names_the_packages_of_the_extra_and_of_extras_it_names_with_their_lowest_versions():
    assert hint("cpu") == 'pip install "onnxruntime>=1.20" "openvino>=2025.0"'
    extras = PROJECT["optional-dependencies"]
    expected = [*extras["train"], *(line for line in extras["export"] if not line.startswith(DISTRIBUTION))]
    assert shlex.split(hint("export")) == ["pip", "install", *expected]
    assert hint("bench", "for plots") == 'pip install "matplotlib>=3.8" (for plots)'


def test_a_package_that_is_not_made_for_this_platform_is_named(monkeypatch):
    lines = ['a>=1; extra == "rtx"', 'b>=2; sys_platform == "abacus" and extra == "rtx"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    assert hint("rtx", "note") == f"no wheel of b>=2 is made for {sys.platform} on {platform.machine()}"


@pytest.mark.parametrize("metadata", [None, ["torch>=2.6; extra == 'train'"]])
def test_without_the_extra_in_the_metadata_the_hint_is_to_install_the_clone(monkeypatch, metadata):
    def requires(name: str) -> list[str]:
        if metadata is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return metadata

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    assert hint("cpu") == 'pip install ".[cpu]" in the clone of fastgen, the folder of its pyproject.toml'


def test_an_engine_s_command_is_worked_out_when_it_is_read():
    class Engine:
        install = Install("cpu", "note")

    assert Engine.install == Engine().install == hint("cpu", "note")
    script = "import sys, fastgen.engines.ort.engine, fastgen.cli; sys.exit('packaging' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
