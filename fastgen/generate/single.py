"""One request -> one image file, without a job's folder."""

from __future__ import annotations

from pathlib import Path

from fastgen.errors import FastgenError
from fastgen.generate.record import job_identity, manifest_line
from fastgen.generate.run import Run
from fastgen.generate.writer import write_png


def write_image(run: Run, file: Path) -> None:
    """Generate the image of a run's only request and write it to `file`, with the metadata that a job writes. Raises
    FastgenError for a broken image and a file that cannot be written; an older file stays then."""
    (request,) = run.requests
    (batch,) = run.batches(min(run.pipeline.buckets(run.settings) or [1]))
    line = manifest_line(run, request, job_identity(run, 1))
    pictures = run.begin(batch)()
    if pictures.problems[0]:
        raise FastgenError(f"{file}: not written: {pictures.problems[0]}")
    write_png(file, pictures.pixels[0], line | {"image_name": file.name})
