"""The command line: parse, call, print. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from fastgen import __version__
from fastgen.cli_engines import doctor, engines
from fastgen.cli_import import import_
from fastgen.cli_index import copies, index, rag_options
from fastgen.cli_pictures import compare
from fastgen.cli_score import score
from fastgen.cli_sweep import sweep
from fastgen.errors import FastgenError, InputError

FOLDER = click.Path(path_type=Path)
POSITIVE = click.IntRange(min=1)


class Commands(click.Group):
    """Ctrl-C ends a command without the empty line that click would print."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise click.Abort from None


class Train(click.Command):
    """Its help names the presets."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from fastgen.config import preset_names

        text = f"Presets: {', '.join(preset_names())}."
        formatter.write("\n" + textwrap.fill(text, formatter.width, break_on_hyphens=False) + "\n")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="fastgen")
def cli() -> None:
    """Train a conditional diffusion model, export it, and generate with it fast, with proof of parity."""


cli.add_command(doctor)
cli.add_command(engines)
cli.add_command(score)
cli.add_command(sweep)
cli.add_command(compare)
cli.add_command(import_)
cli.add_command(index)
cli.add_command(copies)


@cli.group()
def data() -> None:
    """Render datasets of our own, in the schemas of the two reference tasks."""


@data.command()
@click.argument("out", type=FOLDER)
@click.option("--count", default=500, show_default=True, help="Number of monsters; each has eight action poses.")
@click.option("--size", default=256, show_default=True, help="Image height and width, 32 to 256 px.")
@click.option("--frames", default=4, show_default=True, help="Frames per action (the main pose has one).")
@click.option("--test-count", default=64, show_default=True, help="Requests in test.json, of monsters not trained on.")
@click.option("--seed", default=0, show_default=True, help="The same seed and options, the same images.")
@click.option("--workers", type=int, help="Processes.  [default: one per core]")
def monsters(out: Path, **options: Any) -> None:
    """Render monsters with descriptions: train_info.json, train/, test.json."""
    from fastgen.data.synthetic import write_monsters

    write_monsters(out, **options)
    click.echo(f"wrote {out}")


@data.command()
@click.argument("out", type=FOLDER)
@click.option("--count", default=18009, show_default=True, help="Number of scenes.")
@click.option("--size", default=64, show_default=True, help="Image height and width, 32 to 256 px.")
@click.option("--labels", "label_lists", type=FOLDER, help="A train.json to take file names and label lists from.")
@click.option("--hold-out", multiple=True, type=FOLDER, help="Request file whose label sets must not be trained on.")
@click.option("--seed", default=0, show_default=True, help="The same seed and options, the same images.")
@click.option("--workers", type=int, help="Processes.  [default: one per core]")
def iclevr(out: Path, **options: Any) -> None:
    """Render scenes of cubes, spheres and cylinders: train.json, objects.json, iclevr/, test.json, new_test.json."""
    from fastgen.data.synthetic import write_iclevr

    write_iclevr(out, **options)
    click.echo(f"wrote {out}")


@cli.command(cls=Train)
@click.argument("preset")
@click.option("--data", "data_folder", type=FOLDER, help="Dataset folder.  [default: the one found here]")
@click.option("--out", type=FOLDER, help="Model folder.  [default: runs/PRESET-TIME]")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key: unet.train.steps=300.")
@click.option("--skip-bad", is_flag=True, help="Leave out unreadable images (counted) instead of stopping.")
@click.option("--device", help="cpu, cuda, cuda:1, ...  [default: the GPU if there is one]")
@click.option("--tracker", help="tensorboard, wandb, mlflow, ..., or none.  [default: tensorboard if installed]")
@click.option(
    "--resume", type=FOLDER, metavar="CHECKPOINT", help="Begin at another run's: RUN/checkpoints/unet/step-000500."
)
def train(preset: str, data_folder: Path | None, out: Path | None, overrides: Sequence[str], **options: Any) -> None:
    """Train PRESET (a name, or a TOML file) on a dataset. The same command continues a run that was interrupted.

    `accelerate launch -m fastgen train ...` trains on several GPUs.
    """
    from fastgen.config import load_preset
    from fastgen.data import find_dataset
    from fastgen.runs import new_run, set_latest

    chosen = load_preset(preset, overrides)
    folder = data_folder or find_dataset(Path())
    if folder is None:
        raise InputError("no dataset in this folder; give --data DATA, or render one: `fastgen data iclevr DATA`")
    from fastgen.training import train as run
    from fastgen.training.processes import is_main, launched

    if out is None and launched() > 1:
        raise InputError("several processes need one output folder: give --out")
    target = out or new_run(chosen.name)
    run(chosen, folder, target, **options)
    if out is None and chosen.family != "evaluator":
        set_latest(target)
    if is_main():
        click.echo(f"model: {target}")


@cli.command()
@click.argument("model", type=FOLDER, required=False)
@click.option("--out", type=FOLDER, help="Bundle folder.  [default: MODEL/bundle]")
@click.option("--dtype", help="fp16 or bf16: graphs in that precision besides the fp32 ones.  [default: fp32 alone]")
@click.option("--trt", is_flag=True, help="Build TensorRT engines for this GPU, in --dtype.  [default: fp16]")
@click.option("--batch-sizes", metavar="1,8,64", help="Images per batch to build them for.  [default: 1,8,64]")
@click.option("--solver", "solvers", multiple=True, metavar="NAME:STEPS[:NOISE_STEPS]", help="Further table to store.")
@click.option(
    "--engine",
    "engines",
    multiple=True,
    metavar="NAME[:DTYPE]",
    help="Engine to certify.  [default: every installed one]",
)
@click.option("--checkpoint", help="A run's weights: best, last, ema or a step.  [default: the finished model's]")
@click.option("--overwrite", is_flag=True, help="Replace another bundle at --out.")
def export(
    model: Path | None, out: Path | None, trt: bool, batch_sizes: str | None, engines: Sequence[str], **options: Any
) -> None:
    """Export MODEL (default: the latest run) to a bundle, and certify engines against eager PyTorch in fp32.

    The same command with another --dtype adds those graphs to the bundle; MODEL may be a bundle that has them already.
    Exits with 1 when an engine misses its tolerance.
    """
    from export.bundle import BATCH_SIZES
    from export.bundle import export as run
    from fastgen.bundle import is_bundle
    from fastgen.runs import latest_run

    if batch_sizes is not None and not trt:
        raise InputError("--batch-sizes is what TensorRT engines are built for; give --trt too")
    sizes = _batch_sizes(batch_sizes) if batch_sizes is not None else BATCH_SIZES
    source = model or latest_run()
    target = out or (source if is_bundle(source) else source / "bundle")
    options |= {"engines": engines or None, "trt": trt, "batch_sizes": sizes}
    certificates = run(source, target, say=_say, show=lambda c: click.echo(c.table()), **options)
    click.echo(f"bundle: {target}")
    missed = [c.engine for c in certificates if not c.passed]
    if missed:
        raise FastgenError(f"not certified: {', '.join(missed)} (see the table above)")


def _batch_sizes(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and int(word) > 0 for word in words):
        raise InputError(f"--batch-sizes is {text!r}, expected positive integers such as 1,8,64")
    return [int(word) for word in words]


@cli.command()
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
    from fastgen.job import estimate_job, run_job
    from fastgen.pipeline import load, model_objects
    from fastgen.requests import read_requests
    from fastgen.retrieval import open_index
    from fastgen.runs import latest_model
    from fastgen.shards import Shard, parse_devices, run_on_devices
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
    report = run_job(pipeline, requests, target, settings, rag=held, **options, say=_say)
    for prompt, tokens in report.truncated.items():
        _say(f"warning: a prompt of {tokens} tokens was truncated: {prompt[:60]!r}...")
    rate = f", {report.generated / report.seconds:.2f} images/s" if report.generated else ""
    name = f"{report.folder}, shard {part}" if part else f"{report.folder}"
    click.echo(f"{name}: {report.images} images, {report.generated} generated in {report.seconds:.1f} s{rate}")
    if not report.complete:
        _say("the manifest is written when all shards are done")
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


def _say(line: str) -> None:
    click.echo(line, err=True)


def main() -> None:
    """The `fastgen` command: errors are one line on stderr, exit code 2 for the user's input, 1 otherwise."""
    start = time.perf_counter()
    try:
        cli(prog_name="fastgen", standalone_mode=False)
    except FastgenError as error:
        _fail(str(error), error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        _say(error.format_message())
        sys.exit(2)
    except click.UsageError as error:
        _fail(f"{error.format_message()} (see `{error.ctx.command_path if error.ctx else 'fastgen'} --help`)", 2)
    except click.Abort:
        _say(f"fastgen: interrupted after {time.perf_counter() - start:.0f} s; the same command continues")
        sys.exit(130)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("fastgen", "export"):
            raise
        _fail(f'this command needs {error.name}, not installed here: pip install "fastgen-diffusion[export]"', 2)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), 1)


def _fail(message: str, exit_code: int) -> None:
    _say(f"fastgen: error: {' '.join(message.split())}")
    sys.exit(exit_code)
