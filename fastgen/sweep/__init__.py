"""A sweep: generates the same requests at every point of a grid of settings, scores them, and picks one point by a rule.

Every point is an ordinary job in OUT/points/NAME/seed-K with its score beside it, so a sweep continues after a kill, and a
changed grid keeps the points that it shares with the old one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from msgspec import field

from fastgen.data.attributes import FILE as ATTRIBUTES
from fastgen.errors import InputError, Say
from fastgen.files.folders import make_folder
from fastgen.files.hashes import sha256_file
from fastgen.files.jsonfiles import write_bytes, write_json, write_new_json
from fastgen.files.names import JOB, MANIFEST
from fastgen.files.outputs import check_output, write_report
from fastgen.files.records import Name, Record, Sha256, read_record, to_record
from fastgen.files.store import Folder
from fastgen.files.temporary import remove_leftovers
from fastgen.generate.job import run_work
from fastgen.generate.job_record import recorded_runs
from fastgen.generate.pipeline import Pipeline
from fastgen.generate.requests import Request
from fastgen.scoring.options import PathLike
from fastgen.scoring.result import Figure, FigureRecord
from fastgen.sweep.choice import Rule
from fastgen.sweep.grid import Grid, Point, Points
from fastgen.sweep.models import Loader, LocalLoader, SweptModel
from fastgen.sweep.overview import save_pictures
from fastgen.sweep.plan import POINTS, Plan, network_evaluations, prepare
from fastgen.sweep.report import CSV, JSON, PLOT, SHEET, ScoredPoint, Sweep

if TYPE_CHECKING:
    from fastgen.scoring import Scorer

__all__ = ["Grid", "Point", "Points", "Rule", "ScoredPoint", "Sweep", "network_evaluations", "sweep"]

REQUESTS, OBJECTS, SCORE = "requests.json", "objects.json", "score.json"


class SweepRecord(Record, frozen=True, forbid_unknown_fields=False):
    """sweep.json: what says whose sweep it is."""

    requests_sha256: Sha256


class PointScore(Record, frozen=True, forbid_unknown_fields=False):
    """score.json of a point: its figures, and what they were computed from."""

    metrics: dict[Name, FigureRecord]
    warnings: list[str]
    scorer: dict[str, Any] = field(default_factory=dict)
    manifests: dict[str, Sha256] = field(default_factory=dict)
    asked: Sha256 | None = None

    @property
    def sources(self) -> dict[str, Any]:
        asked = {} if self.asked is None else {"asked": self.asked}
        return {"scorer": self.scorer, "manifests": self.manifests, **asked}


def sweep(
    model: PathLike,
    requests: PathLike,
    out: PathLike,
    grid: Grid | Points,
    *,
    scorer: Scorer,
    metric: str | None = None,
    rule: Rule | None = None,
    seeds: Sequence[int] = (0,),
    limit: int | None = None,
    rag: PathLike | None = None,
    engine: str | None = None,
    batch_size: int | None = None,
    minutes: float | None = None,
    progress: bool = True,
    say: Say = lambda line: None,
    check: Callable[[Pipeline], None] = lambda pipeline: None,
    loader: Loader | None = None,
    **options: Any,
) -> Sweep:
    """Generate the requests (the first `limit`) at every point of `grid`, once per seed, and score them.

    Writes OUT/points/, sweep.json, sweep.csv, contact_sheet.png, plot.png where matplotlib is installed, and requests.json, the
    requests of this sweep. Existing images are not generated again, and points that the same scorer scored are not scored
    again. A checkpoint's networks are loaded once. `metric`: the metric of `rule`, by default the first that is measured;
    `rag`: an index, see `fastgen.retrieval.index`; `options`: further arguments of `fastgen.load`. After `minutes` no seed of
    any point begins: points that lack some are `unfinished`, and the same call continues. `check(pipeline)` is called before
    a pipeline generates, and may raise. `loader`: loads `model` elsewhere than in this process, such as a `PoolLoader`; then
    `engine`, `options` and `check` are its own. `say` gets a line of progress per point.

    Raises RefusedError (an InputError), before the first image, with every problem of the arguments, and InputError for an
    `out` that holds something else. A point with failed images has an `error` and no score.
    """
    until = None if minutes is None else time.monotonic() + 60 * minutes
    index = None if rag is None else Path(rag)
    used = loader or LocalLoader(Path(model), engine, options, check)
    settings: dict[str, Any] = {"metric": metric, "seeds": tuple(seeds), "limit": limit, "batch_size": batch_size}
    rule = rule or Rule()
    plan, loaded = prepare(used, Path(requests), Path(out), grid, scorer, rule=rule, rag=index, **settings)
    _claim(plan, Path(requests))
    result = Sweep(plan.out, str(model), plan.metric, plan.metrics, rule, [])
    for point, row, seconds in _rows(plan, loaded, scorer, progress, say, until):
        if row is None:
            result.unfinished.append(point)
            continue
        result.rows.append(row)
        timing = "already there" if seconds is None else f"{seconds:.1f} s"
        say(f"[{len(result.rows)}/{len(plan.points)}] {row.line(plan.metric)}, {timing}")
    write_bytes(plan.out / CSV, result.csv().encode())
    save_pictures(result, plan.requests, say)
    write_json(plan.out / JSON, result.to_json() | {"requests_sha256": _hash(plan.requests)})
    return result


def _claim(plan: Plan, requests: Path) -> None:
    """Make `out` this sweep's folder. InputError when it holds a sweep over other requests, or files of something else."""
    record, sha256 = plan.out / JSON, _hash(plan.requests)
    for point in plan.points:
        if (file := plan.out / POINTS / point.name / SCORE).is_file():
            read_record(file, PointScore)
    if record.is_file():
        if read_record(record, SweepRecord).requests_sha256 != sha256:
            raise InputError(f"{plan.out}: holds a sweep over other requests; choose another --out")
    else:
        names = (REQUESTS, OBJECTS, ATTRIBUTES, CSV, PLOT, SHEET, POINTS, JOB)
        leftovers = [name for name in names if os.path.lexists(plan.out / name)]
        if leftovers or (os.path.lexists(plan.out) and not plan.out.is_dir()):
            problem = f"holds {leftovers[0]} already, but no {JSON}" if leftovers else "is not a folder"
            raise InputError(f"{plan.out}: {problem}; choose another --out")
        make_folder(plan.out)
        if not write_new_json(record, {"requests_sha256": sha256, "rows": []}):
            raise InputError(f"{plan.out}: another process has just begun there; choose another --out")
    for sheet in (SHEET, PLOT):
        check_output(plan.out / sheet, "sweep")
    remove_leftovers(plan.out, (JSON, REQUESTS, OBJECTS, ATTRIBUTES, CSV, PLOT, SHEET))
    write_json(plan.out / REQUESTS, requests_json(plan.requests))
    for name in (OBJECTS, ATTRIBUTES):  # which a scorer looks for beside the requests
        if (beside := requests.parent / name).is_file():
            write_bytes(plan.out / name, beside.read_bytes())


