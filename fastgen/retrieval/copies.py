"""Copy check: the distance of generated images from the training images, and which are near copies.

Images are compared as thumbnails, mirrored too, by the root mean square difference of their values: 0 for equal images, 1 for
black and white. A copy through a VAE has the same thumbnail, and no model is needed. The thresholds are calibrated on the
training set itself: the nearest image of another subject (one that shares no description) cannot be a copy. A near copy is
nearer to a training image than 95% of the training images are to another subject's, both in distance and in the ratio of
Carlini et al. 2023 ("Extracting Training Data from Diffusion Models", section 5): the distance divided by the mean distance to
the 50 next subjects, which is near 1 for a picture that resembles everything, such as a small figure on white.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from fastgen.data.images import load_image
from fastgen.errors import InputError
from fastgen.files.folders import make_folder
from fastgen.files.jsonfiles import MAX_DATA_BYTES, brief, located, read_jsonl
from fastgen.files.names import MANIFEST, SHEETS, check_image_name
from fastgen.files.outputs import software
from fastgen.files.png import in_rows, save_image, sheet
from fastgen.files.records import builtins

if TYPE_CHECKING:
    from fastgen.retrieval.index import Index, Thresholds

SAMPLE = 1000  # training images that the thresholds are calibrated on
PERCENTILE = 5.0  # of the training images' distances; so many per cent of new pictures count as near copies by chance
NEIGHBOURS = 50  # subjects behind the nearest, as in Carlini et al.
AT_ONCE = 64  # images compared with the whole training set at a time
SHEET_PAIRS, SHEET_COLUMNS = 24, 8
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class Nearest(NamedTuple):
    """The nearest training image of each of G images."""

    rows: np.ndarray  # (G,) int64
    distances: np.ndarray  # (G,) float64
    ratios: np.ndarray  # (G,) distance / mean distance to the next subjects; NaN where there is only one subject
    mirrored: np.ndarray  # (G,) bool


@dataclass(frozen=True)
class Match:
    """A generated image and its nearest training image. `copy`: None without thresholds. `retrieved`: the training image that
    it started from, if any."""

    image: str
    nearest: str
    distance: float
    ratio: float | None
    mirrored: bool
    copy: bool | None
    retrieved: str | None


@dataclass(frozen=True)
class CopyReport:
    """The copy check of several folders. `thresholds`: None where the data have too few subjects."""

    index: str
    index_sha256: str
    thresholds: Thresholds | None
    folders: Mapping[str, Sequence[Match]]

    def to_json(self) -> dict[str, Any]:
        return {
            "index": self.index,
            "index_sha256": self.index_sha256,
            "thresholds": builtins(self.thresholds),
            "folders": {name: self._summary(name) for name in self.folders},
            "images": {name: [asdict(m) for m in matches] for name, matches in self.folders.items()},
        }

    def _summary(self, folder: str) -> dict[str, Any]:
        matches = self.folders[folder]
        retrieved = [m.nearest == m.retrieved for m in matches if m.retrieved]
        return {
            "images": len(matches),
            "near_copy_share": sum(bool(m.copy) for m in matches) / len(matches) if self.thresholds else None,
            "median_distance": float(np.median([m.distance for m in matches])),
            "smallest_distance": min(m.distance for m in matches),
            "nearest_is_retrieved_share": sum(retrieved) / len(retrieved) if retrieved else None,
        }

    def table(self) -> str:
        """A line per folder, and what a near copy is."""
        lines = ["images  near copies  median distance  smallest  nearest is the retrieved one  folder"]
        for name in self.folders:
            s = self._summary(name)
            copies, retrieved = _percent(s["near_copy_share"]), _percent(s["nearest_is_retrieved_share"])
            numbers = f"{s['median_distance']:15.4f}  {s['smallest_distance']:8.4f}"
            lines.append(f"{s['images']:6}  {copies:>11}  {numbers}  {retrieved:>28}  {name}")
        if self.thresholds is None:
            return "\n".join([*lines, "no near copies counted: fewer than three subjects to calibrate on"])
        limit, ratio, percent = (getattr(self.thresholds, name) for name in ("distance", "ratio", "percentile"))
        rule = f"near copy: distance below {limit:.4f} and ratio below {ratio:.3f}"
        return "\n".join([*lines, f"{rule}; about {percent:g}% of fresh pictures are so near"])


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def check_copies(folders: Sequence[Path], index: Index) -> CopyReport:
    """The nearest training image of every image in these folders. Raises InputError for a folder without images."""
    matches = {str(folder): _check_folder(folder, index) for folder in folders}
    return CopyReport(str(index.folder), index.sha256, index.info.copies, matches)


def _check_folder(folder: Path, index: Index) -> list[Match]:
    names = generated_images(folder)
    side, mode = index.info.image_size, index.info.image_mode
    images = (np.asarray(load_image(folder / name, side, mode=mode)) for name in names)
    small = np.stack([thumbnails(image[None], index.thumbnails.shape[1])[0] for image in images])
    owners = np.array([image.subject for image in index.images])
    near, limits = nearest_images(small, index.thumbnails, owners), index.info.copies
    matches = []
    for (name, retrieved), row, distance, ratio, mirrored in zip(names.items(), *near, strict=True):
        copy = None if limits is None else bool(distance < limits.distance and ratio < limits.ratio)
        rounded = None if np.isnan(ratio) else round(float(ratio), 4)
        nearest = index.images[row].id
        matches.append(Match(name, nearest, round(float(distance), 5), rounded, bool(mirrored), copy, retrieved))
    return matches


def generated_images(folder: Path) -> dict[str, str | None]:
    """Name -> id of the training image that it started from, for the images in a folder's manifest, else for all image files.

    Raises InputError when there are none.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: is no folder of images")
    if (folder / MANIFEST).is_file():
        names = _manifest_images(folder / MANIFEST)
    else:
        files = sorted(f.name for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and f.name not in SHEETS)
        names = dict.fromkeys(files)
    if not names:
        raise InputError(f"{folder}: holds no images ({', '.join(SUFFIXES)})")
    return names


