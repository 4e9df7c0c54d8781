"""`fastgen generate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from fastgen.cli.common import FOLDER, POSITIVE, say
from fastgen.cli.index import rag_options
from fastgen.errors import FastgenError, InputError


@click.command()
@click.argument("requests_file", metavar="REQUESTS.json", type=FOLDER)
@click.option("--model", type=FOLDER, help="Bundle, or model folder (engine eager).  [default: the latest run's]")
@click.option("--engine", help="eager, compile, ort, openvino or trt.  [default: what is installed and fits]")
@click.option("--out", type=FOLDER, help="Output folder.  [default: generated/REQUESTS]")
@click.option("--scheduler", help="Solver, such as ddpm, ddim, pndm, dpmpp-2m, unipc.  [default: the model's]")
@click.option("--num-inference-steps", type=POSITIVE, help="Denoising steps.  [default: the model's]")
@click.option("--guidance-scale", type=float, help="1 turns guidance off.  [default: the model's]")
@click.option("--guidance-interval", type=(int, int), metavar="LO HI", help="Guide only the steps LO <= i < HI.")
@rag_options
@click.option("--seed", default=0, show_default=True, help="Base of the images' seeds; a request's own seed wins.")
@click.option(
    "--batch-size", type=POSITIVE, help="Images per batch, at most.  [default: 16 on a CPU, what fits on a GPU]"
)
@click.option("--limit", type=POSITIVE, help="Only the first N requests.")
@click.option("--checkpoint", help="A run's weights: best, last, ema or a step.  [default: the finished model's]")
@click.option(
    "--normalize",
    default="clamp",
    show_default=True,
    metavar="clamp|min-max",
    help="Values to pixels: [-1, 1] clamped, or each image's own range stretched. Scores change with it.",
)
@click.option(
    "--strip", metavar="900,500,200,0", help="Also show each image's denoising, x_t itself at these training timesteps."
)
@click.option(
    "--grid",
    type=POSITIVE,
    is_flag=False,
    flag_value=8,
    metavar="[COLUMNS]",
    help="Also write grid.png: all images, no captions, in 8 columns or as many as given.",
)
@click.option("--device", help="cpu, cuda, cuda:1, ...")
@click.option("--dtype", help="fp32, bf16 or fp16.  [default: what suits the engine and the hardware]")
@click.option("--threads", type=POSITIVE, help="CPU threads.  [default: the engine's]")
@click.option(
    "--graphs/--no-graphs", default=None, help="Record the loop as CUDA graphs.  [default: on a GPU, but for eager]"
)
@click.option("--devices", metavar="0,1", help="Split the job over these devices, a process each.")
@click.option(
    "--shard", metavar="I/N", help="Only part I of N; the last part writes the manifest. For several machines."
)
@click.option(
    "--dry-run", is_flag=True, help="Only tell how long the job will take and how much memory, measured here."
)
@click.pass_context
def generate(
    ctx: click.Context,
    requests_file: Path,
    model: Path | None,
    engine: str | None,
    out: Path | None,
    seed: int,
    batch_size: int | None,
    limit: int | None,
    strip: str | None,
    grid: int | None,
    device: str | None,
    dtype: str | None,
    threads: int | None,
    graphs: bool | None,
    devices: str | None,
    shard: str | None,
    dry_run: bool,
    checkpoint: str | None,
    rag: Path | None,
    **sampling: Any,
) -> None:
    """Generate an image for every request of a JSON file. The same command continues a job that was interrupted."""
    from fastgen.jobs.job import estimate_job, run_job
    from fastgen.jobs.shards import Shard, parse_devices, run_on_devices
    from fastgen.pipeline import load, model_objects
    from fastgen.requests import read_requests
    from fastgen.retrieval import open_index
    from fastgen.runs import latest_model
    from fastgen.strips import parse_timesteps

    part = Shard.parse(shard) if shard else None
    timesteps = parse_timesteps(strip) if strip is not None else None
    if devices:
        if part or device:
            raise InputError(f"--devices chooses --{'shard' if part else 'device'} itself; give one of them")
        names = parse_devices(devices)
        if not dry_run:
            run_on_devices(_given_again(ctx, leave_out=("devices",)), names)
            return
        device, part = names[0], Shard(1, len(names))

    folder = model or latest_model(engine)
    requests = read_requests(requests_file, model_objects(folder, checkpoint))[:limit]
    options: dict[str, Any] = {"device": device, "dtype": dtype, "threads": threads, "graphs": graphs}
    pipeline = load(folder, engine, checkpoint=checkpoint, **options)
    target = out or Path("generated") / requests_file.stem
    held = open_index(rag) if rag else None
    settings = pipeline.settings(seed=seed, rag=rag is not None, **sampling)
    if dry_run:
        estimated = estimate_job(pipeline, requests, settings, rag=held, batch_size=batch_size, shard=part)
        click.echo(f"{f'shard {part}: ' if part else ''}{estimated}; nothing was written")
        return
    options = {"batch_size": batch_size, "strip": timesteps, "grid": grid, "shard": part}
    report = run_job(pipeline, requests, target, settings, rag=held, **options, say=say)
    for prompt, tokens in report.truncated.items():
        say(f"warning: a prompt of {tokens} tokens was truncated: {prompt[:60]!r}...")
    rate = f", {report.generated / report.seconds:.2f} images/s" if report.generated else ""
    name = f"{report.folder}, shard {part}" if part else f"{report.folder}"
    click.echo(f"{name}: {report.images} images, {report.generated} generated in {report.seconds:.1f} s{rate}")
    if not report.complete:
        say("the manifest is written when all shards are done")
    if report.errors:
        name, why = next(iter(report.errors.items()))
        raise FastgenError(
            f"{len(report.errors)} images failed and have no file, such as {name}: {why}; see manifest.jsonl"
        )


def _given_again(ctx: click.Context, leave_out: Sequence[str]) -> list[str]:
    """The command line of `ctx`, but for the options left out."""
    words = [str(ctx.info_name)]
    for param in ctx.command.params:
        value = ctx.params.get(param.name or "")
        source = ctx.get_parameter_source(param.name or "")
        if param.name in leave_out or source is not click.core.ParameterSource.COMMANDLINE:
            continue
        if isinstance(param, click.Argument):
            words.append(str(value))
        elif isinstance(param, click.Option) and param.is_flag:
            words.append((param.opts if value else param.secondary_opts)[0])
        else:
            words += [param.opts[0], *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return words
