"""Score over network evaluations per image: `python -m benchmarks.frontier_plot frontier-A.json frontier-B.json --out PNG`.

A panel per result of `benchmarks.frontier`. Large markers with error bars are the fine pass (mean and standard error over the
seeds), small ones the coarse pass; the band is the reference sampling, the ring the point that is named.
"""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.frontier_search import COARSE, FINE
from benchmarks.report import RESULTS
from fastgen.errors import FastgenError, InputError
from fastgen.files.installing import hint
from fastgen.files.jsonfiles import read_json, write_bytes

Record = dict[str, Any]
SIZE, DPI = (10.0, 5.6), 100  # 1000 px wide
SETTING = ("solver", "steps", "guidance")
MARKERS = "osD^vP*X<>"
BAND, RING = "#dddddd", "#e6a700"
FILE = click.Path(path_type=Path)


def setting(row: Record) -> Record:
    return {key: row[key] for key in SETTING}


def best_rows(value: Record) -> dict[str, list[Record]]:
    """Solver -> its points by evaluations, at the guidance scale at which their mean score is best (the one that was named for
    the solver that was named); of a point that both passes measured, the fine one."""
    reference, named = value["reference"], value["chosen"] or {}
    held: dict[tuple[Any, ...], Record] = {}
    for stage in (COARSE, FINE):
        held |= {tuple(setting(r).values()): r for r in value["rows"] if r["pass"] == stage and r["score"] is not None}
    rows = [row for row in held.values() if reference is None or setting(row) != reference]
    lines: dict[str, dict[float, list[Record]]] = {}
    for row in sorted(rows, key=lambda r: r["evaluations_per_image"]):
        lines.setdefault(row["solver"], {}).setdefault(row["guidance"], []).append(row)
    sign = 1 if value["settings"]["better"] == "higher" else -1
    out = {}
    for solver, scales in lines.items():
        if solver == named.get("solver") and named["guidance"] in scales:
            out[solver] = scales[named["guidance"]]
        else:
            out[solver] = max(scales.values(), key=lambda part: sign * statistics.mean(r["score"] for r in part))
    return out


def draw(values: Sequence[Record], figure: Any) -> Any:
    """The panels, side by side; a solver has the same colour in all of them."""
    panels = figure.subplots(1, len(values), squeeze=False)[0]
    solvers = list(dict.fromkeys(row["solver"] for value in values for row in value["rows"]))
    styles = {solver: (f"C{i % 10}", MARKERS[i % len(MARKERS)]) for i, solver in enumerate(solvers)}
    for axes, value in zip(panels, values, strict=True):
        _draw_lines(axes, value, styles)
        _draw_reference(axes, value)
        _draw_named(axes, value)
        _name_axes(axes, value)
    return figure


def _draw_lines(axes: Any, value: Record, styles: dict[str, tuple[str, str]]) -> None:
    for solver, rows in best_rows(value).items():
        color, marker = styles[solver]
        x, y = ([row[key] for row in rows] for key in ("evaluations_per_image", "score"))
        label = f"{solver}, guidance {rows[0]['guidance']:g}"
        axes.plot(x, y, "-", marker=marker, color=color, linewidth=1, markersize=3, label=label)
        fine = [row for row in rows if row["pass"] == FINE]
        x, y = ([row[key] for row in fine] for key in ("evaluations_per_image", "score"))
        errors = [row["standard_error"] or 0.0 for row in fine]
        axes.errorbar(x, y, errors, fmt=marker, color=color, markersize=6, capsize=3, elinewidth=1, zorder=3)


def _find(value: Record, wanted: Record | None) -> Record | None:
    return next(
        (r for r in value["rows"] if r["pass"] == FINE and setting(r) == wanted and r["score"] is not None), None
    )


def _draw_reference(axes: Any, value: Record) -> None:
    row = _find(value, value["reference"])
    if row is None:
        return
    spread = 2 * (row["standard_error"] or 0.0)
    name = f"{row['solver']} {row['steps']}, guidance {row['guidance']:g}: {row['evaluations_per_image']} evaluations"
    axes.axhspan(row["score"] - spread, row["score"] + spread, color=BAND, zorder=0, label=f"{name} (mean ± 2 s.e.)")
    axes.axhline(row["score"], color="0.5", linewidth=1, zorder=1)


def _draw_named(axes: Any, value: Record) -> None:
    row = _find(value, value["chosen"])
    if row is None:
        return
    label = f"chosen: {row['solver']} {row['steps']}, guidance {row['guidance']:g}: {row['evaluations_per_image']} evaluations"
    place = [row["evaluations_per_image"]], [row["score"]]
    axes.scatter(*place, s=200, facecolors="none", edgecolors=RING, linewidths=2.5, zorder=5, label=label)


def _name_axes(axes: Any, value: Record) -> None:
    settings = value["settings"]
    ticks = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000]
    seen = [row["evaluations_per_image"] for rows in best_rows(value).values() for row in rows]
    axes.set(xscale="log", xlabel="network evaluations per image (a guided step counts 2)")
    if seen:
        axes.set_xlim(min(seen) / 1.15, max(seen) * 1.15)
        axes.set_xticks(shown := [t for t in ticks if min(seen) / 1.15 <= t <= max(seen) * 1.15], map(str, shown))
    axes.minorticks_off()
    metric = settings["metric"].replace("_", " ")
    axes.set_ylabel("attributes, mean" if metric == "attributes" else metric)
    seeds = f"{settings['images']} requests, {len(settings['seeds'])} seeds"
    partly = "" if value["complete"] else ", incomplete"
    axes.set_title(f"{settings['model']} ({seeds}, {settings['engine']} {settings['dtype']}{partly})", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)


@click.command()
@click.argument("files", nargs=-1, required=True, type=FILE)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "frontier.png", show_default=True)
def main(files: Sequence[Path], out: Path) -> None:
    """Draw the results side by side."""
    try:
        values = [read_json(file) for file in files]
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise InputError(f"plots need matplotlib: {hint('bench')}") from None
        buffer = io.BytesIO()
        draw(values, Figure(figsize=SIZE, layout="constrained")).savefig(buffer, dpi=DPI, format="png")
        write_bytes(out, buffer.getvalue())
    except FastgenError as error:
        raise SystemExit(f"error: {error}") from None
    print(out)


if __name__ == "__main__":
    main()
