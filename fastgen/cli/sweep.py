"""`fastgen sweep`: one test file at every point of a grid of settings, scored, and the best under a rule."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastgen.cli.certifying import ensure_certified
from fastgen.cli.common import model_for, say
from fastgen.cli.parameters import (
    BATCH,
    DEVICE,
    DTYPE,
    ENGINE,
    FOLDER,
    IMAGES,
    MODEL,
    NEW,
    STEP,
    THREADS,
    Choice,
    Number,
    argument,
    option,
)
from fastgen.cli.ray import RayOptions, ray_options
from fastgen.cli.score import scoring_options
from fastgen.errors import FastgenError

if TYPE_CHECKING:
    from fastgen.cluster.pool import Pool

SOME = Number(0, 1e6, above=True)
SCORING = ("evaluator", "attributes", "reference", "features", "clip", "download", "allow_pickle")


@click.command()
@argument("requests_file", metavar="REQUESTS.json", type=FOLDER)
@option("--out", type=NEW, required=True, help="Folder of the sweep; the same command continues it.")
@option("--model", type=MODEL, help="Bundle, or model folder (engine eager).  [default: as for `generate`]")
@option(
    "--engine",
    type=ENGINE,
    help="eager, compile, ort, openvino, trt or trt-rtx.  [default: what is installed and fits]",
)
@option("--scheduler", metavar="ddim,dpmpp-2m", help="Solvers.  [default: the model's]")
@option("--num-inference-steps", metavar="5,10,20", help="Denoising steps.  [default: the model's]")
@option("--guidance-scale", metavar="1,2,3", help="1 turns guidance off.  [default: the model's]")
@option("--guidance-interval", type=(STEP, STEP), metavar="LO HI", help="Guide only the steps LO <= i < HI.")
@option(
    "--cache-interval",
    metavar="1,2,3",
    help="Run the whole UNet at every K-th step, its outer blocks between; on a CPU.  [default: 1, off]",
)
@option("--rag", type=FOLDER, help="Start from the nearest training image of this index (`fastgen index`).")
@option(
    "--noise-steps",
    metavar="20,30",
    help="Steps that run from there, with --rag; none: from noise.  [default: 6/7 of all]",
)
@option("--checkpoint", metavar="best,last,500", help="A run's weights.  [default: the finished model's]")
@option("--seeds", metavar="0,1,2", default="0", show_default=True, help="Every point once per seed.")
@option("--limit", type=IMAGES, help="Only the first N requests.")
@option("--batch-size", type=BATCH, help="Images per batch.  [default: 16 on a CPU, what fits on a GPU]")
@scoring_options
@option("--metric", help="What the rule looks at: label_accuracy, attributes, fid, ...  [default: the first measured]")
@option(
    "--rule",
    type=Choice("fewest", "best"),
    default="fewest",
    show_default=True,
    metavar="fewest|best",
    help="Name the best score, or the fewest evaluations of the network that are good enough.",
)
@option(
    "--within",
    default="2%",
    show_default=True,
    metavar="2%|1se",
    help="Good enough: not worse than the best by more than 2% of it, or one of its standard errors.",
)
@option(
    "--against",
    default="best",
    show_default=True,
    metavar="best|ddpm-1000steps-g2",
    help="What --within is counted from: the best point, or the one of this name.",
)
@option("--minutes", type=SOME, help="Begin nothing after so many minutes; the same command continues.")
@option("--device", type=DEVICE, help="cpu, cuda, cuda:1, ...")
@option("--dtype", type=DTYPE, help="fp32, bf16, fp16, int8 or fp8.  [default: what suits the engine and the hardware]")
@option("--threads", type=THREADS, help="CPU threads.  [default: the engine's]")
@ray_options
def sweep(
    requests_file: Path,
    out: Path,
    model: Path | None,
    engine: str | None,
    seeds: str,
    limit: int | None,
    batch_size: int | None,
    metric: str | None,
    rule: str,
    within: str,
    against: str,
    minutes: float | None,
    device: str | None,
    dtype: str | None,
    threads: int | None,
    rag: Path | None,
    ray: str | None,
    cpus_per_worker: int | None,
    allow_mixed: bool,
    **lists: Any,
) -> None:
    """Generate REQUESTS.json at every point of a grid of settings, score each, and name the best under a rule.

    Lists are separated by commas; every combination is a point: a job in OUT/points/, with its score. Writes a table
    (sweep.json, sweep.csv), plot.png and contact_sheet.png. The same command continues a sweep that was interrupted; another
    grid keeps the points that it shares.
    """
    from fastgen.generate.requests import parse_requests
    from fastgen.scoring.options import ScoringOptions, need
    from fastgen.sweep.choice import Rule, parse_within
    from fastgen.sweep.grid import Problems, integer, parse_grid, parse_list

    problems = Problems()  # of all options, before anything is loaded
    on_ray = problems.attempt(lambda: RayOptions.of(ray, cpus_per_worker, allow_mixed, {}, device))
    scoring = {name: lists.pop(name) for name in SCORING} | {"device": device}
    grid = problems.attempt(lambda: parse_grid(**lists))
    base_seeds = parse_list("--seeds", seeds, integer, "integers such as 0,1,2", problems)
    tolerance = problems.attempt(lambda: parse_within(within))
    selection = problems.attempt(lambda: Rule(rule, *(tolerance or (2.0, "%")), against))
    problems.attempt(lambda: ScoringOptions(**scoring))
    requests = problems.attempt(lambda: parse_requests(requests_file))
    kind = requests.kind if requests else None
    folder = model or (problems.attempt(lambda: model_for(kind, engine)) if kind else None)
    problems.check()
    assert grid is not None
    assert requests is not None
    assert folder is not None
    for note in requests.notes:
        say(note)
    scorer = need("fastgen.scoring.scorer").Scorer(**scoring)
    from fastgen.sweep import sweep as run

    engine_options: dict[str, Any] = {"device": device, "dtype": dtype, "threads": threads}
    options: dict[str, Any] = {"engine": engine, "rag": rag, **engine_options}
    if on_ray is not None:
        from fastgen.sweep.models import PoolLoader

        def workers(checkpoint: str | None) -> AbstractContextManager[Pool]:
            return on_ray.pool(folder, engine, {**engine_options, "checkpoint": checkpoint}, rag, None)

        options["loader"] = PoolLoader(folder, workers)
    options |= {"limit": limit, "batch_size": batch_size, "metric": metric, "minutes": minutes}
    options |= {"rule": selection, "seeds": base_seeds, "say": say, "check": ensure_certified}
    result = run(folder, requests_file, out, grid, scorer=scorer, **options)
    click.echo(result.table())
    for warning in result.warnings:
        say(f"warning: {warning}")
    click.echo(f"wrote {out}")
    if result.unfinished:
        say(f"{len(result.unfinished)} points are unfinished after {minutes:g} minutes; the same command continues")
    if result.failed:
        raise FastgenError(f"{len(result.failed)} points failed: {result.failed[0].point}: {result.failed[0].error}")
