"""The pictures of a sweep: scores over evaluations, and the same requests at every point."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from fastgen.errors import Say
from fastgen.files.installing import hint
from fastgen.files.jsonfiles import write_bytes
from fastgen.files.names import safe_path
from fastgen.files.outputs import software
from fastgen.files.png import TINT, read_pixels, save_image, sheet
from fastgen.generate.requests import Request
from fastgen.scoring.result import number
from fastgen.sweep.grid import Point
from fastgen.sweep.report import PLOT, SHEET, ScoredPoint, Sweep, count_text

SHOWN, MOST_ROWS = 8, 64
CELL = 96  # px, at least
SIZE, DPI = (9.0, 5.2), 130
MARKERS = "osD^vP*X<>"
EDGE = "#e6a700"


def save_pictures(sweep: Sweep, requests: Sequence[Request], say: Say) -> None:
    """Write contact_sheet.png and, where matplotlib is installed, plot.png; else `say` gets a line about it."""
    save_image(sweep.folder / SHEET, contact_sheet(sweep, requests), software("sweep"))
    if sweep.choice is None:
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say(f"no {PLOT}: it needs matplotlib, {hint('bench')}")
        return
    buffer = io.BytesIO()
    draw_plot(sweep, Figure(figsize=SIZE, layout="constrained")).savefig(
        buffer, dpi=DPI, format="png", metadata={"Software": software("sweep")}
    )
    write_bytes(sweep.folder / PLOT, buffer.getvalue())


def contact_sheet(sweep: Sweep, requests: Sequence[Request]) -> Image.Image:
    """A row per point, of its first seed: the first eight requests, below a line with settings and score; the chosen row is
    tinted. Of more than 64 points the best 64."""
    rows, columns = _best_rows(sweep), requests[:SHOWN]
    cells = [[_picture(safe_path(row.folders[0], request.image_name)) for request in columns] for row in rows]
    cell = max(CELL, min(192, next((image.width for row in cells for image in row if image is not None), CELL)))
    heads = [request.prompt or ", ".join(request.labels or ()) for request in columns]
    titles = [_caption(row, sweep) for row in rows]
    tinted = next((i for i, row in enumerate(rows) if row is sweep.chosen), None)
    return sheet(cells, cell=cell, heads=heads, titles=titles, tinted=tinted)


def _picture(file: Path) -> Image.Image | None:
    return Image.fromarray(read_pixels(file)) if file.is_file() else None


def _best_rows(sweep: Sweep) -> list[ScoredPoint]:
    if len(sweep.rows) <= MOST_ROWS:
        return sweep.rows
    sign = -1 if sweep.better == "higher" else 1
    values = [sign * row.candidate(sweep.metric).value for row in sweep.rows]
    order = sorted(range(len(values)), key=lambda i: (math.isnan(values[i]), values[i]))
    positions = {*order[: MOST_ROWS - 1], *([sweep.choice.chosen] if sweep.choice else [])}
    return [sweep.rows[i] for i in sorted(positions)]


def _caption(row: ScoredPoint, sweep: Sweep) -> str:
    score = row.error or f"{sweep.metric} {row.score(sweep.metric)}"
    return f"{row.point}   {score}   {row.cost} evaluations{'   (chosen)' if row is sweep.chosen else ''}"


def draw_plot(sweep: Sweep, figure: Any) -> Any:
    """Scores with their standard errors over network evaluations per image, a line per solver and guidance; over the guidance
    scale where only that varies. The band holds the values that are good enough; the ring marks the chosen point."""
    axes = figure.subplots()
    over_guidance = (
        len({(r.point.num_inference_steps, r.point.noise_steps, r.point.cache_interval) for r in sweep.rows}) == 1
    )
    lines: dict[str, list[ScoredPoint]] = {}
    for row in sweep.rows:
        if row.figures:
            lines.setdefault(_line(row.point, over_guidance), []).append(row)
    colors = {name: f"C{i % 10}" for i, name in enumerate(dict.fromkeys(_solver(r.point) for r in sweep.rows))}
    scales = list(dict.fromkeys(row.point.guidance_scale for row in sweep.rows))

    def variant(point: Point) -> tuple[float, int]:
        """What tells lines of one colour apart."""
        return 0.0 if over_guidance else point.guidance_scale, point.cache_interval

    variants = list(dict.fromkeys(variant(row.point) for row in sweep.rows))

    def x(row: ScoredPoint) -> float:
        """The row's place on the x axis; each line is shifted a little, so that error bars do not overlap."""
        shift = list(lines).index(_line(row.point, over_guidance)) - (len(lines) - 1) / 2
        if over_guidance:
            return row.point.guidance_scale + 0.01 * shift * max(scales)
        return row.evaluations * 1.015**shift

    for name, rows in lines.items():
        rows.sort(key=x)
        figures = [row.figures[sweep.metric] for row in rows]
        errors = [0.0 if math.isnan(f.standard_error) else f.standard_error for f in figures]
        place = variants.index(variant(rows[0].point))
        style: dict[str, Any] = {"color": colors[_solver(rows[0].point)], "marker": MARKERS[place % len(MARKERS)]}
        style |= {"linestyle": ("-", "--", ":", "-.")[place % 4], "label": name, "capsize": 3, "markersize": 5}
        axes.errorbar([x(row) for row in rows], [f.value for f in figures], errors, elinewidth=0.8, **style)
    _mark(sweep, axes, x)
    _name_axes(sweep, axes, over_guidance)
    figure.legend(fontsize=7, loc="outside right upper")
    return figure


