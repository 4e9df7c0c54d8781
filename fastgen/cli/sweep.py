"""`fastgen sweep`: one test file at every point of a grid of settings, scored, and the best under a rule."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from fastgen.cli.certifying import ensure_certified
from fastgen.cli.common import FOLDER, MODEL, POSITIVE, model_for, say
from fastgen.cli.score import scoring_options
from fastgen.errors import FastgenError

SOME = click.FloatRange(min=0, min_open=True)
SCORING = ("evaluator", "attributes", "reference", "features", "clip", "download", "allow_pickle")


@click.command()
@click.argument("requests_file", metavar="REQUESTS.json", type=FOLDER)
@click.option("--out", type=FOLDER, required=True, help="Folder of the sweep; the same command continues it.")
@click.option("--model", type=MODEL, help="Bundle, or model folder (engine eager).  [default: as for `generate`]")
@click.option("--engine", help="eager, compile, ort, openvino, trt or trt-rtx.  [default: what is installed and fits]")
@click.option("--scheduler", metavar="ddim,dpmpp-2m", help="Solvers.  [default: the model's]")
@click.option("--num-inference-steps", metavar="5,10,20", help="Denoising steps.  [default: the model's]")
@click.option("--guidance-scale", metavar="1,2,3", help="1 turns guidance off.  [default: the model's]")
@click.option("--guidance-interval", type=(int, int), metavar="LO HI", help="Guide only the steps LO <= i < HI.")
@click.option("--rag", type=FOLDER, help="Start from the nearest training image of this index (`fastgen index`).")
@click.option(
    "--noise-steps",
    metavar="20,30",
    help="Steps that run from there, with --rag; none: from noise.  [default: 6/7 of all]",
)
@click.option("--checkpoint", metavar="best,last,500", help="A run's weights.  [default: the finished model's]")
@click.option("--seeds", metavar="0,1,2", default="0", show_default=True, help="Every point once per seed.")
@click.option("--limit", type=POSITIVE, help="Only the first N requests.")
@click.option("--batch-size", type=POSITIVE, help="Images per batch.  [default: 16 on a CPU, what fits on a GPU]")
@scoring_options
@click.option(
    "--metric", help="What the rule looks at: label_accuracy, attributes, fid, ...  [default: the first measured]"
)
@click.option(
    "--rule",
    default="fewest",
    show_default=True,
    metavar="fewest|best",
    help="Name the best score, or the fewest evaluations of the network that are good enough.",
)
@click.option(
    "--within",
    default="2%",
    show_default=True,
    metavar="2%|1se",
    help="Good enough: not worse than the best by more than 2% of it, or one of its standard errors.",
)
@click.option(
    "--against",
    default="best",
    show_default=True,
    metavar="best|ddpm-1000steps-g2",
    help="What --within is counted from: the best point, or the one of this name.",
)
@click.option("--minutes", type=SOME, help="Begin nothing after so many minutes; the same command continues.")
@click.option("--device", help="cpu, cuda, cuda:1, ...")
@click.option("--dtype", help="fp32, bf16 or fp16.  [default: what suits the engine and the hardware]")
@click.option("--threads", type=POSITIVE, help="CPU threads.  [default: the engine's]")
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
    **given: Any,
) -> None:
    """Generate REQUESTS.json at every point of a grid of settings, score each, and name the best under a rule.

    Lists are separated by commas; every combination is a point: a job in OUT/points/, with its score. Writes a table
    (sweep.json, sweep.csv), plot.png and contact_sheet.png. The same command continues a sweep that was interrupted; another
    grid keeps the points that it shares.
    """
    from fastgen.sweep.grid import RefusedError

    try:
        found = _run(
            requests_file,
            out,
            model,
            engine,
            {"seeds": seeds, "rule": rule, "within": within, "against": against},
            {name: given.pop(name) for name in SCORING} | {"device": device},
            given,
            {"device": device, "dtype": dtype, "threads": threads, "limit": limit, "batch_size": batch_size}
            | {"metric": metric, "rag": rag, "minutes": minutes},
        )
    except RefusedError as error:
        for problem in error.problems:
            say(f"fastgen: error: {' '.join(problem.split())}")
        sys.exit(error.exit_code)
    click.echo(found.table())
    for warning in found.warnings:
        say(f"warning: {warning}")
    click.echo(f"wrote {out}")
    if found.unfinished:
        say(f"{len(found.unfinished)} points are unfinished after {minutes:g} minutes; the same command continues")
    if found.failed:
        raise FastgenError(f"{len(found.failed)} points failed: {found.failed[0].point}: {found.failed[0].error}")


def _run(
    requests_file: Path,
    out: Path,
    model: Path | None,
    engine: str | None,
    words: dict[str, str],
    scoring: dict[str, Any],
    lists: dict[str, Any],
    options: dict[str, Any],
) -> Any:
    """Parse what was typed, all of it before anything is loaded, and sweep."""
    from fastgen.generate.requests import parse_requests
    from fastgen.scoring.options import ScoringOptions, need
    from fastgen.sweep.choice import Rule, parse_within
    from fastgen.sweep.grid import Problems, integer, parse_grid, parse_list

    found = Problems()
    grid = found.attempt(lambda: parse_grid(**lists))
    seeds = parse_list("--seeds", words["seeds"], integer, "integers such as 0,1,2", found)
    within = found.attempt(lambda: parse_within(words["within"]))
    rule = found.attempt(lambda: Rule(words["rule"], *(within or (2.0, "%")), words["against"]))
    found.attempt(lambda: ScoringOptions(**scoring))
    folder = found.attempt(lambda: model or model_for(parse_requests(requests_file).kind, engine))
    found.check()
    assert grid is not None
    assert folder is not None
    scorer = need("fastgen.scoring.scorer").Scorer(**scoring)
    from fastgen.sweep import sweep as run

    options |= {"say": say, "check": ensure_certified}
    return run(folder, requests_file, out, grid, scorer=scorer, rule=rule, seeds=seeds, engine=engine, **options)
