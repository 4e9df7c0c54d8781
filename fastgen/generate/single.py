"""One request -> one image file, without a job's folder."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from fastgen.errors import FastgenError
from fastgen.files.bucket import store_of_file
from fastgen.files.places import Url
from fastgen.files.png import png_bytes
from fastgen.generate.record import job_identity, manifest_line
from fastgen.generate.run import Run

NO_RECORD = re.compile("(?!)")  # matches no name


def write_image(run: Run, file: Path | Url) -> None:
    """Generate the image of a run's only request and write it to `file`, with the metadata that a job writes. Raises
    FastgenError for a broken image and a file that cannot be written; an older file stays then."""
    store, name = store_of_file(file)
    (request,) = run.requests
    (batch,) = run.batches(min(run.pipeline.buckets(run.settings) or [1]))
    line = manifest_line(run, request, job_identity(run, 1))
    pictures = run.begin(batch)()
    if pictures.problems[0]:
        raise FastgenError(f"{file}: not written: {pictures.problems[0]}")
    store.clean([name], NO_RECORD)
    store.write(name, png_bytes(pictures.pixels[0], line | {"image_name": PurePosixPath(name).name}))
