"""The targets on the reference architectures, on a GPU and within a time limit: `python -m benchmarks.gpu --out DIR`.

Random weights of full size; whether a card computes the right thing at all is what `python -m benchmarks.first` asks, before
this. What compiles comes last: the UNet at the job's batch, at one image and at 32 label images, the decoder at its own batch.
Every section runs under a limit of its own, and the JSON in DIR is complete after every row, so a run that is cut off keeps
what it has. `--device cpu --tiny` tries the script out.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from benchmarks.gpu_targets import targets
from benchmarks.machine import environment
from benchmarks.matrix import default_device, line
from benchmarks.parts import Fact, Part, Run, kept_for_all_parts, run_parts
from benchmarks.report import table
from benchmarks.rows import UNITS
from fastgen.files.cachedir import cache_dir


def _section(name: str, needs: float, limit: float, function: str | None = None, **arguments: Any) -> Part:
    run = f"benchmarks.gpu_sections:{function or name.replace('-', '_')}"
    return Part(name, run, needs, limit, own=name.startswith("compiled"), arguments=arguments)


# In the order of what must not be missing; needs and limit in seconds.
SECTIONS = [
    _section("reference", 20, 150),
    _section("job", 45, 240),
    _section("one", 30, 90),
    _section("peers", 40, 150),
    _section("labels", 30, 180),
    _section("growth", 30, 180),
    _section("profile", 15, 60),
    _section("slow", 40, 180),
    _section("compiled-job", 90, 400, "job", engine="compile"),
    _section("compiled-one", 60, 240),
    _section("compiled-labels", 60, 240),
    _section("compiled-peer", 60, 300),
    _section("bundles", 90, 600),
]
NAMES = [section.name for section in SECTIONS]


@dataclass
class Results:
    """What becomes gpu.json: section -> rows or result, beside `notes` (why there is nothing) and `seconds`."""

    file: Path
    found: dict[str, Any] = field(default_factory=lambda: {"notes": {}, "seconds": {}, "columns": UNITS})

    def put(self, part: str, fact: Fact) -> None:
        if "row" in fact:
            self.found.setdefault(part, []).append(fact["row"])
        elif "result" in fact:
            self.found[part] = fact["result"]
        elif "settings" in fact:
            self.found.setdefault("settings", fact["settings"])  # of the text model
        elif "skipped" in fact:
            self.found["notes"][part] = f"skipped: {fact['skipped']}"
        elif "error" in fact:
            self.found["notes"][part] = f"{fact['error']['type']}: {fact['error']['message']}"
        elif "seconds" in fact:
            self.found["seconds"][part] = fact["seconds"]
        print(f"{part:16} {_told(fact)}", flush=True)
        self.save()

    def save(self) -> None:
        self.file.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")


def _told(fact: Fact) -> str:
    """A fact in brief."""
    row = fact.get("row")
    if row is not None and "job_s" in row and "peak_mib" not in row:
        return f"{fact['what']}: {row['job_s']:.1f} s, {row['images_per_s']:.3g} images/s, max {row['max_abs_255']}/255"
    if row is not None:
        return line(row)
    if "result" in fact:
        return f"{fact['what']}\n{table(fact['result']['kinds'])}\n{table(fact['result']['kernels'])}"
    rest = {key: value for key, value in fact.items() if key not in ("what", "settings", "passed")}
    return fact["what"] + (f": {json.dumps(rest)}" if rest else "")


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for gpu.json and growth.json.")
@click.option("--minutes", default=9.0, show_default=True, help="No section begins when its time is not left.")
@click.option("--requests", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="[default: made up]")
@click.option("--images", default=1063, show_default=True, help="Of the job, the first of the requests.")
@click.option("--only", "only", multiple=True, type=click.Choice(NAMES), help="These sections.  [default: all]")
@click.option("--device", help="[default: cuda where there is one, else cpu]")
@click.option("--tiny", is_flag=True, help="Models and jobs of a few seconds, to try the script.")
@click.option("--work", type=click.Path(path_type=Path), help="Models and exports, kept.  [default: in the cache]")
def main(
    out: Path,
    minutes: float,
    requests: Path | None,
    images: int,
    only: Sequence[str],
    device: str | None,
    tiny: bool,
    work: Path | None,
) -> None:
    """The whole job, peers, batch 1, labels, growth, where time goes, then all that compiles; a table of targets last."""
    deadline = time.monotonic() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    run = Run(
        device or default_device(),
        out.absolute(),
        (work or cache_dir() / "benchmarks").absolute(),
        tiny,
        requests=requests and requests.absolute(),
        images=6 if tiny else images,
    )
    results = Results(out / "gpu.json")
    results.found["environment"] = environment()
    with kept_for_all_parts(run.out):
        run_parts([section for section in SECTIONS if not only or section.name in only], run, results, deadline)
    if rows := results.found.get("growth"):
        value = {key: results.found[key] for key in ("settings", "environment")} | {"rows": rows}
        (out / "growth.json").write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    print(f"\n{table(targets(results.found))}\n{out / 'gpu.json'}")


if __name__ == "__main__":
    main()
