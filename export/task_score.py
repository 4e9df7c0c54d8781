"""The task's own score of an engine beside that of the same engine in fp32, over the same requests and seeds."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fastgen.engines import create_engine
from fastgen.errors import FastgenError
from fastgen.files.jsonfiles import located
from fastgen.files.png import to_image
from fastgen.generate.conditions import check_requests
from fastgen.generate.pipeline import Pipeline
from fastgen.generate.requests import Request, parse_requests
from fastgen.generate.run import Run
from fastgen.generate.settings import Settings

if TYPE_CHECKING:
    from fastgen.engines.base import Engine
    from fastgen.models.bundle import Bundle
    from fastgen.models.condition import Condition
    from fastgen.scoring.scorer import Scorer

SEEDS = 5
BATCH = 16


@dataclass(frozen=True)
class Task:
    """What a certificate measures the task's score with: a request file, and an evaluator as `fastgen score` takes it."""

    requests: Path
    evaluator: str

    def read(self, condition: Condition) -> list[Request]:
        """The file's requests. InputError for those of another kind of model."""
        with located(f"--requests {self.requests}"):
            requests = parse_requests(self.requests).known(condition.names)
            check_requests(requests, condition)
            return requests

    def check(self, condition: Condition) -> None:
        """Raise what `read` and `scorer` raise, before any work is done."""
        self.read(condition)
        self.scorer()

    def scorer(self) -> Scorer:
        """What scores the images. InputError for an evaluator that is none, FastgenError without torch."""
        from fastgen.scoring import Scorer

        return Scorer(evaluator=self.evaluator)


@dataclass(frozen=True)
class ScoreRow:
    """One metric, the means over `seeds` runs. `low`, `high`: of the difference, lower precision minus fp32, its 95% interval,
    which is 1.96 standard errors to each side. `passed`: the interval does not say that the lower precision is worse."""

    metric: str
    fp32: float
    lowered: float
    low: float
    high: float
    images: int  # per seed
    seeds: int
    passed: bool

    def line(self) -> str:
        """The row for the terminal."""
        mark = "ok  " if self.passed else "MISS"
        interval = f"{self.low:+.4f} to {self.high:+.4f}"
        return (
            f"  {mark} {self.metric}: {self.lowered:.4f}, fp32 {self.fp32:.4f}; difference, 95%: {interval}, "
            f"{self.seeds} seeds of {self.images} images  (allowed: not worse by two standard errors)"
        )


def score_rows(engine: Engine, bundle: Bundle, task: Task) -> list[ScoreRow]:
    """Generate the requests with `SEEDS` seeds in both precisions, with the model's own sampling, and score them.

    Raises InputError for requests or an evaluator that do not suit the model, FastgenError without torch.
    """
    from fastgen.scoring import compare

    requests, scorer = task.read(bundle.spec.condition), task.scorer()
    engines: Mapping[str, Engine] = {
        "fp32": create_engine(engine.name, bundle, device=engine.device, dtype="fp32"),
        engine.dtype: engine,
    }
    scores = {}
    with tempfile.TemporaryDirectory(prefix="fastgen-score-") as scratch:
        for dtype, one in engines.items():
            folders = [Path(scratch) / dtype / str(seed) for seed in range(SEEDS)]
            for seed, folder in enumerate(folders):
                _write_images(Pipeline(bundle, one), requests, seed, folder)
            scores[dtype] = scorer.score(folders, task.requests)
    found = compare(scores[engine.dtype], scores["fp32"])
    return [
        ScoreRow(
            metric, d.b, d.a, d.low, d.high, len(requests), SEEDS, d.high >= 0 if d.better == "higher" else d.low <= 0
        )
        for metric, d in found.metrics.items()
    ]


def _write_images(pipeline: Pipeline, requests: Sequence[Request], seed: int, folder: Path) -> None:
    sampling = pipeline.spec.sampling
    settings = Settings(sampling.scheduler, sampling.num_inference_steps, sampling.guidance_scale, seed=seed)
    run = Run(pipeline, [_without_seed(request) for request in requests], settings)
    for batch in run.batches(BATCH):
        pictures = run.begin(batch)()
        for request, pixels, problem in zip(requests[batch.rows], pictures.pixels, pictures.problems, strict=True):
            if problem:
                raise FastgenError(f"{pipeline.engine.name} {pipeline.engine.dtype}: image {request.id}: {problem}")
            file = folder / request.image_name
            file.parent.mkdir(parents=True, exist_ok=True)
            to_image(pixels).save(file)


def _without_seed(request: Request) -> Request:
    """The request, so that the run's seed decides: a seed of its own would be the same in every run."""
    return replace(request, seed=None)
