"""The certificates of bundles as a Markdown table: `python -m benchmarks.certificates BUNDLE...`.

`fastgen export MODEL --out BUNDLE --engine NAME[:DTYPE] ...` makes them, each against eager PyTorch in fp32. A line per model,
engine and precision: the network that is furthest from the reference, then whole images from the same seeds and noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from fastgen.errors import FastgenError, InputError
from fastgen.files.jsonfiles import read_json
from fastgen.models.bundle import CERTIFICATES, read_bundle

IMAGES, LATENTS = "images", "latents"
COLUMNS: tuple[str, ...] = ("model", "engine", "device", "networks", "furthest off", "relative error", "cosine")
COLUMNS += ("PSNR of images", "largest difference", "certified")


def certificates(bundle: Path) -> list[dict[str, Any]]:
    """What `fastgen export` filed in the bundle, by engine. InputError where there is nothing, or something of other files."""
    sha256 = read_bundle(bundle).sha256
    found = []
    for file in sorted((bundle / CERTIFICATES).glob("*.json")):
        value = read_json(file)
        if value["bundle_sha256"] != sha256:
            raise InputError(
                f"{file}: is of another export; `fastgen export {bundle} --out {bundle}` certifies this one"
            )
        found.append(value)
    if not found:
        raise InputError(f"{bundle}: has no certificates; `fastgen export {bundle} --out {bundle}` makes them")
    return found


def line(model: str, certificate: Mapping[str, Any]) -> dict[str, str]:
    """A certificate as a line of the table."""
    networks = [row for row in certificate["rows"] if row["what"] not in (IMAGES, LATENTS)]
    images = next(row for row in certificate["rows"] if row["what"] == IMAGES)
    worst = max(networks, key=lambda row: row["relative_l2"])
    levels = 127.5 * images["max_abs"]  # of images in [-1, 1]
    missed = [row["what"] for row in certificate["rows"] if not row["passed"]]
    values = (
        model,
        f"`{certificate['engine']}` {certificate['dtype']}",
        certificate["device"],
        str(len(networks)),
        f"`{worst['what']}`",
        f"{worst['relative_l2']:.1e}",
        f"{worst['cosine']:.7f}",
        f"{images['psnr_db']:.1f} dB",
        f"{levels:.1f}/255" if levels >= 0.1 else "< 0.1/255",
        f"no: {', '.join(missed)}" if missed else "yes",
    )
    return dict(zip(COLUMNS, values, strict=True))


def markdown(lines: Sequence[Mapping[str, str]]) -> str:
    """The table; the device is left out where it is the same in all lines."""
    same = len({row["device"] for row in lines}) == 1
    names = [name for name in COLUMNS if not (same and name == "device")]
    rows = [names, ["---"] * len(names), *([row[name] for name in names] for row in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def title(bundle: Path) -> str:
    """The model's name: the folder's, or that of the run that the bundle lies in."""
    folder = bundle.resolve()
    return folder.parent.name if folder.name == "bundle" else folder.name.removesuffix("-bundle")


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
def main(bundles: Sequence[Path]) -> None:
    """Print the certificates of all BUNDLES as one Markdown table."""
    try:
        lines = [line(f"`{title(bundle)}`", found) for bundle in bundles for found in certificates(bundle)]
    except FastgenError as error:
        raise SystemExit(f"error: {error}") from None
    print(markdown(lines))


if __name__ == "__main__":
    main()
