"""The plot of a stage's losses, beside its checkpoints."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path

from fastgen.files.jsonfiles import write_bytes
from fastgen.training.logs import TrainingLog

FILE = "loss.png"


def plot_losses(log: TrainingLog, stage: str, folder: Path) -> None:
    """Training and validation loss over the steps, into `folder`/loss.png; nothing where matplotlib is not installed."""
    rows = log.rows(stage)
    if importlib.util.find_spec("matplotlib") is None or len(rows) < 2:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=100)
    axes = figure.subplots()
    for key, name, style in (("loss", "training", "-"), ("validation_loss", "validation, averaged weights", "o-")):
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name, markersize=3, linewidth=1)
    axes.set(xlabel="optimiser step", ylabel="loss", title=stage)
    if all(row["loss"] > 0 for row in rows):
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_bytes(folder / FILE, buffer.getvalue())
