"""Claiming a job's output folder, and finishing it."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from fastgen.errors import InputError
from fastgen.files.folders import make_folder
from fastgen.files.jsonfiles import MAX_DATA_BYTES, read_jsonl, write_bytes, write_json, write_new_json
from fastgen.files.names import (
    CONTACT_SHEET,
    GRID,
    MANIFEST,
    PART_NAME,
    SHEETS,
    STRIP_SHEET,
    check_unreserved,
    safe_path,
)
from fastgen.files.outputs import check_output, check_output_folder, software
from fastgen.files.png import contact_sheet, image_grid, read_metadata, read_pixels, save_image
from fastgen.files.records import builtins
from fastgen.files.temporary import remove_leftovers, temporary_targets
from fastgen.generate.decoder import Pictures
from fastgen.generate.job_parts import all_runs, read_parts, remove_old_lock, remove_parts
from fastgen.generate.job_record import (
    JOB,
    NODE_FIELDS,
    JobRecord,
    Limits,
    Timing,
    check_same_job,
    read_job,
    without_bundle,
)
from fastgen.generate.strip_files import StripFiles, save_strip_sheet

if TYPE_CHECKING:
    from fastgen.engines.batches import Batch
    from fastgen.generate.requests import Request
    from fastgen.generate.strips import StripPlan
    from fastgen.generate.work import Files
    from fastgen.generate.writer import Writer

IN_CONTACT_SHEET = 256  # images, at most


@dataclass(frozen=True)
class JobFolder:
    """The output folder of a job: the image `files` in request order, and if wanted their `strips` and the columns of a `grid`
    of all images."""

    out: Path
    files: Sequence[Path]
    strips: StripFiles | None = None
    grid: int | None = None

    @classmethod
    def of(
        cls, requests: Sequence[Request], out: Path, strip: StripPlan | None = None, grid: int | None = None
    ) -> JobFolder:
        """InputError for an image outside `out`, or one with the name of another file that the job writes."""
        for request in requests:
            check_unreserved(request.image_name)
        files = [safe_path(out, r.image_name) for r in requests]
        strips = None if strip is None else StripFiles.beside(files, out, strip)
        return cls(out, files, strips, grid)

    @property
    def _extra(self) -> list[Path]:
        """The files of --grid and --strip."""
        extra = [] if self.grid is None else [self.out / GRID]
        return extra if self.strips is None else [*extra, *self.strips.files, self.out / STRIP_SHEET]

    def claim(
        self,
        identity: dict[str, Any],
        limits: Limits,
        *,
        clean: bool,
        any_batch_size: bool = False,
        extends: Collection[str] = (),
        environment: dict[str, str] | None = None,
    ) -> bool:
        """Make the folder this job's. False when another process, such as another shard's, has just done so: its limits count.

        `clean`: delete temporary files of killed processes. `any_batch_size`, `extends`: see `check_same_job`. `environment`:
        is recorded in a new job. Raises InputError when the folder belongs to another job, or holds files that would be
        overwritten: files that this job did not write.
        """
        out, path = self.out, self.out / JOB
        check_output_folder(out)
        if not os.path.lexists(path):
            written = (*self.files, *self._extra, out / MANIFEST, out / CONTACT_SHEET)
            there = [file for file in written if os.path.lexists(file)]
            if there and not os.path.lexists(path):  # another shard may have written it by now
                raise InputError(
                    f"{out}: {len(there)} of the files to write exist already, such as {there[0].name}, but no {JOB}; "
                    "choose another --out"
                )
            make_folder(out)
            return write_new_json(path, builtins(JobRecord(identity, (), limits, environment=environment)))
        check_same_job(out, identity, any_batch_size=any_batch_size, extends=extends)
        self._check_sheets()
        if clean:
            self._clean()
        return True

    def _check_sheets(self) -> None:
        """InputError for a file of another program under a name that `finish` writes."""
        sheets = [self.out / CONTACT_SHEET, *([self.out / GRID] if self.grid is not None else [])]
        for sheet in (*sheets, *([self.out / STRIP_SHEET] if self.strips is not None else [])):
            check_output(sheet, "job", "--out")
        manifest = self.out / MANIFEST
        if os.path.lexists(manifest):
            first = next((value for _, value in read_jsonl(manifest, limit=MAX_DATA_BYTES)), None)
            if manifest.is_symlink() or not isinstance(first, dict) or not {"image_name", "fastgen"} <= first.keys():
                raise InputError(f"{manifest}: is not a job's manifest; move it away, or choose another --out")

    def adopt(self, lines: Sequence[dict[str, Any]]) -> None:
        """Note in the manifest `lines` of a mixed job which machine made those images that are there."""
        for file, line in zip(self.files, lines, strict=True):
            found = read_metadata(file) or {}
            line.update({name: found[name] for name in NODE_FIELDS if name in found})

    def is_complete(self, batch: Batch, lines: Sequence[dict[str, Any]]) -> bool:
        """Whether all images of a batch are there, and their strips; `lines`: the job's manifest. InputError for an image that
        this job did not write."""
        strips = self.strips
        rows = range(*batch[:2])
        images = [is_image_of(self.files[i], lines[i]) for i in rows]
        return all(images) and (strips is None or all(strips.present(i, lines[i]) for i in rows))

    def write(self, writer: Writer, batch: Batch, pictures: Pictures | Files, lines: Sequence[dict[str, Any]]) -> None:
        """Hand a batch's images and strips to the writer, with their manifest lines. A broken image is not written; its line
        gets an "error"."""
        if not isinstance(pictures, Pictures):
            self._write_files(writer, batch, pictures, lines)
            return
        rows = zip(self.files[batch.rows], pictures.pixels, pictures.problems, lines[batch.rows], strict=True)
        for file, pixels, problem, line in rows:
            if problem:
                line["error"] = str(problem)
            else:
                writer.submit(file, pixels, line)
        if self.strips is not None:
            self.strips.submit(writer, batch, pictures, lines)

    def _write_files(self, writer: Writer, batch: Batch, made: Files, lines: Sequence[dict[str, Any]]) -> None:
        """The same for pictures that are PNG files already."""
        strips = made.strips or [None] * len(batch)
        for row, (image, problem, strip) in enumerate(
            zip(made.images, made.problems, strips, strict=True), batch.start
        ):
            if made.fields is not None:
                lines[row].update(made.fields)
            if image is None:
                lines[row]["error"] = problem
                continue
            writer.submit_file(self.files[row], image)
            if self.strips is not None and strip is not None:
                writer.submit_file(self.strips.files[row], strip)

    def finish(
        self,
        requests: Sequence[Request],
        lines: Sequence[dict[str, Any]],
        identity: dict[str, Any],
        runs: Mapping[str, Timing],
    ) -> None:
        """Write the files of the whole job: the manifest (`lines`, one per request), the contact sheet, the grid and the strip
        sheet if wanted, and the record with `runs` added (id -> timing), those of the job's parts too. Then nobody writes into
        the folder any more: the records of parts are deleted, and temporary files that were left, whichever machine made them.

        Several processes may do this at the same time, and one that was killed may do it again.
        """
        out, parts = (
            self.out,
            read_parts(self.out, identity),
        )  # the parts before job.json, which holds those that are gone
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_bytes(out / MANIFEST, text.encode())
        written = [i for i, line in enumerate(lines) if "error" not in line]
        if written:
            files = [self.files[i] for i in written]
            captions = [requests[i].prompt or ", ".join(requests[i].labels or ()) for i in written]
            mark = software("job")
            shown = [read_pixels(file) for file in files[:IN_CONTACT_SHEET]]
            save_image(out / CONTACT_SHEET, contact_sheet(shown, captions[:IN_CONTACT_SHEET]), mark)
            if self.grid is not None:
                save_image(out / GRID, Image.fromarray(image_grid([read_pixels(f) for f in files], self.grid)), mark)
            if self.strips is not None:
                strips = [self.strips.files[i] for i in written]
                save_strip_sheet(out / STRIP_SHEET, strips, captions, self.strips.plan)
        record = read_job(out / JOB)
        new = record.of_job(identity, all_runs(parts.values(), runs))
        if new != record:
            write_json(out / JOB, builtins(new))
        remove_parts(parts)
        remove_old_lock(out)
        self._clean(any_machine=True)

    def _clean(self, *, any_machine: bool = False) -> None:
        """Delete temporary files of processes that were killed on this machine, or of `any_machine`, those that live too."""
        records = filter(PART_NAME.fullmatch, temporary_targets(self.out))
        names: dict[Path, set[str]] = {self.out: {JOB, MANIFEST, *SHEETS, *records}}
        for file in (*self.files, *(self.strips.files if self.strips else ())):
            names.setdefault(file.parent, set()).add(file.name)
        for folder, targets in names.items():
            remove_leftovers(folder, targets, any_machine=any_machine)


def is_image_of(file: Path, line: dict[str, Any]) -> bool:
    """Whether the image of this manifest line is there. InputError for another file in its place: it would be taken for it."""
    if not os.path.lexists(file):
        return False
    expected = {key: value for key, value in without_bundle(line).items() if key != "error"}
    if file.is_symlink() or without_bundle(read_metadata(file) or {}) != expected:
        raise InputError(f"{file}: is no image of this job; move it away, or choose another --out")
    return True
