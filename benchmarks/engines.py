"""The engines against each other on one model: `python -m benchmarks.engines MODEL BUNDLE`. About a minute for a small one."""

from __future__ import annotations

from pathlib import Path

import click

from benchmarks.matrix import run
from benchmarks.measure import Plan
from benchmarks.report import RESULTS
from benchmarks.table import markdown
from fastgen.engines import missing_packages

FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)


@click.command()
@click.argument("model", type=FOLDER)
@click.argument("bundle", type=FOLDER)
@click.option("--batch-size", default=16, show_default=True)
@click.option("--steps", type=int, help="[default: the model's]")
@click.option("--threads", type=int, help="[default: the engines']")
@click.option("--rounds", default=5, show_default=True)
@click.option("--seconds", default=45.0, show_default=True, help="No further round begins later; each engine has one.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "engines-cpu.json", show_default=True)
def main(
    model: Path,
    bundle: Path,
    batch_size: int,
    steps: int | None,
    threads: int | None,
    rounds: int,
    seconds: float,
    out: Path,
) -> None:
    """Generate one batch with eager, ort and openvino: images/s, ratio to eager, parity with eager fp32."""
    sides = ["eager:fp32", *(name for name in ("ort", "openvino") if not missing_packages(name))]
    plan = Plan(
        model,
        out.parent,
        batches=(batch_size,),
        steps=(steps,) if steps else (),
        images=batch_size,
        rounds=rounds,
        seconds=seconds,
        threads=threads,
        bundle=bundle,
    )
    print(f"\n{markdown(run(plan, sides, out))}\n\n{out}")


if __name__ == "__main__":
    main()
