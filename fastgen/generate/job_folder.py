"""Claiming a job's output folder, and finishing it."""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from fastgen.errors import InputError
from fastgen.files.jsonfiles import MAX_DATA_BYTES
from fastgen.files.names import CONTACT_SHEET, GRID, MANIFEST, PART_NAME, SHEETS, STRIP_SHEET, check_unreserved
from fastgen.files.outputs import software
from fastgen.files.png import METADATA_KEY, contact_sheet, image_bytes, image_grid, parse_metadata, read_pixels
from fastgen.files.records import builtins
from fastgen.files.store import Store
from fastgen.generate.decoder import Pictures
from fastgen.generate.job_parts import all_runs, read_parts, remove_parts
from fastgen.generate.job_record import (
    JOB,
    NODE_FIELDS,
    JobRecord,
    Limits,
    Timing,
    check_same_environment,
    check_same_job,
    read_job,
    without_bundle,
)
from fastgen.generate.strip_files import IN_STRIP_SHEET, StripFiles, strip_sheet

if TYPE_CHECKING:
    from fastgen.engines.batches import Batch
    from fastgen.generate.requests import Request
    from fastgen.generate.strips import StripPlan
    from fastgen.generate.work import Files
    from fastgen.generate.writer import Writer

IN_CONTACT_SHEET = 256  # images, at most


