"""Claiming a job's output folder, and finishing it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from fastgen.errors import InputError
from fastgen.files.folders import make_folder
from fastgen.files.jsonfiles import read_json, write_bytes, write_json, write_new_json
from fastgen.files.names import CONTACT_SHEET, GRID, STRIP_SHEET, safe_path
from fastgen.files.png import image_grid, read_pixels, save_contact_sheet, save_image
from fastgen.generate.shards import remove_parts
from fastgen.generate.strip_files import StripFiles, save_strip_sheet

if TYPE_CHECKING:
    from fastgen.engines.batches import Batch
    from fastgen.generate.decoder import Pictures
    from fastgen.generate.requests import Request
    from fastgen.generate.run import Run
    from fastgen.generate.writer import Writer

MANIFEST, JOB = "manifest.jsonl", "job.json"


class Limits(NamedTuple):
    """How many images run together at most, and how many the VAE decodes together (None: not recorded, or nothing to decode).
    A job that is continued keeps both, to the same bytes: they may follow from the memory that was free."""

    batch: int
    decode: int | None


@dataclass(frozen=True)
class JobFolder:
    """The output folder of a job: its images' `files`, in request order, and where asked for their `strips` and a `grid` of all
    images in so many columns."""

    out: Path
    files: Sequence[Path]
    strips: StripFiles | None = None
    grid: int | None = None

    @classmethod
    def of(cls, run: Run, out: Path, grid: int | None = None) -> JobFolder:
        """InputError for an image that would lie outside `out`, or has the name of something else that is written."""
        files = [safe_path(out, r.image_name) for r in run.requests]
        strips = None if run.strip is None else StripFiles.beside(files, out, run.strip)
        folder = cls(out, files, strips, grid)
        taken = {str(file).casefold() for file in files} & {str(file).casefold() for file in folder._extra}
        if taken:
            raise InputError(
                f"{min(taken)}: is a request's image, and what --strip or --grid would write; rename the image"
            )
        return folder

    @property
    def _extra(self) -> list[Path]:
        """What is written besides the images where it is asked for."""
        extra = [] if self.grid is None else [self.out / GRID]
        return extra if self.strips is None else [*extra, *self.strips.files, self.out / STRIP_SHEET]

    def claim(self, identity: dict[str, Any], limits: Limits, *, sweep: bool) -> bool:
        """Make the folder this job's, or refuse: it belongs to another job, or holds files that would be overwritten.

        `sweep`: delete what killed processes left. False when another process, such as another shard's, has made the folder its
        own meanwhile: then its limits hold. Raises InputError.
        """
        out, path = self.out, self.out / JOB
        for folder in (out, *out.parents):
            if os.path.lexists(folder) and not folder.is_dir():
                raise InputError(f"{folder}: is not a folder; choose another --out")
        if not os.path.lexists(path):
            written = (*self.files, *self._extra, out / MANIFEST, out / CONTACT_SHEET)
            taken = [file for file in written if os.path.lexists(file)]
            if taken and not os.path.lexists(path):  # which another shard may have written meanwhile
                raise InputError(
                    f"{out}: {len(taken)} of the files to write exist already, such as {taken[0].name}, but no {JOB}; "
                    "choose another --out"
                )
            make_folder(out)
            return write_new_json(path, {"job": identity, "limits": limits._asdict(), "runs": []})
        check_same_job(out, identity)
        if sweep:
            self._sweep()
        return True

    def is_complete(self, batch: Batch) -> bool:
        """Whether all images of a batch are there, and their strips."""
        strips = self.strips
        return all(self.files[i].exists() and (strips is None or strips.present(i)) for i in range(*batch[:2]))

    def write(self, writer: Writer, batch: Batch, pictures: Pictures, lines: Sequence[dict[str, Any]]) -> None:
        """Hand a batch's images and strips to the writer, with their manifest lines; a line of what is no picture gets an
        "error" instead."""
        rows = zip(self.files[batch.rows], pictures.pixels, pictures.problems, lines[batch.rows], strict=True)
        for file, pixels, problem, line in rows:
            if problem:
                line["error"] = str(problem)
            else:
                writer.submit(file, pixels, line)
        if self.strips is not None:
            self.strips.submit(writer, batch, pictures, lines)

    def finish(
        self,
        requests: Sequence[Request],
        lines: Sequence[dict[str, Any]],
        identity: dict[str, Any],
        runs: Sequence[dict[str, Any]],
    ) -> None:
        """Write what concerns the whole job: the manifest of these `lines`, one per request, the contact sheet, grid and strip
        sheet, and the record with these `runs` more."""
        out = self.out
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_bytes(out / MANIFEST, text.encode())
        written = [i for i, line in enumerate(lines) if "error" not in line]
        if written:
            files = [self.files[i] for i in written]
            captions = [requests[i].prompt or ", ".join(requests[i].labels or ()) for i in written]
            save_contact_sheet(out / CONTACT_SHEET, files, captions)
            if self.grid is not None:
                save_image(out / GRID, Image.fromarray(image_grid([read_pixels(f) for f in files], self.grid)))
            if self.strips is not None:
                strips = [self.strips.files[i] for i in written]
                save_strip_sheet(out / STRIP_SHEET, strips, captions, self.strips.plan)
        record = _read_record(out / JOB)
        write_json(out / JOB, record | {"job": identity, "runs": [*record["runs"], *runs]})
        remove_parts(out)
        self._sweep()

    def _sweep(self) -> None:
        """Delete what processes left that were killed while writing."""
        for folder in {file.parent for file in (*self.files, *(self.strips.files if self.strips else ()))}:
            for leftover in folder.glob(".tmp-*"):
                leftover.unlink(missing_ok=True)


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


def recorded_limits(out: Path) -> Limits | None:
    """The limits of the job that `out` holds, so that a resumed one cuts its requests in the same way; None without a job."""
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
