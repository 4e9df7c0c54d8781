"""The difference between two folders of generated images, from two engines or two samplers, in figures and side by side."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastgen.errors import InputError
from fastgen.files.folders import make_folder
from fastgen.files.names import SHEETS, STRIP_FOLDER
from fastgen.files.outputs import check_output, software, write_report
from fastgen.files.png import in_rows, save_image, sheet
from fastgen.files.temporary import remove_leftovers
from fastgen.scoring.generated_images import metadata_of, read_image

PICTURED, COLUMNS = 16, 8
SMALLEST = 96  # px of a pictured image, enlarged by a whole factor
SAME = ("seed", "prompt", "labels")  # inputs that both images of a pair should share
PLACES = ("id", "image_name", "strip")


@dataclass(frozen=True)
class Pair:
    """One image of both folders. `psnr_db` is None where they are identical; `max_abs` in levels of 255."""

    name: str
    psnr_db: float | None
    max_abs: int


@dataclass(frozen=True)
class FolderComparison:
    """Figures over all pairs. `differs`: fields of the images' metadata -> the values found in A and in B."""

    a: Path
    b: Path
    pairs: tuple[Pair, ...]
    differs: Mapping[str, tuple[list[Any], list[Any]]]
    warnings: tuple[str, ...]

    @property
    def different(self) -> list[Pair]:
        return [pair for pair in self.pairs if pair.psnr_db is not None]

    @property
    def identical(self) -> int:
        return len(self.pairs) - len(self.different)

    @property
    def mean_psnr_db(self) -> float | None:
        """Over the images that differ; None if none does."""
        values = [pair.psnr_db for pair in self.pairs if pair.psnr_db is not None]
        return sum(values) / len(values) if values else None

    @property
    def worst(self) -> Pair | None:
        """The pair with the lowest PSNR."""
        return min(self.different, key=lambda pair: pair.psnr_db or 0.0, default=None)

    def lines(self) -> list[str]:
        """What `fastgen compare` prints."""
        share = 100 * self.identical / len(self.pairs)
        lines = [f"{len(self.pairs)} images: {self.identical} identical ({share:.1f}%)"]
        if self.worst is not None:
            largest = max(self.pairs, key=lambda pair: pair.max_abs)
            lines.append(f"PSNR of the {len(self.different)} others: mean {self.mean_psnr_db:.1f} dB")
            lines.append(f"worst: {self.worst.psnr_db:.1f} dB, {self.worst.name}")
            lines.append(f"largest difference: {largest.max_abs}/255, {largest.name}")
        lines += [f"{key}: A {_brief(a)}, B {_brief(b)}" for key, (a, b) in self.differs.items()]
        return lines

    def to_json(self) -> dict[str, Any]:
        return {
            "a": str(self.a),
            "b": str(self.b),
            "images": len(self.pairs),
            "identical": self.identical,
            "psnr_db_mean_of_different": self.mean_psnr_db,
            "worst": vars(self.worst) if self.worst else None,
            "max_abs": max(pair.max_abs for pair in self.pairs),
            "differs": {key: {"a": a, "b": b} for key, (a, b) in self.differs.items()},
            "warnings": list(self.warnings),
            "pairs": [vars(pair) for pair in self.pairs],
        }


def compare(a: Path, b: Path, out: Path, limit: int | None = None) -> FolderComparison:
    """Compare the images that two folders have under the same names, all or the first `limit`; write `out`, a PNG with rows of
    A, B and their amplified difference for the first 16 and the worst, and the figures as JSON beside it.

    Raises InputError for a folder or an image that cannot be read, no name in common, and two sizes under one name.
    """
    if out.suffix != ".png":
        raise InputError(f"--out {out}: expected the name of a new PNG file, which ends in .png")
    for file in (out, out.with_suffix(".json")):
        check_output(file, "compare")
    names, warnings = _common_names(a, b, limit)
    pairs, metadata = [], []
    for name in names:
        images = [read_image(folder / name) for folder in (a, b)]
        pairs.append(_pair(name, _pixels(images[0]), _pixels(images[1]), a, b))
        metadata.append(tuple(metadata_of(image, folder / name) for image, folder in zip(images, (a, b), strict=True)))
    warnings += _input_warnings(names, metadata)
    comparison = FolderComparison(a, b, tuple(pairs), _differences(metadata), tuple(warnings))
    rows = list(dict.fromkeys([*names[:PICTURED], *([comparison.worst.name] if comparison.worst else [])]))
    make_folder(out.parent)
    remove_leftovers(out.parent, [out.name])
    save_image(out, _picture(a, b, rows), software("compare"))
    write_report(out.with_suffix(".json"), "compare", comparison.to_json())
    return comparison