def _manifest_images(path: Path) -> dict[str, str | None]:
    """Name -> id of the training image, of the images that a manifest lists and that were written."""
    names: dict[str, str | None] = {}
    for number, line in read_jsonl(path, MAX_DATA_BYTES):
        with located(f"{path}: line {number}"):
            if not isinstance(line, dict):
                raise InputError(f"found {brief(line)}, expected the JSON object of an image")
            name, retrieved = check_image_name(line.get("image_name")), line.get("retrieved")
            if not isinstance(retrieved, str | None):
                raise InputError(f"retrieved: found {brief(retrieved)}, expected text")
            if name in names:
                raise InputError(f"image_name: {brief(name)} occurs twice")
            if "error" not in line:
                names[name] = retrieved
    return names


def thumbnails(images: np.ndarray, size: int) -> np.ndarray:
    """(N, H, W, 3) uint8 -> (N, size, size, 3) uint8, each value the mean of its box."""
    return np.stack([np.asarray(Image.fromarray(i).resize((size, size), Image.Resampling.BOX)) for i in images])


def subjects(texts: Sequence[Sequence[str]]) -> np.ndarray:
    """(N,): the number of each image's subject, the same for images that share a text, directly or through other images."""
    parent: dict[Any, Any] = {}

    def root(node: Any) -> Any:
        while parent.setdefault(node, node) != node:
            parent[node] = node = parent[parent[node]]
        return node

    for row, row_texts in enumerate(texts):
        for text in row_texts:
            parent[root(row)] = root(text)
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(root(row), len(numbers)) for row in range(len(texts))])


