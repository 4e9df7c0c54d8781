"""Commands about a model's training set: an index to start images from (`index`), and a search for near copies (`copies`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from fastgen.cli.common import model_for, say
from fastgen.cli.parameters import DEVICE, DTYPE, ENGINE, FOLDER, IMAGES, MODEL, NEW, THREADS, Choice, argument, option
from fastgen.errors import InputError


@click.command()
@argument("data", type=FOLDER)
@option(
    "--model",
    type=MODEL,
    help="Bundle or model folder, for its text encoder and VAE.  [default: as for `generate` with prompts]",
)
@option("--out", type=NEW, help="Index folder.  [default: index/ in a model folder, or beside a bundle]")
@option(
    "--text",
    type=Choice("caption", "description"),
    default="caption",
    show_default=True,
    help="Embed each caption, or the description alone.",
)
@option(
    "--frames",
    type=Choice("all", "first"),
    default="all",
    show_default=True,
    help="Hold all frames of an animation, or the first.",
)
@option(
    "--image-mode",
    type=Choice("stretch", "pad", "crop", "figure"),
    help="stretch, pad, crop or figure.  [default: as in training, else stretch]",
)
@option("--limit", type=IMAGES, help="Only the first N images.")
@option("--engine", type=ENGINE, help="eager, ort or openvino.  [default: what is installed and fits]")
@option("--device", type=DEVICE, help="cpu, cuda, cuda:1, ...")
@option("--dtype", type=DTYPE, help="fp32, bf16, fp16, int8 or fp8.  [default: what suits the engine and the hardware]")
@option("--threads", type=THREADS, help="CPU threads.  [default: the engine's]")
def index(
    data: Path,
    model: Path | None,
    out: Path | None,
    text: str,
    frames: str,
    image_mode: str | None,
    limit: int | None,
    engine: str | None,
    **options: Any,
) -> None:
    """Index the training set DATA by its texts, so that `generate --rag` can start from the nearest training image."""
    from fastgen.generate.pipeline import load
    from fastgen.retrieval.indexing import IndexOptions, build_index, default_folder, indexing_engine

    index_options = IndexOptions(text, frames, image_mode)  # type: ignore[arg-type]  # it checks them
    folder = model or model_for("text", engine)
    pipeline = load(folder, engine or indexing_engine(folder, options["device"]), **options)
    target = out or default_folder(folder)
    built, fresh = build_index(data, pipeline, target, index_options, limit=limit, say=say)
    counts, state = built.info.counts, "written" if fresh else "up to date"
    size = f"{built.info.image_size} px, {built.info.image_mode}"
    click.echo(f"{built.folder}: {counts.images:,} images ({size}), {counts.texts:,} distinct texts; {state}")


@click.command()
@argument("images", nargs=-1, required=True, type=FOLDER)
@option("--index", "index_folder", required=True, type=FOLDER, help="What `fastgen index` wrote.")
@option("--out", type=NEW, help="JSON file for the result.  [default: copies.json in the first folder]")
@option("--sheet", type=NEW, help="PNG for the closest pairs, generated above training image; needs --data.")
@option("--data", type=FOLDER, help="The data folder that was indexed, for --sheet.")
def copies(images: Sequence[Path], index_folder: Path, out: Path | None, sheet: Path | None, data: Path | None) -> None:
    """Nearest training image of each generated one in the folders IMAGES, and the share of near copies."""
    from fastgen.files.outputs import check_output, write_report
    from fastgen.retrieval.copies import check_copies, save_sheet
    from fastgen.retrieval.index import open_index

    if (sheet is None) != (data is None):
        raise InputError("--sheet shows training images, which are in the data folder: give both --sheet and --data")
    target = images[0] / "copies.json" if out is None else out
    check_output(target, "copies")
    if sheet is not None:
        check_output(sheet, "copies", "--sheet")
    report = check_copies(images, open_index(index_folder))
    if sheet is not None and data is not None:
        save_sheet(sheet, report, data)
    write_report(target, "copies", report.to_json())
    click.echo(report.table())
