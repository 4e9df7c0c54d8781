"""Many generated images in one picture: `python -m benchmarks.sheet FOLDER... --out SHEET.jpg`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
from PIL import Image

from fastgen.errors import InputError
from fastgen.files.jsonfiles import read_jsonl
from fastgen.files.names import MANIFEST
from fastgen.files.png import image_grid, read_pixels

FOLDER = click.Path(path_type=Path)


def first_images(folders: Sequence[Path], count: int) -> list[Path]:
    """The first `count` images of runs, in the order of their requests, one run after the other. InputError for fewer."""
    files = []
    for folder in folders:
        if not (folder / MANIFEST).is_file():
            raise InputError(f"{folder}: has no {MANIFEST}; expected a folder that `fastgen generate` has finished")
        files += [folder / line["image_name"] for _, line in read_jsonl(folder / MANIFEST)]
    if len(files) < count:
        raise InputError(f"{', '.join(map(str, folders))}: {len(files)} images, expected at least {count}")
    return files[:count]


@click.command()
@click.argument("folders", nargs=-1, required=True, type=FOLDER)
@click.option("--out", required=True, type=FOLDER, help="The picture, in the format that its name ends in.")
@click.option(
    "--count", default=256, show_default=True, type=click.IntRange(min=1), help="Images: the first ones, unchosen."
)
@click.option("--columns", default=16, show_default=True, type=click.IntRange(min=1))
def main(folders: Sequence[Path], out: Path, count: int, columns: int) -> None:
    """The first images of FOLDERS, outputs of `fastgen generate`, as one grid."""
    pixels = [read_pixels(file) for file in first_images(folders, count)]
    Image.fromarray(image_grid(pixels, columns)).save(out, quality=90)
    click.echo(f"{out}: {count} images")


if __name__ == "__main__":
    main()