def calibrate(small: np.ndarray, owners: np.ndarray) -> dict[str, Any] | None:
    """The thresholds of a training set with thumbnails (N, s, s, 3) of the subjects `owners` (N,): percentile 5 of distances
    and ratios of a fixed sample to the nearest image of another subject. None for fewer than three subjects."""
    count = len(np.unique(owners))
    if count < 3:
        return None
    rows = np.arange(len(small))
    if len(rows) > SAMPLE:
        rows = np.sort(np.random.default_rng(0).choice(rows, SAMPLE, replace=False))
    near = nearest_images(small[rows], small, owners, exclude=owners[rows])
    distance, ratio = (float(np.percentile(values, PERCENTILE)) for values in (near.distances, near.ratios))
    return {
        "distance": distance,
        "ratio": ratio,
        "median_distance_to_another_subject": float(np.median(near.distances)),
        "percentile": PERCENTILE,
        "sample": len(rows),
        "subjects": count,
    }


def nearest_images(
    queries: np.ndarray, small: np.ndarray, owners: np.ndarray, exclude: np.ndarray | None = None
) -> Nearest:
    """The nearest of the thumbnails `small` (N, s, s, 3), or of their mirror images, for each of `queries` (G, s, s, 3), both
    uint8. `exclude` (G,): a subject that does not count for a query."""
    order = np.argsort(owners, kind="stable")
    starts = np.flatnonzero(np.diff(owners[order], prepend=-1))  # of each subject's images
    grouped = owners[order][starts]
    train = _flat(small[order])  # (N, s * s * 3)
    parts = []
    for start in range(0, len(queries), AT_ONCE):
        part = queries[start : start + AT_ONCE]
        straight, mirrored = _squares(_flat(part), train), _squares(_flat(part[:, :, ::-1]), train)
        squares = np.minimum(straight, mirrored)  # (g, N)
        if exclude is not None:
            squares[exclude[start : start + AT_ONCE, None] == owners[order]] = np.inf
        best = squares.argmin(axis=1)
        at = np.arange(len(part)), best
        per_subject = np.sort(np.sqrt(np.minimum.reduceat(squares, starts, axis=1)), axis=1)  # (g, S)
        ratios = _ratios(per_subject, len(grouped) - (exclude is not None))
        parts.append((order[best], np.sqrt(squares[at]), ratios, mirrored[at] < straight[at]))
    return Nearest(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _flat(images: np.ndarray) -> np.ndarray:
    """(N, s, s, 3) uint8 -> (N, s * s * 3) float32 in [-0.5, 0.5], where sums lose the least."""
    return images.reshape(len(images), -1).astype(np.float32) / np.float32(255) - np.float32(0.5)


def _squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(G, N): mean squared differences of the rows of a (G, d) and b (N, d)."""
    products = a @ b.T
    sums = (a * a).sum(axis=1)[:, None] + (b * b).sum(axis=1)
    return np.maximum(sums - 2 * products, 0) / a.shape[1]


def _ratios(per_subject: np.ndarray, subjects: int) -> np.ndarray:
    """(g,): the nearest subject's distance over the mean of the next ones'; rows are sorted, excluded subjects last."""
    behind = per_subject[:, 1 : min(subjects, 1 + NEIGHBOURS)]
    if not behind.shape[1]:
        return np.full(len(per_subject), np.nan)
    return per_subject[:, 0] / np.maximum(behind.mean(axis=1), 1e-9)


def save_sheet(path: Path, report: CopyReport, data: Path) -> None:
    """A contact sheet of the closest pairs, each generated image above its training image from the folder `data`."""
    pairs = [(Path(folder) / m.image, m) for folder, matches in report.folders.items() for m in matches]
    pairs = sorted(pairs, key=lambda pair: pair[1].distance)[:SHEET_PAIRS]
    images, captions = [], []
    for row in in_rows(pairs, SHEET_COLUMNS):
        images += [[_picture(file) for file, _ in row], [_picture(data / m.nearest) for _, m in row]]
        captions += [
            [f"{m.image} {m.distance:.3f}{' copy' if m.copy else ''}" for _, m in row],
            [f"{m.nearest}{' mirrored' if m.mirrored else ''}" for _, m in row],
        ]
    make_folder(path.parent)
    save_image(path, sheet(images, captions), software("copies"))


def _picture(file: Path) -> Image.Image:
    if not file.is_file():
        raise InputError(f"{file}: no such image; is --data the folder that was indexed?")
    with Image.open(file) as image:
        return image.convert("RGB")
