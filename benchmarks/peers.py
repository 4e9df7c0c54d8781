"""Engines against diffusers' own pipeline, same weights, noise, solver, prompts: `python -m benchmarks.peers`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from benchmarks import sides
from benchmarks.matrix import RESULTS, compare, report
from benchmarks.models import MEDIUM, prepared
from fastgen.bundle import read_bundle
from fastgen.cachedir import cache_dir
from fastgen.noise import normal


@click.command()
@click.option("--preset", default=str(MEDIUM), show_default=True, help="Preset or TOML file of the system to measure.")
@click.option("--batch-size", default=4, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--seconds", default=600.0, show_default=True, help="No round begins later than this.")
@click.option("--work", type=click.Path(path_type=Path), help="Models and bundles, kept.  [default: in the cache]")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "peers-cpu.json", show_default=True)
def main(preset: str, batch_size: int, threads: int, rounds: int, seconds: float, work: Path | None, out: Path) -> None:
    """One batch of prompts end to end: diffusers (the reference of parity too), ort, openvino."""
    work = work or cache_dir() / "benchmarks"
    model, bundle = prepared(preset, work)
    spec = read_bundle(bundle).spec
    steps = spec.sampling.num_inference_steps
    latents = normal(range(batch_size), 0, spec.latent_shape)
    own: dict[str, Any] = {"batch_size": batch_size, "threads": threads, "steps": None}
    peer = sides.diffusers_pipeline(
        model, latents, threads=threads, steps=steps, guidance_scale=spec.sampling.guidance_scale
    )
    rows = compare(
        [peer, *(sides.engine(name, bundle, **own) for name in ("ort", "openvino"))], rounds=rounds, seconds=seconds
    )
    settings = {
        "model": model.name,
        "image_size": spec.image_size,
        "solver": f"{spec.sampling.scheduler}:{steps}",
        "guidance_scale": spec.sampling.guidance_scale,
        "batch_size": batch_size,
        "threads": threads,
    }
    export_s = json.loads((work / f"{model.name}-export.json").read_text())["seconds"]
    report(out, settings | {"export_s": round(export_s)}, [row | _repaid(row, rows[0], export_s) for row in rows])


def _repaid(row: dict[str, Any], reference: dict[str, Any], export_s: float) -> dict[str, Any]:
    """After how many images the first batch's extra time, and that with the export's, is won back; None for never."""
    saved = 1 / reference["images_per_s"] - 1 / row["images_per_s"]  # seconds per image
    extra = max(0.0, row["first_s"] - row["seconds"] - (reference["first_s"] - reference["seconds"]))
    if saved <= 0:
        return {"repaid_after": None, "with_export": None}
    return {"repaid_after": round(extra / saved), "with_export": round((extra + export_s) / saved)}


if __name__ == "__main__":
    main()
