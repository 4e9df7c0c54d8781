"""Caching of deep features against fewer steps, in time and in the task's score: `python -m benchmarks.feature_cache`.

All points, `STEPS:K` with K of `--cache-interval`, take their turns within each seed, so that a machine's load meets all alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from benchmarks.report import report
from fastgen.generate.job import run_job
from fastgen.generate.pipeline import Pipeline, load
from fastgen.generate.recipe import Recipe
from fastgen.generate.requests import Request, read_requests
from fastgen.models.find import find_folder
from fastgen.scoring import Scorer


@dataclass
class Point:
    """A number of steps with an interval of the cache, and its times per image, one of each seed."""

    steps: int
    interval: int
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @classmethod
    def parse(cls, text: str) -> Point:
        steps, _, interval = text.partition(":")
        return cls(int(steps), int(interval or 1))

    def folder(self, out: Path, seed: int) -> Path:
        return out / f"{self.steps}-{self.interval}" / f"seed-{seed}"

    def generate(
        self, pipeline: Pipeline, requests: Sequence[Request], scheduler: str | None, out: Path, seed: int
    ) -> None:
        """The images of one seed. The first batch of a point compiles its networks, before the clock runs."""
        sampling = {
            "num_inference_steps": self.steps,
            "cache_interval": self.interval,
            "scheduler": scheduler,
            "seed": seed,
        }
        run = Recipe(requests, sampling).run(pipeline, None)
        if not self.wall:
            run.begin(run.batches(16)[0])()
        wall, cpu = time.perf_counter(), time.process_time()
        run_job(run, self.folder(out, seed), batch_size=16, progress=False)
        self.wall.append((time.perf_counter() - wall) / len(requests))
        self.cpu.append((time.process_time() - cpu) / len(requests))


def row(point: Point, first: Point, metrics: Any) -> dict[str, Any]:
    """A point's times, as ratios to the first point of the same round, and its scores."""
    ratios = [
        statistics.median(a / b for a, b in zip(x, y, strict=True))
        for x, y in ((first.wall, point.wall), (first.cpu, point.cpu))
    ]
    found = {"steps": point.steps, "interval": point.interval, "images_per_s": 1 / statistics.median(point.wall)}
    found |= {"ratio": ratios[0], "cpu_ratio": ratios[1]}
    for name, figure in metrics.items():
        found |= {name: figure.value, f"{name}_se": figure.standard_error}
    return found


@click.command()
@click.argument("requests_file", type=click.Path(path_type=Path))
@click.option(
    "--model", type=click.Path(path_type=Path), required=True, help="A bundle with the graphs of --feature-cache."
)
@click.option("--evaluator", help="What scores the images; without it they are not scored.")
@click.option(
    "--point", "points", multiple=True, required=True, help="STEPS:K; the first one is what others are compared with."
)
@click.option("--engine", default="openvino", show_default=True)
@click.option("--scheduler")
@click.option("--seeds", default=5, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), required=True, help="A new folder, for the images.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The result, as JSON.")
def main(
    requests_file: Path,
    model: Path,
    evaluator: str | None,
    points: Sequence[str],
    engine: str,
    scheduler: str | None,
    seeds: int,
    work: Path,
    out: Path,
) -> None:
    """Images/s and scores of each point, with standard errors over seeds."""
    pipeline = load(model, engine)
    requests = read_requests(requests_file)
    taken = [Point.parse(text) for text in points]
    for seed in range(seeds):
        for point in taken:
            point.generate(pipeline, requests, scheduler, work, seed)
    rows = []
    scorer = Scorer(evaluator=find_folder(evaluator)) if evaluator else None
    for point in taken:
        folders = [point.folder(work, seed) for seed in range(seeds)]
        metrics = scorer.score(folders, requests_file).metrics if scorer else {}
        rows.append(row(point, taken[0], metrics))
    settings = {
        "model": model.name,
        "engine": f"{engine} {pipeline.engine.dtype}",
        "images": len(requests),
        "seeds": seeds,
    }
    solver = pipeline.settings(scheduler=scheduler)
    settings |= {"scheduler": solver.scheduler, "guidance_scale": solver.guidance_scale}
    report(out, settings, rows)


if __name__ == "__main__":
    main()