def _common_names(a: Path, b: Path, limit: int | None) -> tuple[list[str], list[str]]:
    """Names in both folders, in the manifest's order, and a warning about the others."""
    for folder in (a, b):
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder, expected the images that `fastgen generate` wrote")
    first, second = _names(a), set(_names(b))
    common = [name for name in first if name in second][:limit]
    if not common:
        raise InputError(f"{a} and {b} have no image name in common")
    others = (a, [name for name in first if name not in second]), (b, sorted(second - set(first)))
    warnings = [f"{len(names)} images only in {folder}, such as {names[0]}" for folder, names in others if names]
    return common, warnings


def _names(folder: Path) -> list[str]:
    """The images below `folder`; numbers in names are compared as numbers, so that 2_main.png comes before 10_main.png."""
    files = [f.relative_to(folder) for f in sorted(folder.rglob("*.png")) if not f.name.startswith(".")]
    names = [f.as_posix() for f in files if f.parts[0] not in (*SHEETS, STRIP_FOLDER)]
    return sorted(names, key=lambda name: [int(w) if w.isdigit() else w for w in re.split(r"(\d+)", name)])


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.int16)


def _pair(name: str, first: np.ndarray, second: np.ndarray, a: Path, b: Path) -> Pair:
    if first.shape != second.shape:
        sizes = " and ".join(f"{x.shape[1]} x {x.shape[0]} px" for x in (first, second))
        raise InputError(f"{name}: {sizes} in {a} and {b}, expected one size")
    error = float(np.mean((first - second).astype(np.float64) ** 2))
    psnr = 10 * math.log10(255**2 / error) if error else None
    return Pair(name, psnr, int(np.abs(first - second).max()))


Metadata = Sequence[tuple[dict[str, Any] | None, ...]]


def _input_warnings(names: Sequence[str], metadata: Metadata) -> list[str]:
    """A warning for each input, such as the seed, in which images of one name differ."""
    warnings = []
    silent = [name for name, pair in zip(names, metadata, strict=True) if None in pair]
    if silent:
        warnings.append(f"{len(silent)} images do not say how they were made, such as {silent[0]}")
    for field in SAME:
        wrong = [name for name, (x, y) in zip(names, metadata, strict=True) if x and y and x.get(field) != y.get(field)]
        if wrong:
            what = f"{len(wrong)} of {len(names)} images have another {field} in A than in B, such as {wrong[0]}"
            warnings.append(f"{what}: the difference is not the engine's or the sampler's alone")
    return warnings


def _differences(metadata: Metadata) -> dict[str, tuple[list[Any], list[Any]]]:
    """Metadata fields with other values in A than in B, except those that belong to one image."""
    fields = dict.fromkeys(
        key for pair in metadata for record in pair for key in record or () if key not in PLACES + SAME
    )
    differs = {}
    for field in fields:
        both: tuple[list[Any], list[Any]] = ([], [])
        for pair in metadata:
            for values, record in zip(both, pair, strict=True):
                if record is not None and record.get(field) not in values:
                    values.append(record.get(field))
        if both[0] and both[1] and both[0] != both[1]:
            differs[field] = both
    return differs


def _brief(values: list[Any]) -> str:
    shown = ["".join(c if c.isprintable() else "?" for c in str(value)[:12]) for value in values[:3]]
    return ", ".join(shown) + (", ..." if len(values) > 3 else "")


def _picture(a: Path, b: Path, names: Sequence[str]) -> Image.Image:
    """Blocks of up to eight columns, each with a row of A, of B and of their difference, amplified and clamped."""
    pairs = [[_pixels(read_image(folder / name)) for folder in (a, b)] for name in names]
    size = max(max(x.shape) for x, _ in pairs)
    differences = [np.abs(x - y).astype(np.int32) for x, y in pairs]
    visible = np.percentile(np.concatenate([d.ravel() for d in differences]), 99.5)  # a single outlier hides the rest
    factor = max(1, 255 // max(1, math.ceil(visible)))
    tiles = [
        [_tile(x, size) for x in (*pair, np.minimum(d * factor, 255))]
        for pair, d in zip(pairs, differences, strict=True)
    ]
    rows: list[Sequence[Image.Image]] = []
    captions: list[Sequence[str]] = []
    for columns, texts in zip(in_rows(tiles, COLUMNS), in_rows(names, COLUMNS), strict=True):
        rows += zip(*columns, strict=True)
        captions += [(), (), texts]
    titles = [f"A: {a.name}", f"B: {b.name}", f"|A - B| x {factor}"] * (len(rows) // 3)
    return sheet(rows, captions, cell=size * math.ceil(SMALLEST / size), titles=titles)


def _tile(image: np.ndarray, size: int) -> Image.Image:
    """An image of up to (size, size, 3) on black."""
    height, width, _ = image.shape
    return Image.fromarray(np.pad(image.astype(np.uint8), ((0, size - height), (0, size - width), (0, 0))))