@dataclass(frozen=True)
class JobFolder:
    """The output folder of a job: the names of the image `files` in request order, and if wanted their `strips` and the columns
    of a `grid` of all images."""

    store: Store
    files: Sequence[str]
    strips: StripFiles | None = None
    grid: int | None = None

    @classmethod
    def of(
        cls, requests: Sequence[Request], store: Store, strip: StripPlan | None = None, grid: int | None = None
    ) -> JobFolder:
        """InputError for an image outside the folder, or one with the name of another file that the job writes."""
        files = [request.image_name for request in requests]
        for file in files:
            check_unreserved(file)
            store.check_name(file)
        strips = None if strip is None else StripFiles.beside(files, strip)
        return cls(store, files, strips, grid)

    @property
    def _sheets(self) -> list[str]:
        grid = [] if self.grid is None else [GRID]
        return [CONTACT_SHEET, *grid, *([] if self.strips is None else [STRIP_SHEET])]

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
        is recorded in a new job, and must be that of an old one. Raises InputError when the folder belongs to another job, or
        holds files that would be overwritten: files that this job did not write.
        """
        store = self.store
        store.check()
        if not store.exists(JOB):
            written = [*self.files, *(self.strips.files if self.strips else ()), *self._sheets, MANIFEST]
            present = store.present(written)
            if present and not store.exists(JOB):  # another shard may have written it by now
                first = next(PurePosixPath(file).name for file in written if file in present)
                raise InputError(
                    f"{store}: {len(present)} of the files to write exist already, such as {first}, but no {JOB}; "
                    "choose another --out"
                )
            return store.write_new_json(JOB, builtins(JobRecord(identity, (), limits, environment=environment)))
        check_same_job(store, identity, any_batch_size=any_batch_size, extends=extends)
        if environment is not None:
            check_same_environment(store, environment)
        self._check_sheets()
        if clean:
            self._clean()
        return True

    def _check_sheets(self) -> None:
        """InputError for a file of another program under a name that `finish` writes."""
        store = self.store
        for sheet in self._sheets:
            store.check_output(sheet, "job")
        if store.exists(MANIFEST):
            first = next((value for _, value in store.read_jsonl(MANIFEST, limit=MAX_DATA_BYTES)), None)
            if store.is_link(MANIFEST) or not isinstance(first, dict) or not {"image_name", "fastgen"} <= first.keys():
                place = store.place(MANIFEST)
                raise InputError(f"{place}: is not a job's manifest; move it away, or choose another --out")

    def pending(self, batches: Sequence[Batch], lines: Sequence[dict[str, Any]], *, mixed: bool = False) -> list[Batch]:
        """The batches of which an image or a strip is missing; `lines`: the job's manifest. `mixed`: note in them which machine
        made each image that is there. InputError for an image or a strip that this job did not write."""
        store, strips = self.store, self.strips
        rows = [i for batch in batches for i in range(*batch[:2])]
        kinds = [(self.files, is_image_of), *([(strips.files, strips.is_strip_of)] if strips else [])]
        there = store.present([files[i] for files, _ in kinds for i in rows])
        complete = set(rows)
        for files, check in kinds:
            found = [i for i in rows if files[i] in there]
            texts = store.text_chunks([files[i] for i in found], METADATA_KEY)
            checked = set()
            for i, fields in zip(found, map(parse_metadata, texts), strict=True):
                if mixed and fields and files is self.files:
                    lines[i].update({name: fields[name] for name in NODE_FIELDS if name in fields})
                if check(store, files[i], fields or {}, lines[i]):
                    checked.add(i)
            complete &= checked
        return [batch for batch in batches if not complete.issuperset(range(*batch[:2]))]

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
        """Write the files of the whole job: the contact sheet, the grid and the strip sheet if wanted, the record with `runs`
        added (id -> timing), those of the job's parts too, and last the manifest (`lines`, one per request). Then nobody writes
        into the folder any more: the records of parts are deleted, and temporary files that were left, whichever machine made
        them.

        Several processes may do this at the same time, and one that was killed may do it again.
        """
        store = self.store
        parts = read_parts(store, identity)  # before job.json, which holds those that are gone
        written = [i for i, line in enumerate(lines) if "error" not in line]
        if written:
            self._write_sheets(written, [requests[i].prompt or ", ".join(requests[i].labels or ()) for i in written])
        record = read_job(store)
        new = record.of_job(identity, all_runs(parts.values(), runs))
        if new != record:
            store.write_json(JOB, builtins(new))
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        store.write(MANIFEST, text.encode())
        remove_parts(store, parts)
        self._clean(any_machine=True)

    def _write_sheets(self, rows: Sequence[int], captions: Sequence[str]) -> None:
        """The contact sheet of the images `rows`, and if wanted the grid and the strip sheet."""
        mark = software("job")
        shown = rows if self.grid is not None else rows[:IN_CONTACT_SHEET]
        images = list(self._pixels([self.files[i] for i in shown]))
        overview = contact_sheet(images[:IN_CONTACT_SHEET], captions[:IN_CONTACT_SHEET])
        self.store.write(CONTACT_SHEET, image_bytes(overview, mark))
        if self.grid is not None:
            self.store.write(GRID, image_bytes(Image.fromarray(image_grid(images, self.grid)), mark))
        if self.strips is not None:
            strips = list(self._pixels([self.strips.files[i] for i in rows[:IN_STRIP_SHEET]]))
            overview = strip_sheet(strips, captions, self.strips.plan)
            self.store.write(STRIP_SHEET, image_bytes(overview, mark))

    def _pixels(self, files: Sequence[str]) -> Iterator[np.ndarray]:
        return (read_pixels(io.BytesIO(data)) for data in self.store.read_all(files))

    def _clean(self, *, any_machine: bool = False) -> None:
        """Delete temporary files of processes that were killed on this machine, or of `any_machine`, those that live too."""
        names = (JOB, MANIFEST, *SHEETS, *self.files, *(self.strips.files if self.strips else ()))
        self.store.clean(names, PART_NAME, any_machine=any_machine)


def is_image_of(store: Store, file: str, metadata: Mapping[str, Any], line: Mapping[str, Any]) -> bool:
    """True for the image of this manifest line. InputError for another file in its place: it would be taken for it."""
    expected = {key: value for key, value in without_bundle(line).items() if key != "error"}
    if store.is_link(file) or without_bundle(metadata) != expected:
        raise InputError(f"{store.place(file)}: is no image of this job; move it away, or choose another --out")
    return True