def requests_json(requests: Sequence[Request]) -> dict[str, Any]:
    """JSON from which `read_requests` reads the same requests."""
    fields = {"prompt": "text_prompt", "labels": "labels", "seed": "seed", "description": "given_description"}
    return {
        r.id: {"image_name": r.image_name} | {key: v for f, key in fields.items() if (v := getattr(r, f)) is not None}
        for r in requests
    }


def _hash(requests: Sequence[Request]) -> str:
    return hashlib.sha256(json.dumps(requests_json(requests)).encode()).hexdigest()


def _rows(
    plan: Plan, model: SweptModel, scorer: Scorer, progress: bool, say: Say, until: float | None
) -> Iterator[tuple[Point, ScoredPoint | None, float | None]]:
    """Each point, its row (None: unfinished), and the seconds it took (None: nothing was generated or scored)."""
    identity, checkpoint = scorer.identity, plan.points[0].checkpoint
    try:
        for name, group in itertools.groupby(plan.points, lambda point: point.checkpoint):
            points = list(group)
            if name != checkpoint:
                model.close()
                model, checkpoint = plan.loader.load(name, plan.index), name
                plan.check_folders(model, checkpoint)
            for point, made in zip(points, _made(plan, model, points, progress, say, until), strict=True):
                if not made.complete:
                    yield point, None, None
                    continue
                start = time.perf_counter()
                figures, warnings, is_new = ({}, [], False) if made.errors else _score(plan, point, scorer, identity)
                seconds = made.seconds + time.perf_counter() - start
                row = _row(plan, point, figures, warnings, made.errors)
                yield point, row, seconds if made.generated or is_new else None
    finally:
        model.close()


