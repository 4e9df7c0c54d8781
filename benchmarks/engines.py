"""The engines against each other on one model: `python -m benchmarks.engines MODEL BUNDLE`. About a minute for a small one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from benchmarks import sides
from benchmarks.matrix import RESULTS, compare, report
from fastgen.engines import missing_packages

FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)


@click.command()
@click.argument("model", type=FOLDER)
@click.argument("bundle", type=FOLDER)
@click.option("--batch-size", default=16, show_default=True)
@click.option("--steps", type=int, help="[default: the model's]")
@click.option("--threads", type=int, help="[default: the engines']")
@click.option("--rounds", default=5, show_default=True)
@click.option("--seconds", default=45.0, show_default=True, help="No round begins later than this.")
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
    names = [name for name in ("ort", "openvino") if not missing_packages(name)]
    options: dict[str, Any] = {"batch_size": batch_size, "steps": steps, "threads": threads}
    chosen = [sides.engine("eager", model, **options), *(sides.engine(name, bundle, **options) for name in names)]
    rows = compare(chosen, rounds=rounds, seconds=seconds)
    report(out, {"model": model.name} | {k: v for k, v in options.items() if v is not None}, rows)


if __name__ == "__main__":
    main()
