"""Every engine and what people use today, side by side: `python -m benchmarks.matrix --synthetic medium`.

Rows are sides x batch sizes x steps; the columns are explained in benchmarks/rows.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.measure import Matrix, Plan
from benchmarks.models import ARCHITECTURES, architecture, random_model
from benchmarks.report import RESULTS, save
from benchmarks.rows import UNITS
from benchmarks.sides import Side, default_sides
from benchmarks.table import markdown
from fastgen.errors import FastgenError
from fastgen.files.cachedir import cache_dir

FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)


def run(plan: Plan, sides: Sequence[str], out: Path | None) -> list[dict[str, Any]]:
    """Measure, printing each row when it is there; the JSON is complete after every row."""
    matrix = Matrix(plan, [Side.parse(side) for side in sides])
    names = list(map(str, matrix.sides))
    rows: list[dict[str, Any]] = []

    def order(row: dict[str, Any]) -> tuple[int, int, int]:
        return row["steps"], min(plan.batches) if "@" in row["side"] else row["batch"], names.index(row["side"])

    for row in matrix.rows():
        rows.append(row)
        rows.sort(key=order)
        print(line(row), flush=True)
        if out is not None:
            save(out, matrix.settings(), rows, columns=UNITS)
    return rows


def line(row: dict[str, Any]) -> str:
    """A row in brief."""
    head = f"{row['side']:24} batch {row['batch']:<4} steps {row['steps']:<5}"
    if row["images_per_s"] is None:
        return f"{head} {row['note']}"
    parts = [f"{row['images_per_s']:8.3g} images/s"]
    parts += [f"{row['ratio']:6.3g} x"] if row["ratio"] else []
    parts += [f"{row['peak_mib']:7.0f} MiB", f"{row['floor_percent']:5.1f}% of the floor"]
    parts += [f"max {row['max_abs_255']}/255"] if row["max_abs_255"] is not None else []
    return " ".join([head, *parts])


@click.command()
@click.option("--model", type=FOLDER, help="A model folder.")
@click.option(
    "--synthetic", metavar="ARCH", help=f"Random weights instead: {', '.join(ARCHITECTURES)}, a preset or TOML."
)
@click.option("--bundle", type=FOLDER, help="Its bundle.  [default: exported into the work folder]")
@click.option("--device", default=None, help="[default: cuda where there is one, else cpu]")
@click.option(
    "--side",
    "sides",
    multiple=True,
    help="Like openvino:int8 or diffusers:bf16:channels_last, see benchmarks/sides.py.  [default: all]",
)
@click.option("--batch", "batches", multiple=True, type=click.IntRange(1), default=(4,), show_default=True)
@click.option("--steps", multiple=True, type=click.IntRange(1), help="[default: the model's]")
@click.option("--images", default=1, show_default=True, type=click.IntRange(1), help="Per round, at least a batch.")
@click.option("--job", default=1063, show_default=True, type=click.IntRange(1), help="Images of the whole job.")
@click.option("--requests", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="[default: made up]")
@click.option("--threads", type=click.IntRange(1), help="[default: the engines']")
@click.option("--rounds", default=2, show_default=True, type=click.IntRange(1))
@click.option(
    "--seconds", default=1500.0, show_default=True, help="No further round, batch size or step count begins later."
)
@click.option("--work", type=click.Path(path_type=Path), help="Models and exports, kept.  [default: in the cache]")
@click.option("--out", type=click.Path(path_type=Path), help="[default: benchmarks/results/matrix-MODEL-DEVICE.json]")
def main(
    model: Path | None,
    synthetic: str | None,
    device: str | None,
    sides: Sequence[str],
    work: Path | None,
    **options: Any,
) -> None:
    """Measure, print a markdown table, write the JSON. The first side is the one that the others' speed is compared with."""
    if (model is None) == (synthetic is None):
        raise click.UsageError("give either --model FOLDER or --synthetic ARCH")
    work = work or cache_dir() / "benchmarks"
    device = device or default_device()
    out = options.pop("out")
    try:
        chosen = sides or default_sides(device)
        for side in chosen:
            Side.parse(side)
        if model is None:
            model = random_model(str(synthetic), work / architecture(str(synthetic)).name)
        plan = Plan(model, work, device, **options)
        out = out or RESULTS / f"matrix-{model.name}-{device.partition(':')[0]}.json"
        rows = run(plan, chosen, out)
    except FastgenError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"\n{markdown(rows)}\n\n{out}")


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    main()
