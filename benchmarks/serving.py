"""`fastgen serve` against the same model without a server, static batches and one request at a time, all in one run:
`python -m benchmarks.serving [--quick] [OUT]`."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

from benchmarks.models import bundled
from benchmarks.report import RESULTS, save, table
from benchmarks.serving_faults import kills, overload, soak
from benchmarks.serving_local import Local
from benchmarks.serving_plot import plot
from benchmarks.serving_sections import (
    Bench,
    Row,
    capacity,
    fairness,
    latency,
    lone,
    neighbours,
    parity,
    singly,
    throughput,
)
from benchmarks.serving_server import Server
from benchmarks.serving_simulation import Costs, StepLevel, one_by_one, poisson, static
from fastgen.engines import engine_class
from fastgen.errors import FastgenError
from fastgen.files.cachedir import cache_dir
from fastgen.models.find import find_model

SECTIONS = ("parity", "lone", "throughput", "latency", "fairness", "soak", "overload", "neighbours", "kills")
MAX_WAIT_S = 5.0  # of the overload
LONGER = 5  # a simulated load than a measured one


class Size(NamedTuple):
    """How much is measured. `seconds`: of each load."""

    seconds: float
    soak_s: float
    loads: tuple[float, ...]
    images: int  # of a closed loop
    mixed: int  # requests of the parity check
    lone: int
    sizes: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16)  # whose steps are timed, for the simulation


FULL = Size(120, 300, (0.3, 0.6, 0.9, 1.2), 96, 200, 20)
QUICK = Size(20, 40, (0.6, 0.9), 48, 32, 8)


@click.command()
@click.argument("out", type=click.Path(path_type=Path), default=RESULTS / "serving-cpu.json")
@click.option("--model", default="monsters-64", show_default=True, help="A bundle, a model folder, or a model's name.")
@click.option("--engine", default="openvino", show_default=True)
@click.option("--quick", is_flag=True, help="Loads of 20 s instead of two minutes.")
@click.option("--seconds", type=float, help="Of each load.  [default: 120, or 20 with --quick]")
@click.option("--soak", "soak_s", type=float, help="Seconds of the soak.  [default: 300, or 40 with --quick]")
@click.option("--rag", type=click.Path(path_type=Path), help="An index, for requests that start from a training image.")
@click.option("--only", type=click.Choice(SECTIONS), multiple=True, help="Only this; repeatable.")
@click.option("--work", type=click.Path(path_type=Path), help="Bundles, kept.  [default: in the cache]")
def main(
    out: Path,
    model: str,
    engine: str,
    quick: bool,
    seconds: float | None,
    soak_s: float | None,
    rag: Path | None,
    only: Sequence[str],
    work: Path | None,
) -> None:
    """Measure, print the figures beside their limits, and write them and a plot of latency against load."""
    size = QUICK if quick else FULL
    size = size._replace(seconds=seconds or size.seconds, soak_s=soak_s or size.soak_s)
    try:
        folder = runnable(model, engine, work or cache_dir() / "benchmarks")
        value = measure(folder, engine, size, only or SECTIONS, rag)
    except FastgenError as error:
        raise SystemExit(f"error: {error}") from None
    save(out, **value)
    print(table(value["rows"]))
    if value["latency"]:
        print(table(value["latency"]))
        print(plot(out))


def runnable(model: str, engine: str, work: Path) -> Path:
    """The folder that an engine runs: the model's, or its bundle, exported once."""
    found = find_model(Path(model))
    if engine_class(engine).source_kind == "bundle" and found.bundle is None:
        return bundled(found.folder, work)
    return found.folder


def measure(folder: Path, engine: str, size: Size, sections: Sequence[str], rag: Path | None) -> dict[str, Any]:
    """{"settings", "rows", "latency", "simulation", "costs"}."""
    local, rows, lines, simulated = Local(folder, engine, index=rag), list[Row](), list[Row](), list[Row]()
    one_by_one_rate = singly(local)
    costs: Costs | None = None
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "serve.log"
        with Server(folder, engine, log, ["--rag", str(rag)] if rag else []) as server:
            bench = Bench(server, local, size.seconds, singly=one_by_one_rate)
            warm(bench)
            info = {name: server.info.get(name) for name in ("engine", "dtype", "device", "slots", "exact", "sha256")}
            settings = {
                "model": folder.name,
                **info,
                "start_s": server.start_s,
                **size._asdict(),
                "one_by_one_images_per_s": one_by_one_rate,
            }
            if "parity" in sections:
                rows += parity(bench, size.mixed)
            if "lone" in sections:
                rows += lone(bench, size.lone)
            if "throughput" in sections:
                rows += throughput(bench, size.images)
            if "latency" in sections:
                found, lines = latency(bench, size.loads)
                costs = local.costs(server.info["slots"], size.sizes)
                simulated = simulate(costs, size, one_by_one_rate)
                rows += found + [compared(bench, lines, simulated, load) for load in size.loads]
            if "fairness" in sections:
                rows += fairness(bench)
            if "soak" in sections:
                bench.seconds = size.soak_s
                rows += soak(bench)
                bench.seconds = size.seconds
        if "overload" in sections:
            with Server(folder, engine, log, ["--max-wait", f"{MAX_WAIT_S:g}"]) as bench.server:
                warm(bench)
                rows += capacity(bench, size.images) + overload(bench, MAX_WAIT_S)
        if "neighbours" in sections:
            with Server(folder, engine, log, [f"second={folder}"]) as bench.server:
                rows += neighbours(bench)
        if "kills" in sections:
            with Server(folder, engine, log) as bench.server:
                warm(bench)
                rows += kills(bench)
    curve = {} if costs is None else {"step_s": costs.step.points, "rest_s": costs.decode.points}
    return {"settings": settings, "rows": rows, "latency": lines, "simulation": simulated, "costs": curve}


def warm(bench: Bench) -> None:
    """A few pictures that are not measured."""
    bench.send(bench.load(2.0, 2.0))


def simulate(costs: Costs, size: Size, rate: float) -> list[Row]:
    """The same loads on a virtual clock, for longer; requests that would wait too long are refused there too."""
    lines = list[Row]()
    for load in size.loads:
        arrivals = poisson(load * rate, LONGER * size.seconds, seed=1)
        outcomes = {
            "step-level": StepLevel(costs, admission=True).run(arrivals),
            "static": static(arrivals, costs.execute, costs.step.largest),
            "one by one": one_by_one(arrivals, costs.execute),
        }
        lines += [{"load": load, "server": name, **found.facts()} for name, found in outcomes.items()]
    return lines


def compared(bench: Bench, lines: Sequence[Row], simulated: Sequence[Row], load: float) -> Row:
    """The p95 that was measured over the one of the simulation."""
    p95 = [
        next(r["p95_ms"] for r in rows if r["load"] == load and r["server"] == "step-level")
        for rows in (lines, simulated)
    ]
    factor = p95[0] / p95[1]
    return bench.row(
        f"p95 at {load:g} of one-by-one capacity over the simulation", factor, "<= 1.25", factor <= 1.25, ()
    )


if __name__ == "__main__":
    main()
