"""Training data encoded once: pixels, VAE moments and text states as memory-mapped arrays in the cache folder.

An entry is a folder whose name is a hash of everything that its content depends on: the data, the image size, the weights of
the frozen network. It is written under a temporary name and renamed, so an entry that exists is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastgen.data.dataset import Dataset
from fastgen.data.images import Mode, Remarks, load_images
from fastgen.errors import FastgenError
from fastgen.files.cachedir import cache_folder, check_private
from fastgen.files.folders import new_folder
from fastgen.files.jsonfiles import write_json
from fastgen.files.records import read_record

FOLDER = "training"
LAYOUT = 1  # version of the entries' content
CHUNK = 1024  # images decoded at a time


@dataclass(frozen=True)
class Pixels:
    images: np.ndarray  # (N, size, size, 3) uint8, a row per example; those of unreadable files mean nothing
    kept: np.ndarray  # (M,) indices of the readable examples
    notes: tuple[str, ...]


def cached_pixels(dataset: Dataset, size: int, mode: Mode, skip_bad: bool) -> Pixels:
    """The dataset's images, decoded on the first call. Raises as `load_images` does, in which case nothing is cached."""
    fields = {"data": dataset.fingerprint, "size": size, "mode": mode, "skip_bad": skip_bad}
    folder = cached("pixels", fields, lambda into: _write_pixels(into, dataset, size, mode, skip_bad))
    return Pixels(
        read_array(folder, "images"), read_array(folder, "kept"), read_record(folder / "notes.json", tuple[str, ...])
    )


def cached(kind: str, fields: Mapping[str, Any], fill: Callable[[Path], None], below: str = FOLDER) -> Path:
    """The folder of the entry that `fields` determine, in the cache's folder `below`. `fill(folder)` writes the files of a
    new entry."""
    text = json.dumps({"kind": kind, "layout": LAYOUT, **fields}, sort_keys=True)
    entry = cache_folder(below) / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"
    if os.path.lexists(entry):
        check_private(entry)
    else:
        with new_folder(entry, existing="keep") as folder:
            fill(folder)
            write_json(folder / "entry.json", json.loads(text))
    return entry


def write_array(
    folder: Path, name: str, shape: tuple[int, ...], dtype: str, fill: Callable[[np.ndarray], None]
) -> None:
    """Write an .npy file that `fill(array)` fills through a memory map, so it need not fit into memory."""
    array = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape)
    fill(array)
    array.flush()


def read_array(folder: Path, name: str) -> np.ndarray:
    """A read-only memory map. Raises FastgenError when the file is damaged."""
    try:
        return np.load(folder / f"{name}.npy", mmap_mode="r")
    except (OSError, ValueError, TypeError, SyntaxError) as error:  # the last two: of a header that is no Python
        raise FastgenError(f"{folder / name}.npy: damaged cache entry ({error}); delete {folder} and repeat") from None


def _write_pixels(folder: Path, dataset: Dataset, size: int, mode: Mode, skip_bad: bool) -> None:
    count = len(dataset.examples)
    kept: list[np.ndarray] = []
    remarks = Remarks()

    def fill(images: np.ndarray) -> None:
        nonlocal remarks
        for rows in np.array_split(np.arange(count), -(-count // CHUNK)):
            part = replace(dataset, examples=tuple(dataset.examples[row] for row in rows))
            decoded, good, new = load_images(part, size, skip_bad=skip_bad, mode=mode)
            images[rows[good]] = decoded
            kept.append(rows[good])
            remarks = Remarks(remarks.bad + new.bad, remarks.without_figure + new.without_figure)

    write_array(folder, "images", (count, size, size, 3), "uint8", fill)
    np.save(folder / "kept.npy", np.concatenate(kept))
    write_json(folder / "notes.json", remarks.notes)