class _Made(NamedTuple):
    """A point's images. `errors`: image -> why it failed; `generated`: the number of new images; `complete`: whether every seed
    began in time."""

    errors: dict[str, str]
    generated: int
    complete: bool
    seconds: float


def _made(
    plan: Plan, model: SweptModel, points: Sequence[Point], progress: bool, say: Say, until: float | None
) -> Iterator[_Made]:
    """What was made of each point, in order. On a cluster some are made at the same time, also while others are scored."""
    if model.together == 1:
        for point in points:
            yield _generate(plan, model, point, progress, say, until)
        return
    with ThreadPoolExecutor(model.together) as pool:
        futures = [pool.submit(_generate, plan, model, point, False, say, until) for point in points]
        try:
            for future in futures:
                yield future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            model.close()  # which ends the points that have begun
            raise


def _generate(plan: Plan, model: SweptModel, point: Point, progress: bool, say: Say, until: float | None) -> _Made:
    """Generate the images of all seeds that begin before `until`."""
    start = time.perf_counter()
    errors: dict[str, str] = {}
    generated = 0
    for folder, seed in zip(plan.folders(point), plan.seeds, strict=True):
        if until is not None and time.monotonic() >= until and not (folder / MANIFEST).is_file():
            return _Made(errors, generated, False, time.perf_counter() - start)
        work = model.work(plan.recipe(point, seed))
        report = run_work(work, folder, batch_size=plan.batch_size, progress=progress, say=say)
        errors |= {f"{folder.name}/{name}": why for name, why in report.errors.items()}
        generated += report.generated
    return _Made(errors, generated, True, time.perf_counter() - start)


def _score(
    plan: Plan, point: Point, scorer: Scorer, identity: Mapping[str, Any]
) -> tuple[dict[str, Figure], list[str], bool]:
    """(figures, warnings, whether they are new). A score that this scorer gave these images before is read from its file."""
    folders, file = plan.folders(point), plan.out / POINTS / point.name / SCORE
    manifests = {folder.name: sha256_file(folder / MANIFEST) for folder in folders}
    sources: dict[str, Any] = {"scorer": dict(identity), "manifests": manifests}
    if "attributes" in identity and (attributes := plan.out / ATTRIBUTES).is_file():
        sources["asked"] = sha256_file(attributes)
    score = read_record(file, PointScore) if file.is_file() else None
    is_new = score is None or score.sources != sources
    if score is None or is_new:
        value = {**scorer.score(folders, plan.out / REQUESTS).to_json(), **sources}
        write_report(file, "sweep", value)
        score = to_record(value, PointScore, file)
    return {key: record.figure() for key, record in score.metrics.items()}, score.warnings, is_new


def _row(
    plan: Plan, point: Point, figures: Mapping[str, Figure], warnings: Sequence[str], errors: Mapping[str, str]
) -> ScoredPoint:
    folders = plan.folders(point)
    runs = [run for folder in folders for run in recorded_runs(Folder(folder))]
    images = sum(run.images for run in runs)
    seconds = sum(run.seconds for run in runs) / images if images else None
    error = None
    if errors:
        image, reason = next(iter(errors.items()))
        error = f"{len(errors)} images failed, such as {image}: {reason}"
    return ScoredPoint(point, tuple(folders), plan.evaluations[point], seconds, figures, tuple(warnings), error)
