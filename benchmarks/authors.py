"""What all of this is worth to a user: diffusers in fp32 at the sampling that the authors of a task chose, against an engine
at solvers of its own: `python -m benchmarks.authors REQUESTS.json --model MODEL --bundle BUNDLE --evaluator E`.

All sides take turns: one turn makes all pictures of one seed. The pictures are scored: the ratio counts where the scores are
equal within their noise.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from benchmarks.report import report
from benchmarks.runners.diffusion import open_runner
from fastgen.errors import FastgenError, InputError
from fastgen.generate.job import run_job
from fastgen.generate.pipeline import Pipeline, load
from fastgen.generate.recipe import Recipe
from fastgen.generate.requests import Request, read_requests, resolve_seed
from fastgen.models.find import find_folder
from fastgen.sampling.noise import normal
from fastgen.sampling.tables import parse_key
from fastgen.scoring import Scorer

FOLDER = click.Path(path_type=Path)


@dataclass
class Side:
    """One way to make the pictures: `make` writes those of a seed into a folder. `seconds`: of each seed, per picture."""

    name: str
    sampling: str
    evaluations: int  # of the network, per picture
    make: Callable[[Path, int], None]
    seconds: list[float] = field(default_factory=list)

    def folder(self, work: Path, seed: int) -> Path:
        return (
            work / f"{self.name} {self.sampling}".replace(" ", "-").replace(":", "-").replace(",", "") / f"seed-{seed}"
        )


def by_diffusers(
    model: Path, pipeline: Pipeline, requests: Sequence[Request], solver: str, guidance: float, how: Any
) -> Side:
    """diffusers' networks and scheduler in fp32, in its pipeline or in a loop by hand, from the noise that the engine starts
    from."""
    name, steps = solver_steps(solver)
    opening = {"name": "diffusers", "dtype": "fp32", "channels_last": False, "device": "cpu", "model": model}
    runner = open_runner(opening | {"scheduler": name, "guidance_scale": guidance, "threads": how["threads"]})
    key = "prompts" if pipeline.spec.condition.kind == "text" else "labels"
    given = [request.prompt if key == "prompts" else list(request.labels or ()) for request in requests]

    def make(out: Path, seed: int) -> None:
        noise = normal([resolve_seed(request, seed) for request in requests], 0, pipeline.spec.space.shape)
        job = {key: given, "count": len(requests), "batch": how["batch"], "steps": steps}
        out.mkdir(parents=True, exist_ok=True)
        for request, image in zip(requests, runner.generate(job, np.asarray(noise)), strict=True):
            Image.fromarray(image).save(out / request.image_name)

    evaluations = len(pipeline.source.table(solver)) * (2 if guidance != 1 else 1)
    return Side("diffusers fp32", f"{solver}, guidance {guidance:g}", evaluations, make)


def by_engine(pipeline: Pipeline, requests: Sequence[Request], solver: str | None, how: Any) -> Side:
    """`fastgen generate` with this solver and the model's guidance; with None its own solver."""
    sampling: dict[str, Any] = {}
    if solver is not None:
        sampling["scheduler"], sampling["num_inference_steps"] = solver_steps(solver)
    settings = pipeline.settings(**sampling)

    def make(out: Path, seed: int) -> None:
        run = Recipe(requests, sampling | {"seed": seed}).run(pipeline, None)
        run_job(run, out, batch_size=how["batch"], progress=False)

    evaluations = len(pipeline.source.table(settings.solver)) * (2 if settings.guided else 1)
    name = f"{pipeline.engine.name} {pipeline.engine.dtype}"
    return Side(name, f"{settings.solver}, guidance {settings.guidance_scale:g}", evaluations, make)


def solver_steps(key: str) -> tuple[str, int]:
    """`NAME:STEPS` -> both. Raises InputError for another key."""
    name, steps, late = parse_key(key)
    if late is not None:
        raise InputError(f"{key}: expected NAME:STEPS")
    return name, steps


def row(side: Side, first: Side, metrics: Any) -> dict[str, Any]:
    """A side's speed, as a ratio to the first one's in the same seed's turn, and its scores with their standard errors."""
    ratio = statistics.median(a / b for a, b in zip(first.seconds, side.seconds, strict=True))
    found = {"side": side.name, "sampling": side.sampling, "evaluations_per_image": side.evaluations}
    found |= {"images_per_s": 1 / statistics.median(side.seconds), "ratio": ratio}
    for name, figure in metrics.items():
        found |= {name: figure.value, f"{name}_se": figure.standard_error}
    return found


@click.command()
@click.argument("requests_file", type=FOLDER)
@click.option("--model", required=True, help="Folder, or name of a model in the box: what diffusers runs.")
@click.option("--bundle", type=FOLDER, required=True, help="Of that model, with graphs in --dtype.")
@click.option("--evaluator", required=True, help="What scores the pictures.")
@click.option("--solver", required=True, metavar="NAME:STEPS", help="The authors': pndm-prk:70, ddpm:1000.")
@click.option("--guidance", type=click.FloatRange(min=1), required=True, help="The scale that is best for that solver.")
@click.option(
    "--own", multiple=True, metavar="NAME:STEPS", help="Of the engine, with several in turn.  [default: the model's]"
)
@click.option("--engine", default="openvino", show_default=True)
@click.option("--dtype", default="int8", show_default=True)
@click.option("--seeds", type=click.IntRange(2), default=5, show_default=True)
@click.option("--batch", default=16, show_default=True, help="Pictures at a time, of both sides.")
@click.option("--threads", default=2, show_default=True)
@click.option("--work", type=FOLDER, required=True, help="A new folder, for the pictures.")
@click.option("--out", type=FOLDER, required=True, help="The result, as JSON.")
def main(
    requests_file: Path,
    model: str,
    bundle: Path,
    evaluator: str,
    solver: str,
    guidance: float,
    own: Sequence[str],
    engine: str,
    dtype: str,
    seeds: int,
    work: Path,
    out: Path,
    **how: Any,
) -> None:
    """Pictures per second and scores of all sides."""
    try:
        if work.exists():
            raise InputError(f"{work}: exists already; pictures that are there would not be made again")
        pipeline = load(bundle, engine, dtype=dtype, threads=how["threads"])
        requests, scorer = read_requests(requests_file), Scorer(evaluator=find_folder(evaluator))
        found = find_folder(model)
        solvers: Sequence[str | None] = list(dict.fromkeys(own)) or [None]
        sides = [
            by_diffusers(found, pipeline, requests, solver, guidance, how),
            *(by_engine(pipeline, requests, key, how) for key in solvers),
        ]
        for i, side in enumerate(sides[:2]):
            side.make(work / "first" / str(i), 0)  # what is loaded or compiled at first, before the clock runs
        for seed in range(seeds):
            for side in sides:
                start = time.perf_counter()
                side.make(side.folder(work, seed), seed)
                side.seconds.append((time.perf_counter() - start) / len(requests))
                print(f"seed {seed}: {side.name}, {side.sampling}: {1 / side.seconds[-1]:.3g} pictures/s", flush=True)
        rows = []
        for side in sides:
            folders = [side.folder(work, seed) for seed in range(seeds)]
            rows.append(row(side, sides[0], scorer.score(folders, requests_file).metrics))
    except FastgenError as error:
        raise SystemExit(f"error: {error}") from None
    settings = {"model": found.name, "requests": requests_file.name, "images": len(requests), "seeds": seeds, **how}
    report(out, settings, rows)


if __name__ == "__main__":
    main()
