"""The plan of a sweep: checks all its settings before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from fastgen.errors import InputError, unknown
from fastgen.files.jsonfiles import located
from fastgen.generate.conditions import check_requests
from fastgen.generate.feature_cache import networks_of_rows
from fastgen.generate.recipe import Recipe
from fastgen.generate.requests import Request, parse_requests
from fastgen.generate.settings import Settings
from fastgen.models.find import find_model
from fastgen.models.signatures import UNET_SHALLOW
from fastgen.retrieval.index import Index, open_index
from fastgen.sampling.loop import guided_rows
from fastgen.sampling.tables import SolverTable
from fastgen.sweep.choice import BEST, Rule
from fastgen.sweep.grid import Grid, Point, Points, Problems
from fastgen.sweep.models import Loader, SweptModel, weights_of

if TYPE_CHECKING:
    from fastgen.models.spec import Source
    from fastgen.scoring import Scorer

POINTS = "points"


@dataclass(frozen=True)
class Plan:
    """The valid settings of a sweep. `evaluations`: point -> network evaluations per image, see `network_evaluations`."""

    loader: Loader
    out: Path
    requests: Sequence[Request]
    points: Sequence[Point]
    evaluations: Mapping[Point, float]
    metrics: tuple[str, ...]
    metric: str
    index: Index | None
    seeds: tuple[int, ...]
    batch_size: int | None

    def folders(self, point: Point) -> list[Path]:
        """The point's jobs, one per seed."""
        return [self.out / POINTS / point.name / f"seed-{seed}" for seed in self.seeds]

    def recipe(self, point: Point, seed: int) -> Recipe:
        """The run of this point, from the index's images where the point starts late."""
        return _recipe(self.requests, point, seed)

    def check_folders(self, model: SweptModel, checkpoint: str | None) -> None:
        """InputError when a folder of this checkpoint's points holds images of another model, engine or index."""
        for point in self.points:
            for folder, seed in zip(self.folders(point), self.seeds, strict=True):
                if point.checkpoint == checkpoint and folder.exists():
                    model.check_folder(self.recipe(point, seed), folder, self.batch_size)


def prepare(
    loader: Loader,
    path: Path,
    out: Path,
    grid: Grid | Points,
    scorer: Scorer,
    *,
    rule: Rule,
    metric: str | None,
    seeds: tuple[int, ...],
    limit: int | None,
    rag: Path | None,
    batch_size: int | None,
) -> tuple[Plan, SweptModel]:
    """The plan, and the model of its first point. RefusedError with every problem."""
    problems = Problems()
    weights = {name: problems.attempt(partial(weights_of, loader.folder, name)) for name in grid.checkpoints}
    problems.check()
    first = grid.checkpoints[0]
    requests = parse_requests(path).known(find_model(loader.folder, first).objects)[:limit]
    problems.attempt(lambda: _check_seeds(seeds, requests))
    metrics = problems.attempt(lambda: scorer.planned(path, limit)) or ()
    metric_name = problems.attempt(lambda: _metric(metric, metrics)) if metrics else None
    index = None if rag is None else problems.attempt(lambda: open_index(rag))
    model = loader.load(first, index)
    spec = model.source.spec
    problems.attempt(lambda: check_requests(requests, spec.condition))
    if index is not None:
        problems.attempt(lambda: index.check(spec))
    points = problems.attempt(lambda: grid.points(spec.sampling, rag=rag is not None, weights=weights)) or []
    if points:
        problems.attempt(lambda: _check_against(rule, points))
    # Where late starts or checkpoints are wrong, the solvers and the guidance interval are checked without them.
    plain = grid.plain.points(spec.sampling)
    evaluations = problems.attempt(partial(_evaluations, model.source, points or plain)) or {}
    if not problems and (cached := next((point for point in points if point.cache_interval > 1), None)):
        work = model.work(_recipe(requests, cached, seeds[0]))
        problems.attempt(lambda: work.plan(batch_size, None))  # an engine that cannot cache refuses here
    problems.check()
    assert metric_name is not None
    plan = Plan(loader, out, requests, points, evaluations, metrics, metric_name, index, seeds, batch_size)
    plan.check_folders(model, first)
    return plan, model


def _recipe(requests: Sequence[Request], point: Point, seed: int) -> Recipe:
    late = {} if point.noise_steps is None else {"noise_steps": point.noise_steps}
    return Recipe(requests, {**point.settings(), "seed": seed}, late, from_noise=point.noise_steps is None)


def network_evaluations(table: SolverTable, settings: Settings, shallow_share: float = 1.0) -> float:
    """Network evaluations of one image: one per row of the table, two per guided row; with a cache interval, those of the
    outer blocks count as `shallow_share`, see `Source.shallow_share`. InputError for a guidance interval outside the rows."""
    lo, hi = guided_rows(table, settings.guidance_scale, True, settings.guidance_interval)
    guided = [lo <= i < hi for i in range(len(table))]
    networks = networks_of_rows(guided, settings.cache_interval)
    costs = [shallow_share if network == UNET_SHALLOW else 1 for network in networks]
    return sum(cost * (2 if is_guided else 1) for cost, is_guided in zip(costs, guided, strict=True))


def _check_seeds(seeds: Sequence[int], requests: Sequence[Request]) -> None:
    problems = Problems()
    problems += ["--seeds: holds no values"] if not seeds else []
    problems += [f"--seeds: {seed} is given twice" for seed in dict.fromkeys(seeds) if seeds.count(seed) > 1]
    if len(seeds) > 1 and all(request.seed is not None for request in requests):
        reason = "every request has a seed of its own, so that all seeds give the same images"
        problems.append(f"--seeds: {reason}; give one")
    problems.check()


def _check_against(rule: Rule, points: Sequence[Point]) -> None:
    if rule.against not in (names := [BEST, *(point.name for point in points)]):
        raise unknown("--against", rule.against, names)


def _metric(name: str | None, measured: Sequence[str]) -> str:
    if name is not None and name not in measured:
        raise unknown("--metric", name, measured)
    return name or measured[0]


def _evaluations(source: Source, points: Sequence[Point]) -> dict[Point, float]:
    """Point -> network evaluations per image. RefusedError, with an item for each, for solvers that this model does not have
    and for guidance intervals outside their rows."""
    problems, out, share = Problems(), {}, 1.0
    table_of = cache(source.table)
    if any(point.cache_interval > 1 for point in points):
        share = problems.attempt(source.shallow_share) or 1.0
    for point in points:
        settings = replace(Settings.of(source.spec.sampling, **point.settings()), noise_steps=point.noise_steps)
        try:
            with located(f"--scheduler {point.scheduler}"):
                table = table_of(settings.solver)
            with located(f"--guidance-interval with {settings.solver}"):
                out[point] = network_evaluations(table, settings, share)
        except InputError as error:
            problems.append(str(error))
    Problems(dict.fromkeys(problems)).check()
    return out
