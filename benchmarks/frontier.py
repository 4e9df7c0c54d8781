"""The frontier of speed and quality of a model: `python -m benchmarks.frontier --model BUNDLE --evaluator E REQUESTS.json...`.

The fewest network evaluations per image whose score is within the noise of the reference sampling, which is DDPM on the whole
training schedule for labels and PNDM at 70 steps for text. `benchmarks.frontier_search` says how it is looked for; the same
command continues after a kill or `--minutes`. `python -m benchmarks.frontier_plot` draws the results of several models.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.frontier_search import COARSE, FINE, Bench, Effort, OutOfTimeError, Search, Space, chosen, search
from benchmarks.report import RESULTS, save, table
from fastgen.cli.score import scoring_options
from fastgen.cli.sweep import SCORING, SOME
from fastgen.data.attributes import FILE, read_attributes
from fastgen.errors import FastgenError, InputError
from fastgen.files.folders import make_folder
from fastgen.files.jsonfiles import read_json, write_bytes, write_json
from fastgen.generate.requests import read_requests
from fastgen.models.find import find_model
from fastgen.sampling.tables import parse_key
from fastgen.scoring import Scorer
from fastgen.scoring.result import or_none
from fastgen.sweep import Point, ScoredPoint, requests_json
from fastgen.sweep.grid import integer

FOLDER = click.Path(path_type=Path)
SOLVERS = "ddim,dpmpp-2m,dpmpp-3m,unipc,deis,euler,heun,pndm"
STEPS, SCALES = "2,3,4,6,8,10,15,20,30,50", "1,1.5,2,3,4,6"
PNDM_STEPS = 70
ENGINE = ("engine", "dtype", "threads", "batch_size")
IDLE = 0.3  # load average below which a machine counts as idle
Record = dict[str, Any]


def pool(files: Sequence[Path], out: Path, objects: Any, limit: int | None) -> Path:
    """The requests of all files (of each the first `limit`) as one file in `out`, with what stands beside them. With several
    files ids and image names begin with the file's name: test-0.png."""
    stems = [file.stem for file in files]
    if twice := [stem for stem in stems if stems.count(stem) > 1]:
        raise InputError(f"{twice[0]}.json is given twice; request files must differ in their names")
    make_folder(out)
    together: dict[str, Any] = {}
    attributes: dict[str, Any] = {}
    for file in files:
        prefix = f"{file.stem}-" if len(files) > 1 else ""
        for key, value in requests_json(read_requests(file, objects)[:limit]).items():
            together[prefix + key] = value | {"image_name": prefix + value["image_name"]}
        if (beside := file.parent / FILE).is_file():
            attributes |= {prefix + key: value for key, value in read_attributes(beside).items()}
        if (beside := file.parent / "objects.json").is_file():
            write_bytes(out / "objects.json", beside.read_bytes())
    if attributes:
        write_json(out / FILE, attributes)
    write_json(out / "requests.json", together)
    return out / "requests.json"


def reference_sampling(bench: Bench, asked: str | None) -> tuple[tuple[str, int], str | None]:
    """(solver and steps, why they are not the usual ones). Raises InputError for a key that the model cannot have."""
    if asked is not None:
        name, steps, late = parse_key(asked)
        if late is not None:
            raise InputError(f"--reference-solver {asked}: expected NAME:STEPS")
        if bench.evaluations(Point(name, steps, 1.0)) is None:
            raise InputError(f"--reference-solver {asked}: {bench.skipped[asked]}")
        return (name, steps), None
    if bench.kind == "labels":
        return ("ddpm", bench.training_steps), None
    for name in ("pndm-prk", "pndm"):
        if bench.evaluations(Point(name, PNDM_STEPS, 1.0)) is not None:
            return (name, PNDM_STEPS), None
    return ("ddim", PNDM_STEPS), bench.skipped[f"pndm-prk:{PNDM_STEPS}"]


