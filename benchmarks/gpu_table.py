"""What the README says of GPUs, from what was measured there: `python -m benchmarks.gpu_table OUT/first.json`.

Takes what `python -m benchmarks.first OUT` wrote into benchmarks/results/gpu/, and writes the README's lines anew from all that
is there. Without files it only writes the lines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.first import report
from benchmarks.report import RESULTS, cell, replaced

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- from benchmarks/results/gpu: python -m benchmarks.gpu_table -->\n\n", "\n<!-- end -->\n"
NOTHING = "**Nothing here has run on a GPU yet.**\n"
COLUMNS: tuple[str, ...] = (
    "card",
    "checks",
    "`monsters-64`, batch 64: with / without graphs",
    "846 M UNet: job of 1,063",
)
COLUMNS += ("against diffusers, batch 1 / largest", "guided step, batch 1", "share of the floor", "taken with")
Facts = Sequence[Mapping[str, Any]]


def row(value: Mapping[str, Any]) -> list[str]:
    """The cells of one first.json; "-" for what was not measured."""
    about, facts = value["environment"], value["facts"]
    speeds = [
        _figure(facts, "speed, monsters-64", f"batch 64, {kind}", "images_per_s") for kind in ("graphs", "no graphs")
    ]
    rates = [f"{cell(float(v))} images/s" if v else "-" for v in speeds]
    ours = [f for f in facts if f["part"] == "diffusers" and f["what"].startswith("eager") and ":graphs" in f["what"]]
    ratios = [f"{f['ratio']:.2f} x" for f in sorted(ours, key=lambda f: f["batch"]) if f.get("ratio")]
    job_s = _figure(facts, "job", "", "job_s")
    step = next((f["step_ms"] for f in ours if f["batch"] == 1 and f.get("step_ms")), None)
    floor = _figure(facts, "job", "", "floor_percent")
    versions = about["versions"]
    return [
        about["gpu"],
        f"{value['passed']} passed" + (f", **{value['failed']} failed**" if value["failed"] else ""),
        " / ".join(rates),
        f"{job_s:.1f} s" if job_s else "-",
        " / ".join([ratios[0], ratios[-1]]) if ratios else "-",
        f"{step:.2f} ms" if step else "-",
        f"{floor:.0f}%" if floor else "-",
        f"torch {versions['torch']}, driver {about['driver']}, commit {about['commit']}",
    ]


def _figure(facts: Facts, part: str, what: str, key: str) -> float | None:
    """A figure of the first fact of this part whose name ends so."""
    found = (fact[key] for fact in facts if fact["part"] == part and key in fact and _ends(fact["what"], what))
    return next(found, None)


def _ends(name: str, end: str) -> bool:
    return not end or name.endswith(f", {end}")


def lines(values: Sequence[Mapping[str, Any]]) -> str:
    """The README's lines: a table with a row per card, or that there is none."""
    if not values:
        return NOTHING
    rows = [list(COLUMNS), ["---"] * len(COLUMNS), *map(row, values)]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in rows)


def held(folder: Path) -> list[dict[str, Any]]:
    """All first-*.json of the results' folder."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("first-*.json"))]


def written(text: str, new: str) -> str:
    """A README with these lines between its two marks. ValueError where it has not both."""
    return replaced(text, BEGIN, END, new)


def read(file: Path) -> dict[str, Any]:
    """A first.json, or the same from first.jsonl, which a run that was cut off leaves too."""
    text = file.read_text(encoding="utf-8")
    return report([json.loads(line) for line in text.splitlines()], {}) if file.suffix == ".jsonl" else json.loads(text)


def take(files: Iterable[Path], folder: Path) -> None:
    """Copy each file as first-CARD.json, over an earlier one of that card. SystemExit for one that is not
    there or was not taken on a GPU."""
    for file in files:
        if not file.is_file():
            raise SystemExit(f"error: {file}: not there; python -m benchmarks.first {file.parent} writes it")
        value = read(file)
        card = value["environment"].get("gpu")
        if card is None:
            raise SystemExit(f"error: {file}: was taken on a CPU")
        name = re.sub(r"[^a-z0-9]+", "-", card.lower().removeprefix("nvidia")).strip("-")
        (folder / f"first-{name}.json").write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        click.echo(folder / f"first-{name}.json")


@click.command()
@click.argument("files", nargs=-1, type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--results", type=click.Path(path_type=Path), default=RESULTS / "gpu", help="[default: benchmarks/results/gpu]"
)
@click.option("--readme", type=click.Path(path_type=Path), default=README, help="[default: README.md]")
def main(files: Sequence[Path], results: Path, readme: Path) -> None:
    """Take the FILES (first.json, or first.jsonl of a run that was cut off) into the results, and write the README's lines
    from all of them."""
    take(files, results)
    readme.write_text(written(readme.read_text(encoding="utf-8"), lines(held(results))), encoding="utf-8")
    click.echo(readme)


if __name__ == "__main__":
    main()
