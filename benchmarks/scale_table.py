"""What docs/scale.md says of the cost of Ray, from benchmarks/results/scale-cpu.json: `python -m benchmarks.scale_table`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.report import RESULTS, cell, replaced

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
RESULT = RESULTS / "scale-cpu.json"
BEGIN, END = "<!-- from benchmarks/results/scale-cpu.json: python -m benchmarks.scale_table -->\n\n", "\n<!-- end -->\n"
NOTHING = "Not measured yet.\n"
MOST_PERCENT = 5.0  # of a job, that Ray may cost where batches take a second or more
WHERE = {"local": "this process", "ray": "`--ray`"}
Value = Mapping[str, Any]


def lines(value: Value) -> str:
    """A result as Markdown: the machine, a table for each section that was measured, and the arithmetic."""
    parts = [_machine(value)]
    if rows := value["rows"]:
        parts.append(_markdown(map(_overhead, rows)) + _target(value))
    if rows := value["workers"]:
        parts.append(_markdown(map(_speed, rows)))
    if rows := value["start"]:
        parts.append(_markdown(map(_start, rows)))
    if "arithmetic" in value:
        parts.append(_arithmetic(value["arithmetic"]))
    return "\n".join(parts)


def _machine(value: Value) -> str:
    settings, about = value["settings"], value.get("environment")
    cpu = settings["cpu"]
    where = f" on {about['cores']} cores of {about['cpu']}, commit {about['commit']}" if about else ""
    together = f"{cpu['cores']} processes at once make {cpu['all_over_one']:.2f} x the matrix products of one alone"
    if cpu["all_over_one"] < 1.5 and cpu["cores"] == 2:
        together += ": the two cores work like two threads of one core"
    return f"`{settings['bundle']}`, `{settings['engine']}`, Ray {settings['ray']}{where}; {together}.\n"


def _overhead(row: Value) -> dict[str, str]:
    return {
        "seconds of a batch": _cell(row["batch_s"]),
        "images x steps": f"{row['batch_size']} x {row['steps']}",
        "batches": str(row["batches"]),
        "this process, s": _cell(row["local_s"]),
        "`--ray`, s": _cell(row["ray_s"]),
        "overhead of a batch": f"{row['overhead_ms_per_batch']:.0f} ms",
        "of the job": f"{row['overhead_percent']:.1f}% ({row['spread_percent']})",
        "files that differ": f"{row['different_files']} of {row['files']}",
    }


def _target(value: Value) -> str:
    """What the overhead is meant to be, and what is not in it."""
    held = [row["holds"] for row in value["rows"] if row["holds"] is not None]
    verdict = f" ({'held' if all(held) else '**missed**'})" if held else ""
    text = f"\nMeant to be: at most {MOST_PERCENT:g}% where batches take a second or more{verdict}."
    if value["idle_cores"] is not None:
        text += f" Not in it: the idle cluster takes {100 * value['idle_cores']:.1f}% of a core beside both sides."
    return f"{text}\n"


def _speed(row: Value) -> dict[str, str]:
    count = row["workers"]
    return {
        "engine": f"`{row['engine']}`",
        "where": WHERE[row["where"]] + (f", {count} worker{'s' if count > 1 else ''}" if count else ""),
        "threads of each": str(row["threads"]),
        "images/s": f"{_cell(row['images_per_s'])} ({row['spread']})",
        "files that differ": str(row["different_files"]),
    }


def _start(row: Value) -> dict[str, str]:
    return {
        "command": WHERE[row["where"]],
        "first image, s": f"{_cell(row['first_image_s'])} ({row['spread_s']})",
        "whole command, s": _cell(row["command_s"]),
    }


def _arithmetic(value: Value) -> str:
    """The estimate, with what it is made of."""
    rates = value["rates"]
    head = (
        f"**Estimated, not measured**: {value['images']:,} pictures of 64 px on {value['gpus']} x {value['gpu']}, from the "
        f"operations of the networks\nand the data sheet ({rates['flop_per_s'] / 1e12:.0f} TFLOP/s in {value['dtype']}, "
        f"{rates['bytes_per_s'] / 1e12:.1f} TB/s, batches of {value['batch']}). "
        "Nothing reaches\nthe floor; a tenth of it is a guess."
    )
    price = value["price_per_gpu_hour"]
    head += "\n" if price is None else f" The cost is that of the GPUs, at {price:g} an hour for each.\n"
    table = _markdown(
        {
            "model": f"`{row['model']}`",
            "evaluations": str(row["evaluations"]),
            "speed": "the floor" if row["share_of_floor"] == 1 else f"{100 * row['share_of_floor']:g}% of it",
            "an image on a GPU": f"{row['us_per_image']:.3g} us",
            "the job": _duration(row["hours"]),
            **({"cost": _cell(row["cost"])} if row["cost"] is not None else {}),
        }
        for row in value["rows"]
    )
    if value["driver_hours"] is None:
        return f"{head}\n{table}"
    driver = (
        f"The one process that writes the files takes {value['driver_cpu_ms_per_image']:.2g} ms of CPU for each picture "
        f"(measured\nhere): {_duration(value['driver_hours'])} for all on one core.\n"
    )
    return f"{head}\n{table}\n{driver}"


def _duration(hours: float) -> str:
    return f"{hours:.2g} h" if hours >= 1 else f"{60 * hours:.2g} min" if 60 * hours >= 1 else f"{3600 * hours:.2g} s"


def _cell(value: float) -> str:
    return cell(float(value))


def _markdown(rows: Iterable[Mapping[str, str]]) -> str:
    """A table; its columns are the keys of the first row."""
    found: Sequence[Mapping[str, str]] = list(rows)
    cells = [list(found[0]), ["---"] * len(found[0]), *(list(row.values()) for row in found)]
    return "".join("| " + " | ".join(line) + " |\n" for line in cells)


def page_lines(file: Path) -> str:
    """The page's lines: of a result, or that there is none."""
    return lines(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else NOTHING


def written(text: str, new: str) -> str:
    """A page with these lines between its two marks. ValueError where it has not both."""
    return replaced(text, BEGIN, END, new)


@click.command()
@click.option(
    "--result", type=click.Path(path_type=Path), default=RESULT, help="[default: benchmarks/results/scale-cpu.json]"
)
@click.option("--page", type=click.Path(path_type=Path), default=PAGE, help="[default: docs/scale.md]")
def main(result: Path, page: Path) -> None:
    """Write the page's lines anew."""
    page.write_text(written(page.read_text(encoding="utf-8"), page_lines(result)), encoding="utf-8")
    click.echo(page)


if __name__ == "__main__":
    main()
