"""Time to the first image in a new process, against importing the training stack: `python -m benchmarks.startup`."""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.models import prepared
from benchmarks.prompts import conditions
from benchmarks.report import RESULTS, report, spread
from fastgen.files.cachedir import cache_dir
from fastgen.models.bundle import read_bundle

HEAVY = ("torch", "diffusers", "transformers", "onnxruntime")
STACK = "import torch, diffusers, transformers"
LOADED = f"""
import sys
from fastgen.cli.commands import cli
try:
    cli(["--help"])
except SystemExit:
    pass
print([name for name in {HEAVY} if name in sys.modules])
"""


@click.command()
@click.option("--preset", "presets", multiple=True, default=("monsters-64", "iclevr-64"), show_default=True)
@click.option("--engine", "engines", multiple=True, default=("ort", "openvino"), show_default=True)
@click.option("--rounds", default=7, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), help="Models and bundles, kept.  [default: in the cache]")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "startup-cpu.json", show_default=True)
def main(presets: Sequence[str], engines: Sequence[str], rounds: int, work: Path | None, out: Path) -> None:
    """Whole processes, in turn: the imports alone, `fastgen --help`, and `fastgen generate` of one image from a bundle."""
    work = work or cache_dir() / "benchmarks"
    bundles = [prepared(preset, work)[1] for preset in presets]
    with tempfile.TemporaryDirectory() as scratch:
        commands = {STACK: [sys.executable, "-c", STACK], "fastgen --help": _fastgen("--help")}
        for bundle in bundles:
            for engine in engines:
                commands[f"{bundle.name}, {engine}, one image"] = _generate(bundle, engine, Path(scratch))
        rows = _measure(commands, rounds)
    loaded = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True).stdout
    report(out, {"rounds": rounds, "heavy_imports_of_help": loaded.splitlines()[-1]}, rows)


def _fastgen(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "fastgen", *arguments]


def _generate(bundle: Path, engine: str, scratch: Path) -> list[str]:
    """The command for one image; every run writes to a folder of its own, `{run}`."""
    given = conditions(read_bundle(bundle).spec.condition.kind, 1)
    requests = [{"prompt": given["prompts"][0]}] if "prompts" in given else given["labels"]
    file = scratch / f"{bundle.name}.json"
    file.write_text(json.dumps(requests))
    out = scratch / f"{bundle.name}-{engine}-{{run}}"
    return _fastgen("generate", str(file), "--model", str(bundle), "--engine", engine, "--out", str(out))


def _measure(commands: dict[str, list[str]], rounds: int) -> list[dict[str, Any]]:
    """Medians over `rounds`, after one round that fills the file cache; ratios are to the first command, round by round."""
    wall: dict[str, list[float]] = {name: [] for name in commands}
    cpu: dict[str, list[float]] = {name: [] for name in commands}
    for run in range(rounds + 1):
        for name, command in commands.items():
            seconds, cpu_seconds = _run([part.replace("{run}", str(run)) for part in command])
            if run:
                wall[name].append(seconds)
                cpu[name].append(cpu_seconds)
    reference = wall[next(iter(commands))]
    rows = []
    for name, taken in wall.items():
        ratios = [r / t for r, t in zip(reference, taken, strict=True)]
        rows.append(
            {
                "process": name,
                "seconds": statistics.median(taken),
                "spread_s": spread(taken),
                "cpu_s": statistics.median(cpu[name]),
                "sooner": statistics.median(ratios),
                "ratio_spread": spread(ratios),
            }
        )
    return rows


def _run(command: list[str]) -> tuple[float, float]:
    """Wall-clock and CPU seconds of a process. Python keeps its byte code, as it does for an installed package: a machine may
    forbid that by a variable, and then every start would compile the modules."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, capture_output=True, check=True, env=env)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


if __name__ == "__main__":
    main()
