"""The result of a sweep: its rows and the point that the rule picks, as text, JSON and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from fastgen import __version__
from fastgen.scoring.result import Better, Figure, columns, number
from fastgen.sweep.choice import BEST, Candidate, Choice, Rule, choose
from fastgen.sweep.grid import Point

JSON, CSV, PLOT, SHEET = "sweep.json", "sweep.csv", "plot.png", "contact_sheet.png"


def count_text(evaluations: float) -> str:
    """Evaluations, with a decimal where they are no whole number."""
    return f"{evaluations:.1f}".removesuffix(".0")


@dataclass(frozen=True)
class ScoredPoint:
    """One point. `evaluations`: of the network per image, see `network_evaluations`; `seconds_per_image`: of generation, None
    where no image was made."""

    point: Point
    folders: tuple[Path, ...]  # one per seed
    evaluations: float
    seconds_per_image: float | None
    figures: Mapping[str, Figure]  # empty where there is an error
    warnings: tuple[str, ...]
    error: str | None = None

    @property
    def cost(self) -> str:
        return count_text(self.evaluations)

    def score(self, metric: str) -> str:
        """`0.7100 +- 0.0200`."""
        if metric not in self.figures:
            return "no score"
        figure = self.figures[metric]
        error = "" if math.isnan(figure.standard_error) else f" +- {number(figure.standard_error)}"
        return f"{number(figure.value)}{error}"

    def line(self, metric: str) -> str:
        """The point, its score or error, and its evaluations, in one line."""
        outcome = self.error or f"{metric} {self.score(metric)}"
        return f"{self.point}: {outcome}, {self.cost} evaluations/image"

    def candidate(self, metric: str) -> Candidate:
        figure = self.figures.get(metric)
        if figure is None:
            return Candidate(math.nan, math.nan, self.evaluations)
        return Candidate(figure.value, figure.standard_error, self.evaluations)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.point.name,
            **asdict(self.point),
            "evaluations_per_image": self.evaluations,
            "seconds_per_image": self.seconds_per_image,
            "metrics": {key: figure.to_json() for key, figure in self.figures.items()},
            "error": self.error,
        }


@dataclass(frozen=True)
class Sweep:
    """The scored points in the grid's order, and the choice among them by `rule` and `metric`. `unfinished`: the points for
    which the time did not suffice."""

    folder: Path
    model: str
    metric: str
    metrics: tuple[str, ...]
    rule: Rule
    rows: list[ScoredPoint]
    unfinished: list[Point] = field(default_factory=list)

    @property
    def better(self) -> Better:
        return next((row.figures[self.metric].better for row in self.rows if row.figures), "higher")

    @property
    def label(self) -> str:
        """The metric's full name."""
        return next((row.figures[self.metric].label for row in self.rows if row.figures), self.metric)

    @cached_property
    def choice(self) -> Choice | None:
        names, against = [row.point.name for row in self.rows], None
        if self.rule.against != BEST:
            if self.rule.against not in names:  # unfinished
                return None
            against = names.index(self.rule.against)
        return choose([row.candidate(self.metric) for row in self.rows], self.rule, self.better, against)

    @property
    def chosen(self) -> ScoredPoint | None:
        """The row that the rule names; None where no point has a score."""
        return None if self.choice is None else self.rows[self.choice.chosen]

    @property
    def failed(self) -> list[ScoredPoint]:
        return [row for row in self.rows if row.error]

    @property
    def warnings(self) -> list[str]:
        """Of all points, each once."""
        texts = [w for row in self.rows for w in row.warnings]
        if self.choice and self.choice.undefined_error:
            point = "the best point" if self.rule.against == BEST else self.rule.against
            reason = "standard error is undefined, so only what is as good is within it"
            texts.append(f"{point}'s {reason}: give --within 2%")
        return list(dict.fromkeys(texts))

    def reason(self) -> str:
        """The rule applied to these rows, in words."""
        if self.choice is None:
            return "no point has a score" if self.rule.against == BEST else f"{self.rule.against} has no score"
        best, limit = self.rows[self.choice.best], number(self.choice.limit)
        text = f"rule: {self.rule}; {self.metric}, {self.better} is better"
        text += f"; best: {best.point} ({best.score(self.metric)})"
        if self.rule.kind == "best":
            return text
        if self.choice.against != self.choice.best:
            text += f"; {self.rule.against}: {self.rows[self.choice.against].score(self.metric)}"
        side = "at least" if self.better == "higher" else "at most"
        return f"{text}; good enough: {side} {limit}, {self.choice.within} of {len(self.rows)} points"

    def table(self) -> str:
        """Several lines of text: a row per point, the chosen one marked, and the rule."""
        head = ("", "point", "evaluations", "s/image", *self.metrics)
        lines = [
            (
                "*" if row is self.chosen else "",
                str(row.point),
                row.cost,
                "-" if row.seconds_per_image is None else f"{row.seconds_per_image:.3g}",
                *(row.score(metric) for metric in self.metrics),
            )
            for row in self.rows
        ]
        ending = [] if self.chosen is None else [f"* {self.chosen.point}: {self.chosen.cost} evaluations/image"]
        return "\n".join([*columns([head, *lines]), "", self.reason(), *ending])

    def to_json(self) -> dict[str, Any]:
        """A value for `json.dumps`."""
        return {
            "fastgen": __version__,
            "model": self.model,
            "metric": self.metric,
            "metric_label": self.label,
            "better": self.better,
            "rule": asdict(self.rule),
            "chosen": None if self.chosen is None else self.chosen.point.name,
            "reason": self.reason(),
            "warnings": self.warnings,
            "unfinished": [point.name for point in self.unfinished],
            "rows": [row.to_json() for row in self.rows],
        }

    def csv(self) -> str:
        """A line per point; two columns per metric."""
        text = io.StringIO()
        settings = [f.name for f in fields(Point) if f.name != "guidance_interval"]
        scores = [name for key in self.metrics for name in (key, f"{key}_standard_error")]
        head = ["name", *settings, "evaluations_per_image", "seconds_per_image", *scores, "chosen", "error"]
        writer = csv.DictWriter(text, head, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            values = row.to_json() | {"chosen": int(row is self.chosen)}
            for key, figure in values["metrics"].items():
                values |= {key: figure["value"], f"{key}_standard_error": figure["standard_error"]}
            writer.writerow(values)
        return text.getvalue()
