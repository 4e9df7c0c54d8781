"""`fastgen generate`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastgen.cli.certifying import ensure_certified
from fastgen.cli.common import image_size, model_options, say
from fastgen.cli.parameters import (
    BATCH,
    COLUMNS,
    DEVICE,
    DTYPE,
    ENGINE,
    FOLDER,
    GUIDANCE,
    IMAGES,
    MODEL,
    NEIGHBOURS,
    PLACE,
    SEED,
    SHARDS,
    SHARE,
    STEP,
    STEPS,
    THREADS,
    Choice,
    argument,
    option,
)
from fastgen.cli.ray import RayOptions, ray_options
from fastgen.errors import FastgenError, InputError

if TYPE_CHECKING:
    from fastgen.files.places import Url
    from fastgen.generate.job import JobReport
    from fastgen.generate.shards import Shard


@click.command()
@argument("requests_file", metavar="[REQUESTS.json]", type=FOLDER, required=False)
@option("--prompt", "prompts", multiple=True, metavar="TEXT", help="Generate this instead of a file's; repeatable.")
@option("--labels", multiple=True, metavar='"red cube, blue sphere"', help="Or these objects; repeatable.")
@option("--count", type=IMAGES, help="Images of each --prompt or --labels, with seeds K, K+1, ...  [default: 1]")
@option(
    "--model",
    type=MODEL,
    help="Bundle, model folder (engine eager), or the name of a model that comes with fastgen.  [default: the latest run's, "
    "or where that takes other requests, or there is none, the one that comes with fastgen]",
)
@option(
    "--engine",
    type=ENGINE,
    help="eager, compile, ort, openvino, trt or trt-rtx.  [default: what is installed and fits]",
)
@option(
    "--out",
    type=PLACE,
    help="Output folder, or x.png for a single image; also in a bucket, such as s3://bucket/folder.  [default: in generated/]",
)
@option("--scheduler", help="Solver, such as ddpm, ddim, pndm, dpmpp-2m, unipc.  [default: the model's]")
@option("--num-inference-steps", type=STEPS, help="Denoising steps.  [default: the model's]")
@option("--guidance-scale", type=GUIDANCE, help="1 turns guidance off.  [default: the model's]")
@option("--guidance-interval", type=(STEP, STEP), metavar="LO HI", help="Guide only the steps LO <= i < HI.")
@option(
    "--cache-interval",
    type=STEPS,
    metavar="K",
    default=1,
    help="Run the whole UNet at every K-th step, its outer blocks between: faster, other images.  [default: 1, off]",
)
@option("--rag", type=FOLDER, help="Start from the nearest training image of this index (`fastgen index`).")
@option("--noise-steps", type=STEPS, help="Steps that run from there, with --rag.  [default: 6/7 of all]")
@option("--strength", type=SHARE, help="The same as a share of the steps, more than 0 and at most 1.")
@option("--rag-top-k", type=NEIGHBOURS, help="Start from one of the K nearest, by the seed.  [default: 1]")
@option("--seed", type=SEED, default=0, show_default=True, help="Base of the images' seeds; a file's own seeds win.")
@option("--batch-size", type=BATCH, help="Images per batch, at most.  [default: 16 on a CPU, what fits on a GPU]")
@option("--limit", type=IMAGES, help="Only the first N requests.")
@option("--checkpoint", help="A run's weights: best, last, ema or a step.  [default: the finished model's]")
@model_options
@option(
    "--normalize",
    type=Choice("clamp", "min-max"),
    default="clamp",
    show_default=True,
    metavar="clamp|min-max",
    help="Values to pixels: [-1, 1] clamped, or each image's own range stretched. Scores change with it.",
)
@option(
    "--strip", metavar="900,500,200,0", help="Also show each image's denoising, x_t itself at these training timesteps."
)
@option(
    "--grid",
    type=COLUMNS,
    is_flag=False,
    flag_value=8,
    metavar="[COLUMNS]",
    help="Also write grid.png: all images, no captions, in 8 columns or as many as given.",
)
@option("--device", type=DEVICE, help="cpu, cuda, cuda:1, ...")
@option("--dtype", type=DTYPE, help="fp32, bf16, fp16, int8 or fp8.  [default: what suits the engine and the hardware]")
@option("--threads", type=THREADS, help="CPU threads.  [default: the engine's]")
@option(
    "--graphs/--no-graphs", default=None, help="Record the loop as CUDA graphs.  [default: on a GPU, but for eager]"
)
@option("--devices", metavar="0,1", help="Split the job over these devices, a process each.")
@option(
    "--shard",
    metavar="I/N|auto",
    help="Only part I of N; the last part writes the manifest. auto: the part that a Kubernetes Indexed Job, a Slurm array or "
    "torchrun gave this process.",
)
@option("--of", type=SHARDS, metavar="N", help="The number of parts, for --shard auto in Kubernetes: its completions.")
@ray_options
@option("--dry-run", is_flag=True, help="Only tell how long the job will take and how much memory, measured here.")
def generate(
    requests_file: Path | None,
    prompts: Sequence[str],
    labels: Sequence[str],
    count: int | None,
    model: Path | None,
    engine: str | None,
    out: Path | Url | None,
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
    of: int | None,
    ray: str | None,
    cpus_per_worker: int | None,
    allow_mixed: bool,
    dry_run: bool,
    checkpoint: str | None,
    height: int | None,
    width: int | None,
    loras: Sequence[str],
    allow_pickle: bool,
    rag: Path | None,
    noise_steps: int | None,
    strength: float | None,
    rag_top_k: int | None,
    **sampling: Any,
) -> None:
    """Generate an image for every request of a JSON file, or for what --prompt or --labels say.

    The same command continues a job that was interrupted.
    """
    from fastgen.files.bucket import store_of
    from fastgen.generate.job import estimate_job, run_job, run_work
    from fastgen.generate.job_input import check_free, choose_model, read_input
    from fastgen.generate.job_record import recorded_environment
    from fastgen.generate.pipeline import load
    from fastgen.generate.recipe import Recipe
    from fastgen.generate.shards import Shard, parse_devices, run_on_devices
    from fastgen.generate.single import write_image
    from fastgen.generate.strips import parse_timesteps
    from fastgen.models.lora import parse_loras
    from fastgen.retrieval.index import open_index

    late: dict[str, Any] = {"noise_steps": noise_steps, "strength": strength, "rag_top_k": rag_top_k}
    others = {"--devices": devices, "--shard": shard, "--dry-run": dry_run}
    on_ray = RayOptions.of(ray, cpus_per_worker, allow_mixed, others, device)
    part = _part(shard, of, device)
    timesteps = parse_timesteps(strip) if strip is not None else None
    names = parse_devices(devices) if devices is not None else None
    if names and (part or device):
        raise InputError(f"--devices chooses --{'shard' if part else 'device'} itself; give one of them")
    job = read_input(requests_file, prompts, labels, out, seed=seed, count=count)
    for note in job.requests.notes:
        say(note)
    job.refuse({"--strip": strip, "--grid": grid, "--shard": shard, "--devices": devices, "--ray": ray})
    check_free(job.out, single=job.single)
    folder, requests = choose_model(job.requests, model, engine, checkpoint, here=on_ray is None)
    if folder.why:
        say(f"model: {folder}")
    if names:
        if not dry_run:
            words = _without_devices(sys.argv[1:])
            words += ["--model", str(folder.folder)] if folder.why else []
            run_on_devices(words, names)
            return
        device, part = names[0], Shard(1, len(names))

    recipe = Recipe(requests[:limit], {"seed": seed, **sampling}, late, timesteps)
    options: dict[str, Any] = {"device": device, "dtype": dtype, "threads": threads, "graphs": graphs}
    options |= {"size": image_size(height, width), "loras": parse_loras(loras), "allow_pickle": allow_pickle}
    options["checkpoint"] = checkpoint
    if on_ray is not None:
        from fastgen.cluster.work import PoolWork

        with on_ray.pool(folder.folder, engine, options, rag, recorded_environment(store_of(job.out))) as pool:
            report = run_work(PoolWork(pool, recipe), job.out, batch_size=batch_size, grid=grid, say=say)
        _report(report, None)
        return
    pipeline = load(folder, engine, **options)
    if not dry_run:
        ensure_certified(pipeline)
    run = recipe.run(pipeline, open_index(rag) if rag is not None else None)
    if dry_run:
        estimate = estimate_job(run, batch_size=batch_size, shard=part)
        click.echo(f"{f'shard {part}: ' if part else ''}{estimate}; nothing was written")
    elif job.single:
        begin = time.perf_counter()
        write_image(run, job.out)
        _warn_of_truncated(run.conditions.truncated)
        click.echo(f"{job.out}: 1 image in {time.perf_counter() - begin:.1f} s")
    else:
        _report(run_job(run, job.out, batch_size=batch_size, grid=grid, shard=part, say=say), part)


def _part(text: str | None, of: int | None, device: str | None) -> Shard | None:
    """The part of --shard, None without it. `auto` also gives a process of torchrun its GPU, unless --device chooses one."""
    from fastgen.generate.shard_auto import GPUS, auto_shard, gpu_of_rank
    from fastgen.generate.shards import Shard

    if text != "auto":
        if of is not None:
            raise InputError(f"--of: found {of}, which only --shard auto takes")
        return None if text is None else Shard.parse(text)
    part = auto_shard(os.environ, of, say)
    gpu = gpu_of_rank(os.environ) if device is None else None
    if gpu is not None:
        say(f"{GPUS}={gpu}, by LOCAL_RANK")
        os.environ[GPUS] = gpu
    return part


def _without_devices(words: Sequence[str]) -> list[str]:
    """A command line without the option --devices, and without `--`: options may follow."""
    rest, iterator = [], iter(words)
    for word in iterator:
        if word == "--devices":
            next(iterator)
        elif word != "--" and not word.startswith("--devices="):
            rest.append(word)
    return rest


def _report(report: JobReport, part: Shard | None) -> None:
    """Print what a job did. Raises FastgenError when an image failed."""
    _warn_of_truncated(report.truncated)
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


def _warn_of_truncated(prompts: Mapping[str, int]) -> None:
    for prompt, tokens in prompts.items():
        say(f"warning: a prompt of {tokens} tokens was truncated: {prompt[:60]!r}...")
