"""The plan of a sweep: all its settings are checked here, before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgen.errors import InputError, unknown
from fastgen.files.jsonfiles import located
from fastgen.generate.conditions import check_kind
from fastgen.generate.job import job_limits
from fastgen.generate.job_folder import check_same_job
from fastgen.generate.pipeline import Pipeline, load
from fastgen.generate.record import job_identity
from fastgen.generate.requests import Request, read_requests
from fastgen.generate.run import Run
from fastgen.generate.settings import Settings
from fastgen.generate.start import late_start
from fastgen.models.bundle import is_bundle, read_bundle
from fastgen.models.checkpoint_choice import check_bundle_of, choose_checkpoint
from fastgen.models.find import find_model
from fastgen.retrieval.index import Index, open_index
from fastgen.sampling.loop import guided_rows
from fastgen.sampling.tables import SolverTable
from fastgen.sweep.choice import BEST, Rule
from fastgen.sweep.grid import Grid, Point, Points, Problems

if TYPE_CHECKING:
    from fastgen.scoring import Scorer

POINTS = "points"


@dataclass(frozen=True)
class ModelLoader:
    """A bundle or a model folder, and the engine that runs it; `options` are the others of `fastgen.load`."""

    folder: Path
    engine: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[Pipeline], None] = lambda pipeline: None

    def load(self, checkpoint: str | None) -> Pipeline:
        """Its pipeline, checked before it generates."""
        pipeline = load(self.folder, self.engine, checkpoint=checkpoint, **self.options)
        self.check(pipeline)
        return pipeline

    def weights(self, checkpoint: str | None) -> str | None:
        """The label of a checkpoint, such as best@115, without loading it. Raises InputError when there is none."""
        if checkpoint is None:
            return None
        with located(f"--checkpoint {checkpoint}"):
            if not is_bundle(self.folder):
                return choose_checkpoint(self.folder, checkpoint).label
            label = read_bundle(self.folder).spec.checkpoint
            check_bundle_of(self.folder, label, checkpoint)
            return label


@dataclass(frozen=True)
class Plan:
    """A sweep whose settings were checked. `evaluations`: point -> network evaluations per image."""

    model: ModelLoader
    out: Path
    requests: Sequence[Request]
    points: Sequence[Point]
    evaluations: Mapping[Point, int]
    metrics: tuple[str, ...]
    metric: str
    index: Index | None
    seeds: tuple[int, ...]
    batch_size: int | None

    def folders(self, point: Point) -> list[Path]:
        """The point's jobs, one per seed."""
        return [self.out / POINTS / point.name / f"seed-{seed}" for seed in self.seeds]

    def run(self, pipeline: Pipeline, point: Point, seed: int) -> Run:
        """A run of this point, from the index's images where the point starts late."""
        settings = pipeline.settings(**point.settings(), seed=seed)
        if point.noise_steps is None:
            return Run(pipeline, self.requests, settings)
        late = {"noise_steps": point.noise_steps}
        return Run(pipeline, self.requests, *late_start(self.index, pipeline, self.requests, settings, **late))

    def check_held(self, pipeline: Pipeline, checkpoint: str | None) -> None:
        """InputError when a folder of this checkpoint's points holds images of another model, engine or index."""
        for point in self.points:
            for folder, seed in zip(self.folders(point), self.seeds, strict=True):
                if point.checkpoint == checkpoint and folder.exists():
                    run = self.run(pipeline, point, seed)
                    check_same_job(folder, job_identity(run, job_limits(run, folder, self.batch_size).batch))


def prepare(
    model: ModelLoader,
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
) -> tuple[Plan, Pipeline]:
    """The plan, and the pipeline of its first point. RefusedError with everything that is wrong."""
    problems = Problems()
    weights = {name: problems.attempt(partial(model.weights, name)) for name in grid.checkpoints}
    problems.check()
    first = grid.checkpoints[0]
    requests = read_requests(path, find_model(model.folder, first).objects)[:limit]
    problems.attempt(lambda: _check_seeds(seeds, requests))
    metrics = problems.attempt(lambda: scorer.planned(path, limit)) or ()
    metric_name = problems.attempt(lambda: _metric(metric, metrics)) if metrics else None
    index = None if rag is None else problems.attempt(lambda: open_index(rag))
    pipeline = model.load(first)
    problems.attempt(lambda: check_kind(requests, pipeline.spec.family))
    if index is not None:
        problems.attempt(lambda: index.check(pipeline.spec))
    points = problems.attempt(lambda: grid.points(pipeline.spec.sampling, rag=rag is not None, weights=weights)) or []
    plain = grid.plain.points(pipeline.spec.sampling)  # look at these at least
    if points:
        problems.attempt(lambda: _check_against(rule, points))
    evaluations = problems.attempt(partial(_evaluations, pipeline, points or plain)) or {}
    problems.check()
    assert metric_name is not None
    plan = Plan(model, out, requests, points, evaluations, metrics, metric_name, index, seeds, batch_size)
    plan.check_held(pipeline, first)
    return plan, pipeline


def network_evaluations(table: SolverTable, settings: Settings) -> int:
    """Of one image: a row of the table is one, or two where it is guided. InputError for an interval outside the rows."""
    lo, hi = guided_rows(table, settings.guidance_scale, True, settings.guidance_interval)
    return len(table) + hi - lo


def _check_seeds(seeds: Sequence[int], requests: Sequence[Request]) -> None:
    problems = Problems()
    problems += ["--seeds: holds no values"] if not seeds else []
    problems += [f"--seeds: {seed} is given twice" for seed in dict.fromkeys(seeds) if seeds.count(seed) > 1]
    if len(seeds) > 1 and all(request.seed is not None for request in requests):
        problems.append(
            "--seeds: every request has a seed of its own, so that all seeds give the same images; give one"
        )
    problems.check()


def _check_against(rule: Rule, points: Sequence[Point]) -> None:
    if rule.against not in (names := [BEST, *(point.name for point in points)]):
        raise unknown("--against", rule.against, names)


def _metric(name: str | None, measured: Sequence[str]) -> str:
    if name is not None and name not in measured:
        raise unknown("--metric", name, measured)
    return name or measured[0]


def _evaluations(pipeline: Pipeline, points: Sequence[Point]) -> dict[Point, int]:
    """Per image, of each point. RefusedError, with an item for each, for solvers that this model cannot have and guidance
    intervals outside their rows."""
    problems, out = Problems(), {}
    tables: dict[str, SolverTable | str] = {}
    for point in points:
        settings = replace(pipeline.settings(**point.settings()), noise_steps=point.noise_steps)
        if settings.solver not in tables:
            try:
                tables[settings.solver] = pipeline.source.table(settings.solver)
            except InputError as error:
                tables[settings.solver] = f"--scheduler {point.scheduler}: {error}"
        table = tables[settings.solver]
        if isinstance(table, SolverTable):
            try:
                out[point] = network_evaluations(table, settings)
            except InputError as error:
                problems.append(f"--guidance-interval with {settings.solver}: {error}")
        else:
            problems.append(table)
    Problems(dict.fromkeys(problems)).check()
    return out