def record(stage: str, row: ScoredPoint, metric: str, attributes: Collection[str]) -> Record:
    """A measured point as JSON; of the `attributes` that the evaluator judges the lowest score too."""
    figures, found = row.figures, row.figures.get(metric)
    out: Record = {
        "pass": stage,
        "solver": row.point.scheduler,
        "steps": row.point.num_inference_steps,
        "guidance": row.point.guidance_scale,
        "evaluations_per_image": row.evaluations,
        "seconds_per_image": row.seconds_per_image,
        "seeds": len(row.folders),
        "score": None if found is None else or_none(found.value),
        "standard_error": None if found is None else or_none(found.standard_error),
    }
    if asked := [name for name in attributes if name in figures]:
        lowest = min(asked, key=lambda name: figures[name].value)
        out |= {"lowest": lowest, "lowest_score": figures[lowest].value}
        out |= {"attributes": {name: [figures[name].value, or_none(figures[name].standard_error)] for name in asked}}
    return out | ({"error": row.error} if row.error else {})


def records(bench: Bench) -> list[Record]:
    """All measured points, the coarse ones first, each pass by evaluations."""
    return [
        record(stage, row, bench.metric, bench.scorer.attributes or ())
        for stage in (COARSE, FINE)
        for row in sorted(bench.rows[stage].values(), key=lambda r: (r.evaluations, r.point.name))
    ]


def point_json(point: Point | None) -> Record | None:
    if point is None:
        return None
    return {"solver": point.scheduler, "steps": point.num_inference_steps, "guidance": point.guidance_scale}


def toml(point: Record) -> str:
    """The point as the defaults of a preset or a model."""
    return (
        f'[sampling]\nscheduler = "{point["solver"]}"\nnum_inference_steps = {point["steps"]}\n'
        f"guidance_scale = {point['guidance']}"
    )


def busy(work: Path, minutes: float | None = None, load: float | None = None) -> list[Record]:
    """The runs that measured into `work`, each with the load average that it found; with `minutes` this one is added."""
    file = work / "runs.json"
    runs: list[Record] = read_json(file) if file.is_file() else []
    if minutes is not None:
        runs.append({"load_average_before": load, "minutes": round(minutes, 2)})
        write_json(file, runs)
    return runs


def machine_state(runs: Sequence[Record]) -> str:
    """In words, for the table."""
    loads = [run["load_average_before"] for run in runs if run["load_average_before"] is not None]
    if not loads:
        return "whether the machine was idle is not known"
    found = f"load average {max(loads):.2g} before the start"
    return f"idle machine ({found})" if max(loads) < IDLE else f"other work on the machine ({found})"


def short_table(found: Sequence[Record], reference: Record | None, named: Record | None) -> str:
    """The fine pass, with the reference and the point that is named marked."""
    rows = []
    for row in found:
        key = {name: row[name] for name in ("solver", "steps", "guidance")}
        mark = "chosen" if key == named else "reference" if key == reference else ""
        columns = ("evaluations_per_image", "seconds_per_image", "score", "standard_error", "lowest", "lowest_score")
        rows.append({"": mark, **key} | {name: row[name] for name in columns if name in row})
    return table(rows)


def numbers(option: str, text: str, convert: Any = integer) -> tuple[Any, ...]:
    """`4,6,8` -> values, each once. Raises InputError."""
    try:
        return tuple(dict.fromkeys(convert(word.strip()) for word in text.split(",")))
    except ValueError:
        raise InputError(f"{option}: found {text!r}, expected numbers separated by commas") from None


