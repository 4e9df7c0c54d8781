"""One request -> one image file, without a job's folder."""

from __future__ import annotations

from pathlib import Path

from fastgen.buckets import cut
from fastgen.errors import FastgenError
from fastgen.folders import make_folder
from fastgen.images import png_bytes
from fastgen.jobs.record import job_identity, manifest_line, truncated_prompts
from fastgen.jsonfiles import write_bytes
from fastgen.pipeline import Pipeline
from fastgen.requests import Request
from fastgen.retrieval import Index
from fastgen.settings import Settings


def write_image(
    pipeline: Pipeline, request: Request, file: Path, settings: Settings, rag: Index | None = None
) -> dict[str, int]:
    """Generate one request's image and write it to `file`, in place of what is there, with the metadata that a job's have.

    Returns the prompt and its number of tokens where it was truncated. Raises InputError for a request that the model does not
    take, FastgenError for an image that is broken and a file that cannot be written; what is at `file` stays then.
    """
    if rag is not None:
        rag.check(pipeline.spec)
    table = pipeline.source.table(settings.solver)
    settings.check_interval(table)
    encoder = pipeline.encoder([request], settings.guided)
    start = pipeline.retrieve([request], settings, rag)
    sizes = pipeline.buckets(settings)
    (batch,) = cut(1, min(sizes or [1]), sizes)
    truncated = truncated_prompts(encoder)
    line = manifest_line(request, settings, job_identity(pipeline, [request], settings, 1, rag), truncated, start)
    pictures = pipeline.start_batch([request], encoder, table, settings, start, bucket=batch.bucket)()
    if pictures.problems[0]:
        raise FastgenError(f"{file}: not written: {pictures.problems[0]}")
    make_folder(file.parent)
    write_bytes(file, png_bytes(pictures.pixels[0], line | {"image_name": file.name}))
    return truncated
