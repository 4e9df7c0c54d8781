"""What a Ray cluster costs and gives: `python -m benchmarks.scale BUNDLE [--quick] [--out FILE]`.

`fastgen generate --ray` against the same job in one process, workers against threads, the seconds until the first image, and
the arithmetic of a large job. About 10 minutes on 2 idle cores; needs the packages of the extras `ray` and `export`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

from benchmarks.report import RESULTS, save
from benchmarks.scale_arithmetic import arithmetic
from benchmarks.scale_job import Cluster
from benchmarks.scale_sections import cores, overhead, start, workers
from benchmarks.scale_table import lines
from fastgen.cluster.connect import LOCAL, VARIABLE, cluster
from fastgen.engines import missing_packages
from fastgen.errors import FastgenError, InputError
from fastgen.generate.pipeline import choose_engine
from fastgen.models.bundle import Bundle
from fastgen.models.find import find_model

SECTIONS = ("overhead", "workers", "start", "arithmetic")
ENGINES = ("openvino", "ort")
MODELS = ("monsters-64", "iclevr-64")  # of the arithmetic


class Size(NamedTuple):
    """How much is measured. `levels`, `job`: (seconds of a batch, batches)."""

    levels: tuple[tuple[float, int], ...]
    rounds: int
    job: tuple[float, int]
    job_rounds: int
    starts: int
    products_s: float  # of a round of matrix products
    idle_s: float  # for which an idle cluster is watched


FULL = Size(((0.1, 20), (1.0, 6), (3.0, 3)), 5, (0.5, 8), 3, 5, 1.5, 5)
QUICK = Size(((0.05, 6), (0.2, 3)), 2, (0.1, 4), 1, 1, 0.3, 1)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "scale-cpu.json", show_default=True)
@click.option(
    "--engine",
    "engines",
    multiple=True,
    help="Repeatable; the first one's overhead is measured.  [default: openvino, ort]",
)
@click.option("--quick", is_flag=True, help="Batches of less than a second and few rounds.")
@click.option("--only", type=click.Choice(SECTIONS), multiple=True, help="Only this; repeatable.")
@click.option("--images", type=click.IntRange(1), default=1_000_000, show_default=True, help="Of the arithmetic.")
@click.option("--gpus", type=click.IntRange(1), default=8, show_default=True, help="Of the arithmetic.")
@click.option("--price", type=click.FloatRange(0), help="Of a GPU-hour, for the arithmetic.  [default: no cost]")
def main(
    bundle: Path,
    out: Path,
    engines: Sequence[str],
    quick: bool,
    only: Sequence[str],
    images: int,
    gpus: int,
    price: float | None,
) -> None:
    """Measure, write JSON, and print the tables."""
    size, sections = QUICK if quick else FULL, only or SECTIONS
    try:
        if os.environ.get(VARIABLE):
            raise InputError(f"{VARIABLE} is set, and this benchmark starts a cluster of its own: unset it")
        engines = engines or [name for name in ENGINES if not missing_packages(name)]
        if not engines:
            raise InputError(f"none of {', '.join(ENGINES)} is installed; give --engine")
        value = measure(_checked(bundle, engines), engines, size, sections)
        if "arithmetic" in sections:
            driver = value["driver_cpu_ms_per_image"]
            value["arithmetic"] = arithmetic(MODELS, images=images, gpus=gpus, price=price, driver_ms=driver)
    except FastgenError as error:
        raise SystemExit(f"error: {error}") from None
    save(out, **value)
    print(lines(value))


def _checked(path: Path, engines: Sequence[str]) -> Bundle:
    """The bundle. Raises InputError for what cannot be measured, before anything is."""
    model = find_model(path)
    for engine in engines:
        choose_engine(model, engine, "cpu")
    if model.bundle is None:
        raise InputError(
            f"{path}: is a model folder, expected a bundle; `fastgen export {path} --out BUNDLE` makes one"
        )
    if (kind := model.bundle.spec.condition.kind) not in ("text", "labels"):
        raise InputError(f"{path}: takes {kind}, expected a model of prompts or labels")
    return model.bundle


def measure(bundle: Bundle, engines: Sequence[str], size: Size, sections: Sequence[str]) -> dict[str, Any]:
    """{"settings"; "rows", "idle_cores" and "driver_cpu_ms_per_image": of the overhead; "workers"; "start"}. Sections that are
    left out are empty."""
    import ray

    settings = {
        "bundle": bundle.folder.name,
        "engine": engines[0],
        "ray": ray.__version__,
        **size._asdict(),
        "cpu": cores(size.products_s),
    }
    value: dict[str, Any] = {"settings": settings, "rows": [], "workers": [], "start": []}
    value["driver_cpu_ms_per_image"] = None
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if {"overhead", "workers"} & set(sections):
            with cluster(LOCAL) as (ray, _):
                local = [Cluster(ray, bundle, engine) for engine in engines]
                if "overhead" in sections:
                    found = overhead(local[0], size.levels, size.rounds, size.idle_s, scratch)
                    value["rows"], value["idle_cores"], value["driver_cpu_ms_per_image"] = found
                if "workers" in sections:
                    value["workers"] = [
                        row for one in local for row in workers(one, size.job, size.job_rounds, scratch)
                    ]
        if "start" in sections:
            value["start"] = start(Cluster(None, bundle, engines[0]), size.starts, scratch)
    return value


if __name__ == "__main__":
    main()
