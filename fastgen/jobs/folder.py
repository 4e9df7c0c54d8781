"""A job's folder: whose it is, and what is written when all images are there."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from fastgen.errors import InputError
from fastgen.folders import make_folder
from fastgen.images import image_grid, read_pixels, save_contact_sheet, save_image
from fastgen.jobs.shards import remove_parts
from fastgen.jsonfiles import read_json, write_bytes, write_json, write_new_json
from fastgen.names import GRID, STRIP_SHEET
from fastgen.requests import CONTACT_SHEET, Request
from fastgen.strip_files import StripFiles, save_strip_sheet

MANIFEST, JOB = "manifest.jsonl", "job.json"


class Limits(NamedTuple):
    """How many images run together at most, and how many the VAE decodes together (None: not recorded, or nothing to decode).
    A job that is continued keeps both, to the same bytes: they may follow from the memory that was free."""

    batch: int
    decode: int | None


def claim(out: Path, files: Sequence[Path], identity: dict[str, Any], limits: Limits, *, sweep: bool) -> bool:
    """Make `out` this job's folder, or refuse: it belongs to another job, or holds files that would be overwritten.

    False when another process, such as another shard's, has made it its own meanwhile: then its limits hold.
    """
    path = out / JOB
    for folder in (out, *out.parents):
        if os.path.lexists(folder) and not folder.is_dir():
            raise InputError(f"{folder}: is not a folder; choose another --out")
    if not os.path.lexists(path):
        taken = [file for file in (*files, out / MANIFEST, out / CONTACT_SHEET) if os.path.lexists(file)]
        if taken and not os.path.lexists(path):  # which another shard may have written meanwhile
            raise InputError(
                f"{out}: {len(taken)} of the files to write exist already, such as {taken[0].name}, but no {JOB}; "
                "choose another --out"
            )
        make_folder(out)
        return write_new_json(path, {"job": identity, "limits": limits._asdict(), "runs": []})
    check_same_job(out, identity)
    if sweep:
        _sweep(files)
    return True


def check_same_job(out: Path, identity: dict[str, Any]) -> None:
    """InputError when the job that `out` holds, if any, is another one."""
    if not os.path.lexists(out / JOB):
        return
    held = _read_record(out / JOB)["job"]
    for key, value in identity.items():
        if held.get(key) != value:
            raise InputError(
                f"{out}: holds another job: {key} is {held.get(key)!r} there and {value!r} now; choose another --out"
            )


def recorded_runs(out: Path) -> list[dict[str, Any]]:
    """What each run of the job in `out` that ended well took: {"images", "seconds", ...}."""
    return _read_record(out / JOB)["runs"]


def extra_files(
    out: Path, files: Sequence[Path], strips: StripFiles | None = None, grid: int | None = None
) -> list[Path]:
    """What is written besides the images where it is asked for. InputError when an image has one of these names."""
    extra = [out / GRID] if grid is not None else []
    extra += [*strips.files, out / STRIP_SHEET] if strips is not None else []
    taken = {str(file).casefold() for file in files} & {str(file).casefold() for file in extra}
    if taken:
        raise InputError(
            f"{min(taken)}: is a request's image, and what --strip or --grid would write; rename the image"
        )
    return extra


def _sweep(files: Sequence[Path]) -> None:
    """Delete what processes left that were killed while writing."""
    for folder in {file.parent for file in files}:
        for leftover in folder.glob(".tmp-*"):
            leftover.unlink(missing_ok=True)


def held_limits(out: Path) -> Limits | None:
    """Those of the job that `out` holds, so that a resumed one cuts its requests in the same way."""
    path = out / JOB
    if not path.is_file():
        return None
    record = _read_record(path)
    held = record.get("limits")
    if not isinstance(held, dict):  # of an older version, which recorded no more than this
        held = {"batch": record["job"].get("batch_size")}
    batch, decode = (value if isinstance(value, int) and value > 0 else None for value in map(held.get, Limits._fields))
    return None if batch is None else Limits(batch, decode)


def _read_record(path: Path) -> dict[str, Any]:
    record = read_json(path)
    if not (isinstance(record, dict) and isinstance(record.get("job"), dict) and isinstance(record.get("runs"), list)):
        raise InputError(f"{path}: is not the record of a fastgen job; choose another --out")
    return record


def finish(
    out: Path,
    requests: Sequence[Request],
    files: Sequence[Path],
    lines: Sequence[dict[str, Any]],
    identity: dict[str, Any],
    runs: Sequence[dict[str, Any]],
    grid: int | None = None,
    strips: StripFiles | None = None,
) -> None:
    """What concerns the whole job: the manifest, the contact sheet, where asked for the grid of all images in so many columns
    and the sheet of strips, the record."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_bytes(out / MANIFEST, text.encode())
    done = [(f, r) for f, r, line in zip(files, requests, lines, strict=True) if "error" not in line]
    if done:
        captions = [r.prompt or ", ".join(r.labels or ()) for _, r in done]
        save_contact_sheet(out / CONTACT_SHEET, [f for f, _ in done], captions)
        if grid is not None:
            save_image(out / GRID, Image.fromarray(image_grid([read_pixels(f) for f, _ in done], grid)))
        if strips is not None:
            by_image = dict(zip(files, strips.files, strict=True))
            save_strip_sheet(out / STRIP_SHEET, [by_image[f] for f, _ in done], captions, strips.plan)
    record = _read_record(out / JOB)
    write_json(out / JOB, record | {"job": identity, "runs": [*record["runs"], *runs]})
    remove_parts(out)
    _sweep([*files, *(strips.files if strips else ())])
