"""What both renderers share: argument checks, the output folder's claim, rendering in parallel, image files."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from fastgen.errors import FastgenError, InputError
from fastgen.files.jsonfiles import read_json, write_json
from fastgen.files.temporary import remove_leftovers, temporary_path

MARKER = "synthetic.json"  # written first: tells a rendered folder, finished or not, from real data
T = TypeVar("T")


def check_range(name: str, value: int, low: int, high: int | None = None) -> None:
    """Raise InputError unless `low <= value <= high` (no upper bound if `high` is None)."""
    if value < low or (high is not None and value > high):
        expected = f"at least {low}" if high is None else f"{low} to {high}"
        raise InputError(f"{name} is {value}, expected {expected}")


def claim(out: Path, arguments: dict[str, Any], json_names: Sequence[str], image_dir: str) -> None:
    """Make `out` a folder for `arguments["dataset"]`, with a `MARKER` that holds `arguments`. An earlier run's JSON files are
    deleted: they would list images that are not there if this run is killed.

    Raises InputError if `out` holds anything that an earlier run of the same renderer did not write.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file, expected a folder that is new, empty or an earlier output of this command")
    dataset = arguments["dataset"]
    try:
        if out.is_dir() and any(out.iterdir()) and _dataset_of(out) != dataset:
            raise InputError(
                f"{out} is neither empty nor rendered {dataset} data (no {MARKER} says so); choose a new folder"
            )
        for name in json_names:
            (out / name).unlink(missing_ok=True)
        (out / image_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot use {out} as the output folder: {error.strerror}") from error
    write_json(out / MARKER, arguments, indent=1)


def _dataset_of(folder: Path) -> str | None:
    try:
        return read_json(folder / MARKER)["dataset"]
    except (InputError, KeyError, TypeError):
        return None


def render_all(
    render: Callable[[T], int], tasks: Sequence[T], *, total: int, workers: int | None, progress: bool, label: str
) -> None:
    """Call `render(task) -> images written` for every task, in `workers` processes (None: one per CPU core).

    `render` must be picklable and its output independent of the order. Raises FastgenError if a file cannot be written.
    """
    workers = min(workers or os.cpu_count() or 1, len(tasks))
    try:
        if workers == 1:
            _count(map(render, tasks), total, progress, label)
        else:
            with ProcessPoolExecutor(workers) as pool:
                chunk = max(1, min(16, len(tasks) // (4 * workers)))
                _count(pool.map(render, tasks, chunksize=chunk), total, progress, label)
    except OSError as error:
        raise FastgenError(f"cannot write {error.filename or 'an image'}: {error.strerror or error}") from error
    except BrokenProcessPool as error:
        raise FastgenError("a rendering process was killed, maybe for lack of memory; try fewer workers") from error


def _count(written: Iterable[int], total: int, progress: bool, label: str) -> None:
    from tqdm import tqdm

    with tqdm(total=total, desc=label, unit="image", disable=not progress) as bar:
        for number in written:
            bar.update(number)


def write_image(path: Path, image: Image.Image) -> None:
    """Write a PNG under a temporary name and rename it."""
    temporary = temporary_path(path)
    try:
        image.save(temporary, format="PNG")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_others(folder: Path, names: Collection[str], pattern: str) -> None:
    """Delete the images that an earlier, larger run left in an image folder that `claim` has accepted: files whose names match
    `pattern`, as the renderer's do. Files of other names stay."""
    remove_leftovers(folder)
    for entry in folder.iterdir():
        if entry.name not in names and re.fullmatch(pattern, entry.name) and entry.is_file() and not entry.is_symlink():
            entry.unlink()
