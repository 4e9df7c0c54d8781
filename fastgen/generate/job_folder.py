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
    """Most images per batch, and per forward of the VAE decoder (None: not recorded, or no VAE). They may depend on the memory
    that was free, and the images' bytes depend on them: a job that is continued keeps both."""

    batch: int
    decode: int | None


@dataclass(frozen=True)
class JobFolder:
    """The output folder of a job: the image `files` in request order, and if wanted their `strips` and the columns of a `grid`
    of all images."""

    out: Path
    files: Sequence[Path]
    strips: StripFiles | None = None
    grid: int | None = None

    @classmethod
    def of(cls, run: Run, out: Path, grid: int | None = None) -> JobFolder:
        """InputError for an image outside `out`, or one with the name of another file that the job writes."""
        files = [safe_path(out, r.image_name) for r in run.requests]
        strips = None if run.strip is None else StripFiles.beside(files, out, run.strip)
        folder = cls(out, files, strips, grid)
        twice = {str(file).casefold() for file in files} & {str(file).casefold() for file in folder._extra}
        if twice:
            raise InputError(
                f"{min(twice)}: is a request's image, and what --strip or --grid would write; rename the image"
            )
        return folder

    @property
    def _extra(self) -> list[Path]:
        """The files of --grid and --strip."""
        extra = [] if self.grid is None else [self.out / GRID]
        return extra if self.strips is None else [*extra, *self.strips.files, self.out / STRIP_SHEET]

    def claim(self, identity: dict[str, Any], limits: Limits, *, clean: bool, any_batch_size: bool = False) -> bool:
        """Make the folder this job's. False when another process, such as another shard's, has just done so: its limits count.

        `clean`: delete temporary files of killed processes. `any_batch_size`: see `check_same_job`. Raises InputError when the
        folder belongs to another job, or holds files that would be overwritten.
        """
        out, path = self.out, self.out / JOB
        for folder in (out, *out.parents):
            if os.path.lexists(folder) and not folder.is_dir():
                raise InputError(f"{folder}: is not a folder; choose another --out")
        if not os.path.lexists(path):
            written = (*self.files, *self._extra, out / MANIFEST, out / CONTACT_SHEET)
            there = [file for file in written if os.path.lexists(file)]
            if there and not os.path.lexists(path):  # another shard may have written it by now
                raise InputError(
                    f"{out}: {len(there)} of the files to write exist already, such as {there[0].name}, but no {JOB}; "
                    "choose another --out"
                )
            make_folder(out)
            return write_new_json(path, {"job": identity, "limits": limits._asdict(), "runs": []})
        check_same_job(out, identity, any_batch_size=any_batch_size)
        if clean:
            self._clean()
        return True

    def is_complete(self, batch: Batch) -> bool:
        """Whether all images of a batch are there, and their strips."""
        strips = self.strips
        return all(self.files[i].exists() and (strips is None or strips.present(i)) for i in range(*batch[:2]))

    def write(self, writer: Writer, batch: Batch, pictures: Pictures, lines: Sequence[dict[str, Any]]) -> None:
        """Hand a batch's images and strips to the writer, with their manifest lines. A broken image is not written; its line
        gets an "error"."""
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
        """Write the files of the whole job: the manifest (`lines`, one per request), the contact sheet, the grid and the strip
        sheet if wanted, and the record with `runs` added."""
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
        self._clean()

    def _clean(self) -> None:
        """Delete temporary files of processes that were killed."""
        for folder in {file.parent for file in (*self.files, *(self.strips.files if self.strips else ()))}:
            for leftover in folder.glob(".tmp-*"):
                leftover.unlink(missing_ok=True)


def check_same_job(out: Path, identity: dict[str, Any], *, any_batch_size: bool = False) -> None:
    """InputError when the job that `out` holds, if any, is another one. `any_batch_size`: it may run in other batches."""
    if not os.path.lexists(out / JOB):
        return
    job = _read_record(out / JOB)["job"]
    for key, value in identity.items():
        if job.get(key) != value and not (any_batch_size and key == "batch_size"):
            raise InputError(
                f"{out}: holds another job: {key} is {job.get(key)!r} there and {value!r} now; choose another --out"
            )


def recorded_runs(out: Path) -> list[dict[str, Any]]:
    """Images and seconds of each finished run of the job in `out`: {"images", "seconds", ...}."""
    return _read_record(out / JOB)["runs"]


def recorded_limits(out: Path) -> Limits | None:
    """The limits of the job in `out`, so that a resumed one cuts its requests into the same batches; None without a job."""
    path = out / JOB
    if not path.is_file():
        return None
    record = _read_record(path)
    limits = record.get("limits")
    if not isinstance(limits, dict):  # an older version recorded the batch size alone
        limits = {"batch": record["job"].get("batch_size")}
    batch, decode = (v if isinstance(v, int) and v > 0 else None for v in map(limits.get, Limits._fields))
    return None if batch is None else Limits(batch, decode)


def _read_record(path: Path) -> dict[str, Any]:
    record = read_json(path)
    if not (isinstance(record, dict) and isinstance(record.get("job"), dict) and isinstance(record.get("runs"), list)):
        raise InputError(f"{path}: is not the record of a fastgen job; choose another --out")
    return record
