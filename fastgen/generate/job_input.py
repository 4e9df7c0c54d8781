"""A job as the user typed it: a file of requests, prompts or labels, and the output."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fastgen.engines import built_by, source_kind
from fastgen.engines.unready import check_ready
from fastgen.errors import InputError
from fastgen.files.bucket import store_of, store_of_file
from fastgen.files.names import JOB, OTHER_FORMATS
from fastgen.files.outputs import check_output
from fastgen.files.places import Url
from fastgen.files.png import METADATA_KEY, parse_metadata, read_metadata
from fastgen.generate.requests import Request, Requests, parse_requests, typed_requests
from fastgen.models.find import ModelFolder, default_model, find_model, name_of
from fastgen.models.runs import LATEST

GENERATED = Path("generated")
LONGEST_NAME = 60  # characters of a prompt that name its file


@dataclass(frozen=True)
class JobInput:
    """Requests and their output: the folder `out`, or with `single` the file `out` for one image."""

    requests: Requests
    out: Path | Url
    single: bool = False

    def refuse(self, options: Mapping[str, object]) -> None:
        """InputError for one of these options, which need a folder of images, when the output is a file."""
        for name, value in options.items():
            if self.single and value is not None:
                raise InputError(f"{name} belongs to a folder of images, and {self.out} is a file; give --out FOLDER")


def read_input(
    file: Path | None,
    prompts: Sequence[str],
    labels: Sequence[str],
    out: Path | Url | None,
    *,
    seed: int = 0,
    count: int | None = None,
) -> JobInput:
    """Read `file`, or else `prompts` and `labels`, of which one or both may be missing. `count`: images of each prompt or list
    of labels, with the seeds `seed`, `seed` + 1, ... A single image goes to a file, unless `out` names a folder. Raises
    InputError."""
    typed = bool(prompts or labels) or (file is None and count is not None)
    if typed == (file is not None):
        what = "both" if typed else "none; a model without conditions takes --count N"
        raise InputError(f"give REQUESTS.json, or --prompt TEXT or --labels NAMES; found {what}")
    if file is not None:
        if count is not None:
            raise InputError("--count goes with --prompt and --labels; a file of requests lists every image")
        return JobInput(parse_requests(file), out or GENERATED / file.stem)
    requests = typed_requests(prompts, labels, seed=seed, count=1 if count is None else count)
    images = len(requests.requests)
    if out is None:
        name = default_name((prompts or labels or ("",))[0], seed)
        return JobInput(requests, GENERATED / (f"{name}.png" if images == 1 else name), images == 1)
    single = is_image_file(out)
    if single and images > 1:
        raise InputError(f"--out {out}: is one file, and there are {images} images; give a folder")
    return JobInput(requests, out, single)


def default_name(text: str, seed: int) -> str:
    """The name, without its ending, of the image of a prompt or of labels "red cube, blue sphere"."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:LONGEST_NAME].rstrip("-")
    return f"{name or 'image'}-{seed}"


def check_free(out: Path | Url, *, single: bool) -> None:
    """InputError unless `out` can be written: for one image a file that is free, or an earlier image that is no job's; else a
    folder, or the name of one. A bucket must answer."""
    if not single:
        store_of(out).check()
    elif isinstance(out, Url):
        store, name = store_of_file(out)
        store.check_output(name, "image")
        if store.exists(name):
            metadata = parse_metadata(*store.text_chunks([name], METADATA_KEY))
            jobs = [(folder / JOB).as_posix() for folder in PurePosixPath(name).parents]
            _check_no_job(out, any(map(store.exists, jobs[: _depth(metadata)])))
    else:
        check_output(out, "image")
        records = [folder / JOB for folder in out.absolute().parents]
        _check_no_job(out, out.exists() and any(file.is_file() for file in records[: _depth(read_metadata(out))]))


def _depth(metadata: Mapping[str, object] | None) -> int:
    """How many folders above an image may be its job's."""
    name = (metadata or {}).get("image_name")
    return len(Path(name).parts) if isinstance(name, str) else 1


def _check_no_job(out: Path | Url, found: bool) -> None:
    if found:
        raise InputError(f"--out {out}: is the image of a job; choose another name")


def is_image_file(out: Path | Url) -> bool:
    """Whether `out` names an image file rather than a folder. InputError for another format than PNG."""
    suffix = PurePosixPath(out).suffix
    if suffix.lower() in OTHER_FORMATS:
        right = f"{str(out).removesuffix(suffix)}.png"
        raise InputError(f"--out {out}: images are PNG files; give {right}, or a folder")
    return suffix.lower() == ".png"


def choose_model(
    requests: Requests, model: Path | None, engine: str | None, checkpoint: str | None = None, *, here: bool = True
) -> tuple[ModelFolder, list[Request]]:
    """The model for these requests, not loaded yet: `model`, else that of `find.default_model`; and the checked requests.
    Raises InputError where there is no model, for labels that it does not know, and, unless other machines run it (`here` is
    False), for an engine that cannot run on this one."""
    if here:
        check_ready(engine, name_of(model) if model else "" if LATEST.exists() else "MODEL")
    if model:
        folder = find_model(model, checkpoint)
    else:
        folder = default_model(requests.kind, source_kind(engine), checkpoint, built_by(engine))
    try:
        return folder, requests.known(folder.objects)
    except InputError as error:
        raise InputError(f"{error}; the model is {folder}" if folder.why else str(error)) from None
