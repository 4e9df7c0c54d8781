"""Plots of results: `python -m benchmarks.plots RESULTS.json`. PNGs beside the JSON; needs matplotlib."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from fastgen.errors import InputError
from fastgen.files.installing import hint

Row = dict[str, Any]
SIZE, DPI = (11.0, 4.6), 130


def plots(file: Path) -> list[Path]:
    """The plots that a result's rows allow: growth with the batch, time against steps, share of the floor."""
    value = json.loads(file.read_text())
    rows = [row for row in value["rows"] if row["images_per_s"] is not None]
    title = _title(value)
    drawn = {
        "batch": _against_batch(rows, title),
        "steps": _against_steps(rows, title),
        "floor": _share_of_floor(rows, title),
    }
    written = []
    for name, figure in drawn.items():
        if figure is not None:
            written.append(file.with_name(f"{file.stem}-{name}.png"))
            figure.savefig(written[-1], dpi=DPI)
    return written


def empty_figure(panels: int) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(f"plots need matplotlib: {hint('bench')}") from None
    figure = Figure(figsize=SIZE, layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _title(value: dict[str, Any]) -> str:
    settings, machine = value["settings"], value["environment"]
    hardware = machine.get("gpu") or f"{machine['cores']} cores of {machine['cpu'].split(' avx')[0]}"
    return f"{settings['model']}, {settings['image_size']} px, {settings['scheduler']}; {hardware}"


def _lines(rows: Sequence[Row], x: str) -> dict[str, list[Row]]:
    """Side -> its rows in the order of `x`, for the sides that were measured at more than one value of it."""
    other = "steps" if x == "batch" else "batch"
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda r: r[x]):
        if row[other] == max(r[other] for r in rows) and "@" not in row["side"]:
            found.setdefault(row["side"], []).append(row)
    return {side: taken for side, taken in found.items() if len(taken) > 1}


def _against_batch(rows: Sequence[Row], title: str) -> Any:
    lines = _lines(rows, "batch")
    if not lines:
        return None
    figure, (speed, memory) = empty_figure(2)
    from matplotlib.ticker import LogLocator

    for side, taken in lines.items():
        batches = [row["batch"] for row in taken]
        speed.plot(batches, [1 / row["images_per_s"] for row in taken], "o-", label=side)
        memory.plot(batches, [(row["driver_mib"] or row["peak_mib"]) / 1024 for row in taken], "o-", label=side)
    speed.set(xscale="log", xlabel="batch size", ylabel="seconds per image")
    times = [1 / row["images_per_s"] for taken in lines.values() for row in taken]
    if max(times) > 20 * min(times):
        speed.set(yscale="log")
        speed.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        speed.yaxis.set_major_formatter("{x:g}")
    else:
        speed.set(ylim=(0, 1.05 * max(times)))
    memory.set(xlabel="batch size", ylabel="peak memory, GiB", ylim=(0, 1.05 * memory.get_ylim()[1]))
    speed.set_xticks(ticks := sorted({r["batch"] for t in lines.values() for r in t}), map(str, ticks))
    speed.minorticks_off()
    return finish(figure, (speed, memory), title)


def _against_steps(rows: Sequence[Row], title: str) -> Any:
    lines = _lines(rows, "steps")
    if not lines:
        return None
    figure, (axes,) = empty_figure(1)
    for side, taken in lines.items():
        seconds = [row["batch"] / row["images_per_s"] for row in taken]
        axes.plot([row["steps"] for row in taken], seconds, "o-", label=side)
    batch = next(iter(lines.values()))[0]["batch"]
    axes.set(xlabel="steps", ylabel=f"seconds for a batch of {batch}", xlim=(0, None), ylim=(0, None))
    return finish(figure, (axes,), title)


def _share_of_floor(rows: Sequence[Row], title: str) -> Any:
    """The best batch size of each side at the most steps."""
    longest = [row for row in rows if row["steps"] == max(r["steps"] for r in rows)]
    best: dict[str, Row] = {}
    for row in longest:
        if row["side"] not in best or row["images_per_s"] > best[row["side"]]["images_per_s"]:
            best[row["side"]] = row
    if not best:
        return None
    chosen = sorted(best.values(), key=lambda row: row["floor_percent"])
    figure, (axes,) = empty_figure(1)
    bars = axes.barh(
        [f"{r['side'].partition('@')[0]}, batch {r['batch']}" for r in chosen], [r["floor_percent"] for r in chosen]
    )
    axes.bar_label(bars, [f"{r['floor_percent']:.1f}%  {r['images_per_s']:.3g} images/s" for r in chosen], padding=4)
    axes.set(xlabel="least possible time / measured time, %, each in its own precision")
    axes.set_xlim(0, 1.35 * chosen[-1]["floor_percent"])
    axes.set_title(title, fontsize=10)
    return figure


def finish(figure: Any, axes: Sequence[Any], title: str) -> Any:
    for one in axes:
        one.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False))
def main(files: Sequence[Path]) -> None:
    """Draw each file's plots."""
    for file in files:
        try:
            for image in plots(file):
                print(image)
        except InputError as error:
            raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
