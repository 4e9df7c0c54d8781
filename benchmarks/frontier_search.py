"""The search for the frontier of speed and quality: a coarse pass narrows down what a fine pass measures.

Coarse, few seeds: guidance at a middle solver and number of steps, then the solvers at that guidance, then all steps of the
better half of them at the best guidance scales; the reference sampling at the guidance that is best for it. Fine, all seeds,
which the coarse pass did not use (the best of many noisy points looks better than it is): the points that may be as good as
the reference, cheapest first, and the reference itself.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastgen.errors import InputError
from fastgen.generate.pipeline import load
from fastgen.scoring import Scorer
from fastgen.sweep import Point, Points, Rule, ScoredPoint, network_evaluations, sweep
from fastgen.sweep.choice import choose

COARSE, FINE = "coarse", "fine"
MIDDLE_SOLVER = "dpmpp-2m"


class OutOfTimeError(Exception):
    """The search ends here; the same call continues it."""


@dataclass(frozen=True)
class Space:
    """What is searched; steps and guidance scales ascend."""

    solvers: tuple[str, ...]
    steps: tuple[int, ...]
    scales: tuple[float, ...]


@dataclass(frozen=True)
class Effort:
    """`scales`: how many guidance scales are crossed with solvers and steps; `finalists`: how many points are measured with all
    seeds at a time, until no cheaper one is left that may be as good as the reference; `standard_errors`: of the reference, how
    much worse that may be."""

    coarse_seeds: tuple[int, ...] = (1000,)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    scales: int = 2
    finalists: int = 16
    standard_errors: float = 2.0

    def __post_init__(self) -> None:
        if shared := sorted(set(self.coarse_seeds) & set(self.seeds)):
            raise InputError(f"seed {shared[0]} is both a coarse one and a fine one; choose others")
        if len(self.seeds) < 2:
            raise InputError("one seed has no standard error over seeds; give at least 2, better 5")


class Bench:
    """Measures points of one model, in sweeps below `work` that continue where they stopped. `skipped`: solver -> why the
    model cannot have it; `rows`: pass -> point -> what was measured, so far."""

    def __init__(
        self,
        model: Path,
        requests: Path,
        work: Path,
        scorer: Scorer,
        effort: Effort,
        *,
        minutes: float | None = None,
        say: Callable[[str], None] = print,
        **options: Any,
    ) -> None:
        self.model, self.requests, self.work, self.scorer, self.effort = model, requests, work, scorer, effort
        self.until = None if minutes is None else time.monotonic() + 60 * minutes
        self.say, self.options = say, options
        self.metric = scorer.planned(requests)[0]
        self._pipeline = load(model, **{k: v for k, v in options.items() if k != "batch_size"})
        engine = self._pipeline.engine
        self.engine = {"engine": engine.name, "dtype": engine.dtype, "device": engine.device}
        self.kind = self._pipeline.spec.condition.kind
        self.training_steps = int(self._pipeline.spec.scheduler_config.get("num_train_timesteps", 1000))
        self.rows: dict[str, dict[Point, ScoredPoint]] = {COARSE: {}, FINE: {}}
        self.skipped: dict[str, str] = {}
        self._evaluations: dict[Point, float] = {}

    def evaluations(self, point: Point) -> float | None:
        """Of the network per image; None where the model cannot have the solver, and `skipped` says why."""
        if point not in self._evaluations:
            settings = self._pipeline.settings(**point.settings())
            try:
                table = self._pipeline.source.table(settings.solver)
            except InputError as error:
                self.skipped.setdefault(settings.solver, str(error))
                return None
            self._evaluations[point] = network_evaluations(table, settings)
        return self._evaluations[point]

    def measure(self, stage: str, points: Iterable[Point]) -> list[ScoredPoint]:
        """The rows of the points that the model can have, the cheapest first. Raises OutOfTimeError where some are missing."""
        wanted = {p: n for p in dict.fromkeys(points) if (n := self.evaluations(p)) is not None}
        order = sorted(wanted, key=lambda p: wanted[p])
        held = self.rows[stage]
        if missing := tuple(p for p in order if p not in held):
            seeds = self.effort.coarse_seeds if stage == COARSE else self.effort.seeds
            minutes = None if self.until is None else max(0.0, self.until - time.monotonic()) / 60
            options: dict[str, Any] = {"seeds": seeds, "metric": self.metric, "minutes": minutes, **self.options}
            folder, rule = self.work / stage, Rule("best")
            found = sweep(
                self.model,
                self.requests,
                folder,
                Points(missing),
                scorer=self.scorer,
                rule=rule,
                progress=False,
                say=self.say,
                **options,
            )
            held |= {row.point: row for row in found.rows}
            if found.unfinished:
                raise OutOfTimeError
        return [held[p] for p in order]

    def loss(self, row: ScoredPoint) -> float:
        """The score, so that less is better; infinite where there is none."""
        figure = row.figures.get(self.metric)
        if figure is None or math.isnan(figure.value):
            return math.inf
        return -figure.value if figure.better == "higher" else figure.value

    @property
    def noise(self) -> float:
        """The median standard error of the coarse pass, whose few seeds say little about that of a single point."""
        figures = [f for row in self.rows[COARSE].values() if (f := row.figures.get(self.metric))]
        errors = [f.standard_error for f in figures if not math.isnan(f.standard_error)]
        return statistics.median(errors) if errors else 0.0


@dataclass
class Search:
    """What was found so far: the reference, the point that is named, and whether the search is complete."""

    reference: Point | None = None
    chosen: Point | None = None
    complete: bool = False
    kept: dict[str, Any] = field(default_factory=dict)  # guidance scales and solvers that the coarse pass kept


def search(bench: Bench, space: Space, reference: tuple[str, int], found: Search) -> None:
    """Fill `found`. `reference`: solver and steps of the sampling that the others are held against. Raises OutOfTimeError."""
    scales = found.kept["guidance_scales"] = best_scales(bench, space)
    solvers = found.kept["solvers"] = best_solvers(bench, space, scales[0])
    bench.measure(COARSE, (Point(s, n, g) for s in solvers for g in scales for n in space.steps))
    scale = climb(space.scales, scales[0], lambda g: bench.loss(*bench.measure(COARSE, [Point(*reference, g)])))
    found.reference = Point(*reference, scale)
    frontier, good = finalists(bench, found.reference)
    size = bench.effort.finalists
    bench.measure(FINE, [*frontier, *good[:size], found.reference])
    while rest := cheaper(bench, good, named := chosen(bench, found.reference)):
        bench.measure(FINE, rest[:size])
    found.chosen, found.complete = named, True


def cheaper(bench: Bench, points: Iterable[Point], named: Point | None) -> list[Point]:
    """Those of the `points` that the fine pass did not measure yet and that need fewer evaluations than the named one."""
    if named is None:
        return []
    coarse, fine = bench.rows[COARSE], bench.rows[FINE]
    return [p for p in points if p not in fine and coarse[p].evaluations < fine[named].evaluations]


def best_scales(bench: Bench, space: Space) -> list[float]:
    """Guidance scales at a middle solver and number of steps, the best first; guidance 1, which costs half, is kept as well
    where it is within two standard errors of the best."""
    solver = MIDDLE_SOLVER if MIDDLE_SOLVER in space.solvers else space.solvers[0]
    rows = bench.measure(COARSE, (Point(solver, space.steps[len(space.steps) // 2], g) for g in space.scales))
    if not rows:
        raise InputError(f"--solver: this model cannot have {solver}: {next(iter(bench.skipped.values()))}")
    rows.sort(key=bench.loss)
    limit = bench.loss(rows[0]) + 2 * bench.noise
    unguided = [
        row for row in rows[bench.effort.scales :] if row.point.guidance_scale == 1 and bench.loss(row) <= limit
    ]
    return [row.point.guidance_scale for row in [*rows[: bench.effort.scales], *unguided]]


def best_solvers(bench: Bench, space: Space, scale: float) -> list[str]:
    """The better half of the solvers, at least 3: by how much worse their points are, on average, than the best point that
    needs no more evaluations, at a quarter and at the middle of the numbers of steps."""
    steps = sorted({space.steps[len(space.steps) // 4], space.steps[len(space.steps) // 2]})
    rows = bench.measure(COARSE, (Point(s, n, scale) for s in space.solvers for n in steps))
    behind: dict[str, list[float]] = {}
    for row in rows:
        best = min(bench.loss(other) for other in rows if other.evaluations <= row.evaluations)
        behind.setdefault(row.point.scheduler, []).append(math.inf if math.isinf(best) else bench.loss(row) - best)
    order = sorted(behind, key=lambda solver: statistics.mean(behind[solver]))
    return order[: max(3, math.ceil(len(order) / 2))]


def climb(values: Sequence[float], start: float, loss: Callable[[float], float]) -> float:
    """The value from which neither neighbour among the ascending `values` is better: every loss is taken once."""
    held: dict[float, float] = {}

    def at(i: int) -> float:
        if values[i] not in held:
            held[values[i]] = loss(values[i])
        return held[values[i]]

    here = values.index(start)
    while True:
        best = min((j for j in (here, here - 1, here + 1) if 0 <= j < len(values)), key=at)
        if best == here:
            return values[here]
        here = best


def finalists(bench: Bench, reference: Point) -> tuple[list[Point], list[Point]]:
    """(the coarse frontier: points that beat all that need no more evaluations; those not clearly worse than the reference,
    the cheapest first)."""
    rows = [row for row in bench.rows[COARSE].values() if row.point != reference]
    rows.sort(key=lambda row: (row.evaluations, bench.loss(row)))
    frontier, least = [], math.inf
    for row in rows:
        if bench.loss(row) < least:
            least = bench.loss(row)
            frontier.append(row.point)
    limit = bench.loss(bench.rows[COARSE][reference]) + bench.effort.standard_errors * bench.noise
    return frontier, [row.point for row in rows if bench.loss(row) <= limit and not math.isinf(bench.loss(row))]


def chosen(bench: Bench, reference: Point) -> Point | None:
    """The fewest evaluations that are within so many standard errors of the reference, of the fine pass."""
    return named(bench.rows[FINE], bench.metric, reference, bench.effort.standard_errors)


def named(rows: Mapping[Point, ScoredPoint], metric: str, reference: Point, standard_errors: float) -> Point | None:
    """The point of `rows` that the rule names; None where the reference has no score."""
    points = list(rows)
    rule = Rule("fewest", standard_errors, "se", reference.name)
    figure = rows[reference].figures.get(metric)
    if figure is None:
        return None
    candidates = [rows[point].candidate(metric) for point in points]
    choice = choose(candidates, rule, figure.better, points.index(reference))
    return None if choice is None else points[choice.chosen]
