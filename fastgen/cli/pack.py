"""`fastgen pack`."""

from __future__ import annotations

from pathlib import Path

import click

from fastgen.cli.parameters import FOLDER, NEW, Choice, argument, option


@click.command()
@argument("model", type=FOLDER)
@argument("out", type=NEW)
@option(
    "--dtype",
    type=Choice("fp16", "fp32"),
    default="fp16",
    show_default=True,
    metavar="fp16|fp32",
    help="Precision of the weights.",
)
def pack(model: Path, out: Path, dtype: str) -> None:
    """Write the model or evaluator folder MODEL compactly to OUT, to be kept or given away.

    Weights are rounded to fp16 and load as any model's do; checkpoints and previews stay behind, the training record and a
    thinned log come along. A weight that overflows or is not finite is refused.
    """
    from fastgen.models.packing import pack as run

    click.echo("\n".join(run(model, out, dtype).lines()))