@click.command()
@click.argument("requests", nargs=-1, required=True, type=FOLDER)
@click.option("--model", type=FOLDER, required=True, help="Bundle or model folder.")
@click.option("--name", help="Of the model, in the results.  [default: the folder's]")
@scoring_options
@click.option("--engine", help="[default: what is installed and fits]")
@click.option("--dtype", help="[default: the engine's]")
@click.option("--threads", type=int, help="[default: the engine's]")
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--limit", type=click.IntRange(min=1), help="Only the first N requests of each file.")
@click.option("--solver", "solvers", default=SOLVERS, show_default=True)
@click.option("--steps", default=STEPS, show_default=True)
@click.option("--guidance", "scales", default=SCALES, show_default=True)
@click.option("--coarse-seeds", default="1000", show_default=True, help="Of the coarse pass.")
@click.option("--seeds", default="0,1,2,3,4", show_default=True, help="Of the fine pass: what the figures are over.")
@click.option("--keep-scales", default=2, show_default=True, help="Guidance scales crossed with solvers and steps.")
@click.option("--finalists", default=16, show_default=True, help="Points measured with all seeds at a time.")
@click.option("--within", default=2.0, show_default=True, help="Standard errors of the reference.")
@click.option("--reference-solver", metavar="NAME:STEPS", help="[default: ddpm, all steps, or for text pndm-prk:70]")
@click.option("--minutes", type=SOME, help="Begin nothing after so many minutes; the same command continues.")
@click.option("--work", type=FOLDER, required=True, help="Folder of the images and scores; the same command continues.")
@click.option("--out", type=FOLDER, help="[default: benchmarks/results/frontier-NAME.json]")
def main(
    requests: Sequence[Path],
    model: Path,
    name: str | None,
    reference_solver: str | None,
    minutes: float | None,
    limit: int | None,
    work: Path,
    out: Path | None,
    **given: Any,
) -> None:
    """Find the fewest evaluations that are as good as the reference sampling; write every point as JSON."""
    start, load = time.monotonic(), _load_average()
    found, title = Search(), name or model.name
    try:
        space, effort = space_and_effort(given)
        pooled = pool(requests, work / "requests", find_model(model).objects, limit)
        scorer = Scorer(**{key: given[key] for key in SCORING})
        bench = Bench(model, pooled, work, scorer, effort, minutes=minutes, **{key: given[key] for key in ENGINE})
        reference, reason = reference_sampling(bench, reference_solver)
        try:
            search(bench, space, reference, found)
        except OutOfTimeError:
            if found.reference in bench.rows[FINE]:
                found.chosen = chosen(bench, found.reference)
        runs = busy(work, (time.monotonic() - start) / 60, load)
    except FastgenError as error:
        raise SystemExit(f"error: {error}") from None
    rows = records(bench)
    settings = {"model": title, "requests": [file.name for file in requests], **circumstances(bench, pooled, space)}
    more: Record = {
        "reference": point_json(found.reference),
        "reference_reason": reason,
        "chosen": point_json(found.chosen),
    }
    more |= {"complete": found.complete, "kept": found.kept, "runs": runs}
    save(out or RESULTS / f"frontier-{title}.json", settings, rows, **more)
    print_result(rows, settings, more)


def space_and_effort(given: Mapping[str, Any]) -> tuple[Space, Effort]:
    """What the options say. Raises InputError."""
    space = Space(
        tuple(dict.fromkeys(word.strip() for word in given["solvers"].split(","))),
        tuple(sorted(numbers("--steps", given["steps"]))),
        tuple(sorted(numbers("--guidance", given["scales"], float))),
    )
    seeds = numbers("--coarse-seeds", given["coarse_seeds"]), numbers("--seeds", given["seeds"])
    return space, Effort(*seeds, given["keep_scales"], given["finalists"], given["within"])


def circumstances(bench: Bench, pooled: Path, space: Space) -> Record:
    """What the figures depend on."""
    figures = [row.figures[bench.metric] for row in bench.rows[COARSE].values() if bench.metric in row.figures]
    return {
        "images": len(read_json(pooled)),
        "requests_sha256": hashlib.sha256(pooled.read_bytes()).hexdigest(),
        **bench.engine,
        "threads": bench.options["threads"],
        "batch_size": bench.options["batch_size"],
        "metric": bench.metric,
        "better": figures[0].better if figures else None,
        "scorer": bench.scorer.identity["networks"],
        "coarse_seeds": bench.effort.coarse_seeds,
        "seeds": bench.effort.seeds,
        "standard_errors": bench.effort.standard_errors,
        "grid": vars(space),
        "skipped": bench.skipped,
    }


def print_result(rows: Sequence[Record], settings: Record, more: Record) -> None:
    """The fine pass, why the reference is what it is, what is missing, and the point that was named."""
    if fine := [row for row in rows if row["pass"] == FINE]:
        print(f"{settings['model']}, {settings['metric']}, {machine_state(more['runs'])}")
        print(short_table(fine, more["reference"], more["chosen"]))
    if more["reference_reason"]:
        print(f"the reference is not the usual one: {more['reference_reason']}")
    if not more["complete"]:
        print(f"incomplete after {len(rows)} points: the same command continues")
    if more["chosen"] is not None:
        print(f"\n{toml(more['chosen'])}")


def _load_average() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


if __name__ == "__main__":
    main()
