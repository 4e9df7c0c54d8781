"""Every engine against diffusers and optimum on this CPU, at real size: `python -m benchmarks.peers`.

The matrix on the `medium` architecture: same weights, noise, solver and prompts, sides in turn, about 35 minutes on two cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from benchmarks.matrix import FOLDER, run
from benchmarks.measure import Plan
from benchmarks.models import architecture, random_model
from benchmarks.report import RESULTS
from benchmarks.sides import default_sides
from benchmarks.table import markdown
from fastgen.files.cachedir import cache_dir


@click.command()
@click.option("--synthetic", default="medium", show_default=True, help="Architecture, preset or TOML file.")
@click.option("--side", "sides", multiple=True, help="Like openvino:int8, see benchmarks/sides.py.  [default: all]")
@click.option("--bundle", type=FOLDER, help="Of the engines, of the same model.  [default: exported from it]")
@click.option("--batch-size", default=4, show_default=True)
@click.option("--steps", type=click.IntRange(1), help="[default: the architecture's]")
@click.option("--threads", default=2, show_default=True)
@click.option("--rounds", default=2, show_default=True)
@click.option(
    "--seconds", default=3600.0, show_default=True, help="No further round, batch size or step count begins later."
)
@click.option("--work", type=click.Path(path_type=Path), help="Models and exports, kept.  [default: in the cache]")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "peers-cpu.json", show_default=True)
def main(
    synthetic: str,
    sides: Sequence[str],
    bundle: Path | None,
    batch_size: int,
    steps: int | None,
    threads: int,
    rounds: int,
    seconds: float,
    work: Path | None,
    out: Path,
) -> None:
    """One batch of prompts end to end, by diffusers, as it comes and as informed users write it, optimum and every engine."""
    work = work or cache_dir() / "benchmarks"
    plan = Plan(
        random_model(synthetic, work / architecture(synthetic).name),
        work,
        batches=(batch_size,),
        steps=(steps,) if steps else (),
        together=6,
        rounds=rounds,
        seconds=seconds,
        threads=threads,
        bundle=bundle,
    )
    rows = run(plan, sides or default_sides("cpu"), out)
    print(f"\n{markdown(rows)}\n\n{out}")


if __name__ == "__main__":
    main()
