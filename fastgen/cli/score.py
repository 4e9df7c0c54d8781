"""`fastgen score`: the metrics of generated images, and the comparison of two runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from fastgen.cli.common import say
from fastgen.cli.parameters import BATCH, DEVICE, FOLDER, MODEL, NEW, PATH_OR_NAME, argument, option

Command = TypeVar("Command", bound=Callable[..., Any])


def scoring_options(command: Command) -> Command:
    """The options that say what is measured, in the order of `fastgen.scoring.score`."""
    options = (
        option(
            "--evaluator",
            type=MODEL,
            help="Label accuracy, or attributes: evaluator folder or name, .safetensors, or .pth checkpoint.",
        ),
        option(
            "--attributes",
            type=FOLDER,
            help="What an evaluator of attributes is asked about.  [default: attributes.json beside the requests]",
        ),
        option("--reference", type=FOLDER, help="Images to compare with: a folder of them, or a dataset."),
        option(
            "--features",
            type=PATH_OR_NAME,
            metavar="FILE|evaluator",
            help="FID and KID: weights of FID's Inception, or the evaluator's features.",
        ),
        option(
            "--clip",
            type=PATH_OR_NAME,
            metavar="FOLDER|ID",
            help="CLIP-T, and with --reference CLIP-I: a CLIP folder or hub id.",
        ),
        option("--download", is_flag=True, help="Fetch the CLIP of a hub id that is not in the local cache."),
        option("--allow-pickle", is_flag=True, help="Read .pth files (weights only)."),
    )
    for add in reversed(options):
        command = add(command)
    return command


@click.command()
@argument("images", nargs=-1, required=True, type=FOLDER)
@option("--requests", "requests_file", type=FOLDER, help="The JSON file they were generated from.")
@scoring_options
@option("--checkpoint", help="Refuse images that were not made by these weights: best, last, ema or a step.")
@option("--against", multiple=True, type=FOLDER, help="Folder of another run to compare with; once per seed.")
@option("--batch-size", type=BATCH, default=64, show_default=True, help="Images per batch.")
@option("--device", type=DEVICE, help="cpu, cuda, cuda:1, ...  [default: the GPU if there is one]")
@option("--out", type=NEW, help="JSON file for the result.  [default: score.json in the first folder]")
def score(
    images: Sequence[Path],
    requests_file: Path | None,
    against: Sequence[Path],
    checkpoint: str | None,
    out: Path | None,
    **options: Any,
) -> None:
    """Label or attribute accuracy, FID, KID, CLIP-T, CLIP-I of images; several IMAGES folders count as several seeds."""
    from fastgen.files.outputs import check_output, write_report
    from fastgen.models.checkpoint_choice import check_made_from
    from fastgen.scoring import compare
    from fastgen.scoring.generated_images import image_folders
    from fastgen.scoring.options import ScoringOptions, need

    ScoringOptions(**options)
    for folders in (images, against or images):
        image_folders(folders)
    target = images[0] / "score.json" if out is None else out
    check_output(target, "score")
    scorer = need("fastgen.scoring.scorer").Scorer(**options)
    result = scorer.score(images, requests_file)
    if checkpoint is not None:
        check_made_from(result.made_by.get("checkpoint"), checkpoint, images)
    value, tables, warnings = result.to_json(), [result.table()], list(result.warnings)
    if against:
        other = scorer.score(against, requests_file)
        difference = compare(result, other)
        value |= {"against": other.to_json(), "comparison": difference.to_json()}
        tables += [f"\nagainst {', '.join(map(str, against))}\n{other.table(details=False)}", f"\n{difference.table()}"]
        warnings += [warning for warning in (*other.warnings, *difference.warnings) if warning not in warnings]
    click.echo("\n".join(tables))
    for warning in warnings:
        say(f"warning: {warning}")
    write_report(target, "score", value)
