"""Everything that a GPU is asked, within a time limit: `python -m benchmarks.gpu --out DIR --minutes 9`.

Correctness first, then the targets, on random weights of the reference architectures; a short table comes last. The JSON in
DIR is complete after every section, so a run that is cut off keeps what it has. `--device cpu --tiny` tries the script out.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from benchmarks import gpu_sections as sections
from benchmarks.gpu_sections import Bench
from benchmarks.gpu_targets import targets
from benchmarks.machine import environment
from benchmarks.matrix import default_device
from benchmarks.report import table
from fastgen.cachedir import cache_dir

# In the order of what must not be missing; the seconds are what a section needs to be worth beginning.
SECTIONS: dict[str, tuple[Callable[[Bench], object], int]] = {
    "correctness": (sections.correctness, 20),
    "job": (sections.job, 45),
    "peers": (sections.peers, 40),
    "one": (sections.one, 30),
    "labels": (sections.labels, 30),
    "growth": (sections.growth, 30),
    "profile": (sections.profile, 15),
    "slow": (sections.slow, 40),
    "compiled-peer": (sections.compiled_peer, 60),
    "tests": (sections.tests, 30),
}


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for gpu.json and the plots.")
@click.option("--minutes", default=9.0, show_default=True, help="No section begins when its time is not left.")
@click.option("--requests", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="[default: made up]")
@click.option("--images", default=1063, show_default=True, help="Of the job, the first of the requests.")
@click.option(
    "--only", "only", multiple=True, type=click.Choice(list(SECTIONS)), help="These sections.  [default: all]"
)
@click.option("--engine", help="Side that runs the job, such as compile:fp16.  [default: the fastest that is correct]")
@click.option("--device", help="[default: cuda where there is one, else cpu]")
@click.option("--tiny", is_flag=True, help="Models and jobs of a few seconds, to try the script.")
@click.option("--work", type=click.Path(path_type=Path), help="Models and exports, kept.  [default: in the cache]")
def main(
    out: Path,
    minutes: float,
    requests: Path | None,
    images: int,
    only: Sequence[str],
    engine: str | None,
    device: str | None,
    tiny: bool,
    work: Path | None,
) -> None:
    """Correctness of every path, then the targets: the whole job, peers, batch 1, labels, growth, and where time goes."""
    deadline = time.perf_counter() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    device = device or default_device()
    bench = Bench(
        out, work or cache_dir() / "benchmarks", device, deadline, requests, 6 if tiny else images, tiny, engine
    )
    bench.results["environment"] = environment()
    for name in only or SECTIONS:
        _section(bench, name)
    print(f"\n{table(targets(bench.results))}\n{out / 'gpu.json'}")


def _section(bench: Bench, name: str) -> None:
    """Run one section, or note why not; what it raises is its result, and the next section begins."""
    run, needs = SECTIONS[name]
    left = bench.deadline - time.perf_counter()
    print(f"\n== {name} ({left:.0f} s left)", flush=True)
    start = time.perf_counter()
    if left < (1 if bench.tiny else needs):
        bench.results["notes"][name] = f"skipped: {left:.0f} s were left"
    else:
        try:
            bench.results[name] = run(bench)
        except Exception as error:  # a machine is lent for minutes: the other sections are still worth them
            traceback.print_exc()
            bench.results["notes"][name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if note := bench.results["notes"].get(name):
        print(note, flush=True)
    bench.results["seconds"][name] = time.perf_counter() - start
    bench.save()


if __name__ == "__main__":
    main()