def _name_axes(sweep: Sweep, axes: Any, over_guidance: bool) -> None:
    label = sweep.label if len(sweep.label) < 40 else sweep.metric
    axes.set_ylabel(f"{label} ({sweep.better} is better)")
    axes.set_title(f"{Path(sweep.model).name}: {sweep.rule}", fontsize=9)
    axes.grid(alpha=0.3)
    if over_guidance:
        axes.set_xlabel("guidance scale")
    else:
        _log_axis(axes, sorted({row.evaluations for row in sweep.rows}))


def _mark(sweep: Sweep, axes: Any, x: Callable[[ScoredPoint], float]) -> None:
    choice, chosen = sweep.choice, sweep.chosen
    if choice is None or chosen is None:
        return
    base, value = sweep.rows[choice.against].figures[sweep.metric].value, chosen.figures[sweep.metric].value
    if sweep.rule.kind == "fewest":
        axes.axhspan(*sorted((base, choice.limit)), color=TINT, zorder=0, label=f"good enough: {number(choice.limit)}")
    style = {"facecolors": "none", "edgecolors": EDGE, "linewidths": 2.5, "zorder": 5}
    axes.scatter([x(chosen)], [value], s=220, label=f"chosen: {chosen.point}", **style)


def _log_axis(axes: Any, evaluations: list[float]) -> None:
    """Ticks at the evaluations themselves, as many as can be read."""
    axes.set(xscale="log", xlabel="network evaluations per image")
    ticks = [evaluations[-1]]
    for value in reversed(evaluations[:-1]):
        if ticks[-1] / value > (evaluations[-1] / evaluations[0]) ** (1 / 14):
            ticks.append(value)
    axes.set_xticks(ticks, map(count_text, ticks))
    axes.minorticks_off()


def _solver(point: Point) -> str:
    """The points that share a colour in the plot: solver, number of steps and weights."""
    steps = f", of {point.num_inference_steps} steps" if point.noise_steps is not None else ""
    return f"{point.scheduler}{steps}{f', {point.weights}' if point.weights else ''}"


def _line(point: Point, over_guidance: bool) -> str:
    name = _solver(point) if over_guidance else f"{_solver(point)}, guidance {point.guidance_scale:g}"
    return name if point.cache_interval == 1 else f"{name}, cache interval {point.cache_interval}"
