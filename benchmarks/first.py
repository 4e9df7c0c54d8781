"""The first minutes on a card: `python -m benchmarks.first OUT --minutes 9`.

The most valuable facts first, each a JSON line of OUT/first.jsonl and of stdout as soon as it is known; whether it computes the
right thing, then how fast, then what compiles. Nothing stops the rest: see benchmarks/parts.py. A table comes last, and
OUT/first.json, which `python -m benchmarks.gpu_table` takes into the repository. Exit code 1 where a check failed.
The targets on the reference architectures are another command, for afterwards: `python -m benchmarks.gpu`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from benchmarks.gpu_tests import COMPILES, test_files
from benchmarks.machine import environment
from benchmarks.parts import Fact, Part, Record, Run, kept_for_all_parts, run_parts
from benchmarks.report import cell, table
from fastgen.files.cachedir import cache_dir

MODELS = "iclevr-64", "monsters-64"
SLOWER = 3  # times the limits on a CPU, which others may use too
TESTS = [file for file in test_files() if file != COMPILES]


def _part(name: str, function: str, needs: float, limit: float, own: bool = False, **arguments: Any) -> Part:
    return Part(name, f"benchmarks.{function}", needs, limit, own, arguments)


def _of_models(name: str, function: str, needs: float, limit: float, own: bool = False) -> list[Part]:
    return [_part(f"{name}, {model}", function, needs, limit, own, model=model) for model in MODELS]


# In the order of what must not be missing; seconds that it needs, and after which it is ended.
PARTS = [
    _part("environment", "first_facts:about", 1, 60),
    *_of_models("loops", "first_facts:agreement", 15, 75),
    *_of_models("fp32", "first_facts:full_precision", 8, 40),
    *_of_models("bf16", "first_facts:half_precision", 5, 30),
    *_of_models("overlap", "first_facts:overlap", 10, 60),
    _part("memory", "first_memory:memory_comes_back", 8, 40, model="iclevr-64"),
    _part("no waiting", "first_memory:nothing_waits", 5, 30, model="iclevr-64"),
    _part("out of memory", "first_memory:out_of_memory", 15, 60, True, model="monsters-64"),
    *_of_models("speed", "first_speed:speed", 8, 40),
    *_of_models("slots", "first_serving:slots_agree", 8, 60),
    _part("slots, speed", "first_serving:slots_speed", 8, 60, model="iclevr-64"),
    *(_part(f"tests, {file}", "gpu_tests:tests", 8, 100, file=file) for file in TESTS),
    _part("full size", "first_speed:full_size", 40, 120),
    _part("job", "first_speed:job", 30, 110),
    _part("diffusers", "first_speed:against_diffusers", 30, 90),
    _part("compile", "first_speed:compiled", 40, 150, True, model="iclevr-64"),
    _part(f"tests, {COMPILES}", "gpu_tests:tests", 30, 300, file=COMPILES),
]
NAMES = [part.name for part in PARTS]


def verdict(fact: Fact) -> str | None:
    """ "passed", "failed" or "skipped"; None for a figure."""
    if "skipped" in fact:
        return "skipped"
    return None if "passed" not in fact else "passed" if fact["passed"] else "failed"


def summary(facts: Sequence[Fact]) -> list[dict[str, Any]]:
    """A row per part: how many checks passed, failed and were skipped, the seconds, and the first figures."""
    rows = []
    for name in dict.fromkeys(fact["part"] for fact in facts):
        mine = [fact for fact in facts if fact["part"] == name]
        verdicts = [verdict(fact) for fact in mine]
        seconds = next((fact["seconds"] for fact in mine if fact["what"] == "the part took"), None)
        counts = {kind: verdicts.count(kind) or None for kind in ("passed", "failed", "skipped")}
        rows.append({"part": name, **counts, "seconds": seconds, "figures": figures(mine)})
    return rows


def figures(facts: Sequence[Fact]) -> str | None:
    """The worst of a part's pictures, and its speeds."""
    levels = [fact["max_abs_255"] for fact in facts if fact.get("max_abs_255") is not None]
    psnr = [fact["psnr_db"] for fact in facts if fact.get("psnr_db") is not None]
    speeds = [f"{fact['what']}: {cell(fact['images_per_s'])}/s" for fact in facts if "images_per_s" in fact]
    found = [f"max {max(levels)}/255"] if levels else []
    found += [f"{min(psnr):.1f} dB"] if psnr else []
    return ", ".join([*found, *speeds]) or None


def report(facts: Sequence[Fact], settings: dict[str, Any]) -> dict[str, Any]:
    """What becomes first.json."""
    verdicts = [verdict(fact) for fact in facts]
    counts = {kind: verdicts.count(kind) for kind in ("passed", "failed", "skipped")}
    about = next((fact for fact in facts if fact["what"] == "environment"), environment())
    about = {key: value for key, value in about.items() if key not in ("t", "part", "what")}
    return {"settings": settings, "environment": about, **counts, "facts": list(facts)}


def check_gpu() -> None:
    """SystemExit where torch sees no GPU: then all parts would fail for that."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit(f"error: torch {torch.__version__} sees no CUDA GPU here; --device cpu tries the script")


@click.command()
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--minutes", default=9.0, show_default=True, help="No part begins when the time that it needs is not left."
)
@click.option("--device", default="cuda", show_default=True, help="cpu tries the script: what needs a GPU is skipped.")
@click.option("--only", "only", multiple=True, type=click.Choice(NAMES), help="These parts.  [default: all]")
@click.option("--work", type=click.Path(path_type=Path), help="Models, kept.  [default: in the cache]")
def main(out: Path, minutes: float, device: str, only: Sequence[str], work: Path | None) -> None:
    """Facts about this card and this package on it into OUT/first.jsonl and OUT/first.json, most valuable first."""
    deadline = time.monotonic() + 60 * minutes
    if device.startswith("cuda"):
        check_gpu()
    out.mkdir(parents=True, exist_ok=True)
    (out / "first.jsonl").unlink(missing_ok=True)
    tiny = not device.startswith("cuda")
    if tiny:
        os.environ.setdefault(
            "OMP_NUM_THREADS", "1"
        )  # of the helpers: two wait for each other where others use the cores
    work = (work or cache_dir() / "benchmarks").absolute()
    run = Run(device, out.absolute(), work, tiny, images=6 if tiny else 1063)
    record = Record(out / "first.jsonl")
    chosen = [part for part in PARTS if not only or part.name in only]
    patience = SLOWER if tiny else 1
    with kept_for_all_parts(run.out):
        run_parts([replace(part, limit=patience * part.limit) for part in chosen], run, record, deadline)
    found = report(record.facts, {"device": device, "minutes": minutes, "only": list(only)})
    (out / "first.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"\n{table(summary(record.facts))}\n")
    for fact in record.facts:
        if verdict(fact) == "failed":
            told = fact.get("error", {key: value for key, value in fact.items() if key not in ("t", "part", "what")})
            print(f"FAILED {fact['part']}: {fact['what']}: {json.dumps(told)}")
    print(f"{found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped; {out / 'first.json'}")
    sys.exit(1 if found["failed"] else 0)


if __name__ == "__main__":
    main()
