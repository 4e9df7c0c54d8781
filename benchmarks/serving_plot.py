"""Latency against load of three ways to serve: `python -m benchmarks.serving_plot RESULTS.json`. A PNG beside the JSON; needs
matplotlib."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from benchmarks.plots import DPI, empty_figure, finish
from fastgen.errors import InputError

PANELS = (("p50 of all", "p50_ms"), ("p95 of all", "p95_ms"), ("p95 of 10 steps", "p95_ms_10_steps"))


def plot(file: Path) -> Path:
    """Draw a result's latencies."""
    value = json.loads(file.read_text())
    figure, axes = empty_figure(len(PANELS))
    highest = max(row[key] for row in value["latency"] if row["server"] != "one by one" for _, key in PANELS)
    for panel, (title, key) in zip(axes, PANELS, strict=True):
        for name in dict.fromkeys(row["server"] for row in value["latency"]):
            rows = [row for row in value["latency"] if row["server"] == name]
            panel.plot([row["load"] for row in rows], [row[key] / 1000 for row in rows], "o-", label=name)
        panel.set(title=title, xlabel="load, of one-by-one capacity", ylim=(0, 1.2 * highest / 1000), xlim=(0, None))
    axes[0].set_ylabel("seconds")
    finish(figure, axes, _title(value))
    out = file.with_name(f"{file.stem}-latency.png")
    figure.savefig(out, dpi=DPI)
    return out


def _title(value: dict[str, Any]) -> str:
    settings, machine = value["settings"], value["environment"]
    where = machine.get("gpu") or f"{machine['cores']} cores of {machine['cpu'].split(' avx')[0]}"
    rate = f"one by one {settings['one_by_one_images_per_s']:.1f} images/s"
    return f"{settings['model']}, {settings['engine']} {settings['dtype']}, 10, 20 and 50 steps; {rate}; {where}"


@click.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
def main(file: Path) -> None:
    """Draw the latencies of a result of benchmarks.serving."""
    try:
        print(plot(file))
    except InputError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
