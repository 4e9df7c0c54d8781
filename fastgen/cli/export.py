"""`fastgen export`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from fastgen.cli.common import image_size, model_options, say
from fastgen.cli.parameters import BATCHES, DTYPE, FOLDER, MODEL, NEW, Choice, argument, option
from fastgen.errors import FastgenError, InputError


@click.command()
@argument("model", type=MODEL, required=False)
@option("--out", type=NEW, help="Bundle folder.  [default: MODEL/bundle, or NAME-bundle]")
@option(
    "--dtype",
    type=DTYPE,
    help="fp16, bf16, int8 or fp8: graphs in that precision besides the fp32 ones.  [default: fp32 alone]",
)
@option(
    "--calibration",
    type=FOLDER,
    metavar="REQUESTS",
    help="Request file of 8 or more, whose images eight bits are calibrated with.  [default: the certificate's requests]",
)
@option(
    "--requests",
    type=FOLDER,
    metavar="REQUESTS",
    help="Request file whose score eight bits must keep, with --evaluator.",
)
@option("--evaluator", type=MODEL, help="Evaluator of that score: a folder or name, as `fastgen score` takes it.")
@option("--trt", is_flag=True, help="Build TensorRT engines for this GPU, in --dtype.  [default: fp16]")
@option(
    "--rtx",
    is_flag=True,
    help="Build plans of TensorRT for RTX into the bundle, in --dtype, for cards that need not be here.  [default: fp16]",
)
@option(
    "--capabilities",
    metavar="8.6,8.9",
    help="Compute capabilities of those cards: 8.0, 8.6, 8.9, 12.0, 12.1.  [default: 8.0,8.6,8.9,12.0]",
)
@option(
    "--batch-sizes",
    type=BATCHES,
    metavar="1,8,64",
    help="Images per batch to build them for; with --rtx and --triton any number up to the largest.  [default: 1,8,64]",
)
@option(
    "--triton", type=NEW, metavar="REPO", help="Write a model repository of Triton from the bundle, in a new folder."
)
@option(
    "--weights",
    type=Choice("fp32", "fp16"),
    help="fp16: graphs that compute in fp32 keep their weights in half the bytes.  [default: fp32, or what the bundle has]",
)
@option("--feature-cache", is_flag=True, help="Add the graphs that `fastgen generate --cache-interval` runs.")
@option("--solver", "solvers", multiple=True, metavar="NAME:STEPS[:NOISE_STEPS]", help="Further table to store.")
@option(
    "--engine",
    "engines",
    multiple=True,
    metavar="NAME[:DTYPE]",
    help="Engine to certify.  [default: every installed one]",
)
@option("--checkpoint", help="A run's weights: best, last, ema or a step.  [default: the finished model's]")
@model_options
@option(
    "--overwrite",
    is_flag=True,
    help="Replace another bundle at --out and another repository at --triton; build what --rtx builds again.",
)
def export(
    model: Path | None,
    out: Path | None,
    trt: bool,
    rtx: bool,
    capabilities: str | None,
    batch_sizes: Sequence[int] | None,
    triton: Path | None,
    engines: Sequence[str],
    height: int | None,
    width: int | None,
    loras: Sequence[str],
    **options: Any,
) -> None:
    """Export MODEL (default: the latest run) to a bundle, and certify engines against eager PyTorch in fp32.

    MODEL may be the name of a model that comes with fastgen. The same command with another --dtype adds those graphs to the
    bundle; MODEL may be a bundle that has them already.

    --trt builds for the GPU of this machine, --rtx on any x86-64 machine for RTX cards elsewhere; the first `fastgen generate
    --engine trt-rtx` on a card certifies what --rtx built. Where --trt cannot work, the command says so at once, and makes the
    bundle all the same, for the same command on a machine with a GPU.

    --dtype int8 quantises the denoiser and the VAE decoder for engines openvino and ort, and certifies these in int8 too.
    Layers that eight bits would hurt stay in higher precision; BUNDLE/unet/model.int8.json lists all with their errors.
    With --trt or --rtx, int8 or fp8 quantises them for TensorRT instead; fp8 needs compute capability 8.9 or more.

    --triton with a MODEL that is a bundle exports nothing: it writes a repository with its ONNX graphs, in --dtype, or with
    --trt its TensorRT engines, and a model that makes images.

    Exits with 1 when an engine misses its tolerance, and where no TensorRT engines could be built.
    """
    from export.bundle import BATCH_SIZES
    from export.bundle import export as run
    from fastgen.models.bundle import is_bundle
    from fastgen.models.find import output_folder
    from fastgen.models.lora import parse_loras
    from fastgen.models.runs import latest_run

    if batch_sizes is not None and not (trt or rtx or triton):
        raise InputError("--batch-sizes is what TensorRT engines are built for; give --trt, --rtx or --triton too")
    if capabilities is not None and not rtx:
        raise InputError("--capabilities is what plans of TensorRT for RTX are built for; give --rtx too")
    cards = None if capabilities is None else [word.strip() for word in capabilities.split(",")]
    sizes = batch_sizes or BATCH_SIZES
    source = model or latest_run()
    target = out or (source if is_bundle(source) else output_folder(source, "bundle"))
    options |= {"size": image_size(height, width), "loras": parse_loras(loras)}
    options |= {"engines": engines or None, "trt": trt, "rtx": rtx, "capabilities": cards, "batch_sizes": sizes}
    options |= {"triton": triton}
    certificates = run(source, target, say=say, show=lambda c: click.echo(c.table()), **options)
    click.echo(f"bundle: {target}")
    if triton is not None:
        click.echo(f"Triton model repository: {triton}")
    missed = [c.engine for c in certificates if not c.passed]
    if missed:
        raise FastgenError(f"not certified: {', '.join(missed)} (see the table above)")
