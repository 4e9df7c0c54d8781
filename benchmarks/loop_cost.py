"""The share of generation that is not spent inside the networks: `python -m benchmarks.loop_cost`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.models import prepared
from benchmarks.prompts import conditions
from benchmarks.report import RESULTS, report, spread, timed
from fastgen.files.cachedir import cache_dir
from fastgen.generate.pipeline import Pipeline, load


class NetworkClock:
    """Adds up the seconds that a pipeline's engine spends in its networks."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.seconds = 0.0
        self._inside = False
        engine: Any = pipeline.engine
        engine.run, engine.run_guided = self._timed(engine.run), self._timed(engine.run_guided)

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed_call(*arguments: Any) -> Any:
            if self._inside:  # guided by two plain rows
                return call(*arguments)
            self._inside, start = True, time.perf_counter()
            try:
                return call(*arguments)
            finally:
                self._inside = False
                self.seconds += time.perf_counter() - start

        return timed_call


def loop_cost(bundle: Path, engine: str, *, batch_size: int, rounds: int, **settings: Any) -> dict[str, Any]:
    """One row: seconds of `Pipeline.generate` for a batch, and the share of it outside the networks."""
    pipeline = load(bundle, engine)
    clock = NetworkClock(pipeline)
    given: dict[str, Any] = conditions(pipeline.spec.condition.kind, batch_size)

    def generate() -> None:
        pipeline.generate(**given, seeds=range(batch_size), batch_size=batch_size, **settings)

    generate()
    seconds, shares = [], []
    for _ in range(rounds):
        clock.seconds = 0.0
        seconds.append(timed(generate))
        shares.append(1 - clock.seconds / seconds[-1])
    chosen = pipeline.settings(**settings)
    return {
        "bundle": bundle.name,
        "engine": f"{engine} {pipeline.engine.dtype}",
        "solver": chosen.solver,
        "guidance_scale": chosen.guidance_scale,
        "seconds": statistics.median(seconds),
        "loop_percent": 100 * statistics.median(shares),
        "spread_percent": spread([100 * share for share in shares]),
    }


@click.command()
@click.option("--preset", "presets", multiple=True, default=("monsters-64", "iclevr-64"), show_default=True)
@click.option("--engine", "engines", multiple=True, default=("ort", "openvino"), show_default=True)
@click.option("--batch-size", default=16, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), help="Models and bundles, kept.  [default: in the cache]")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "loop_cost-cpu.json", show_default=True)
def main(
    presets: Sequence[str], engines: Sequence[str], batch_size: int, rounds: int, work: Path | None, out: Path
) -> None:
    """The model's default sampling, and stochastic DDPM, which needs fresh noise in every step."""
    work = work or cache_dir() / "benchmarks"
    bundles = [prepared(preset, work)[1] for preset in presets]
    solvers: tuple[dict[str, Any], ...] = ({}, {"scheduler": "ddpm", "num_inference_steps": 20})
    rows = [
        loop_cost(bundle, engine, batch_size=batch_size, rounds=rounds, **settings)
        for bundle in bundles
        for engine in engines
        for settings in solvers
    ]
    report(out, {"batch_size": batch_size, "rounds": rounds}, rows)


if __name__ == "__main__":
    main()
