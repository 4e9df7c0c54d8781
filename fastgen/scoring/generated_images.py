"""Generated images: their folders, decoding, and their metadata about how they were made."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from fastgen.data.dataset import files_in
from fastgen.errors import InputError
from fastgen.files.jsonfiles import brief, check_regular, parse_json
from fastgen.files.names import SHEETS
from fastgen.files.png import METADATA_KEY
from fastgen.generate.requests import Request

LISTED = 10
MADE_BY = ("model_sha256", "checkpoint", "engine", "dtype", "scheduler", "num_inference_steps", "guidance_scale")
Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def image_folders(images: Paths) -> list[Path]:
    """The folders of one run, one per seed; InputError for one that does not exist or is given twice."""
    folders = [Path(images)] if isinstance(images, str | os.PathLike) else [Path(folder) for folder in images]
    if not folders:
        raise InputError("no folder of images was given")
    resolved: set[Path] = set()
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder, expected the images that `fastgen generate` wrote")
        if folder.resolve() in resolved:
            raise InputError(f"{folder}: given twice; every folder counts as a seed of its own")
        resolved.add(folder.resolve())
    return folders


def image_names(folders: Sequence[Path], requests: Sequence[Request] | None) -> tuple[str, ...]:
    """The names that every folder has: the requests', or without requests those of the PNG files in the first folder."""
    if requests is not None:
        names = tuple(request.image_name for request in requests)
    else:
        files = (name for name in files_in(folders[0]) if name.lower().endswith(".png"))
        names = tuple(sorted(name for name in files if name not in SHEETS))
    if not names:
        raise InputError(f"{folders[0]}: holds no PNG images")
    for folder in folders:
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            names_text = ", ".join(missing[:LISTED]) + (", ..." if len(missing) > LISTED else "")
            raise InputError(f"{folder}: {len(missing)} of {len(names)} images are missing: {names_text}")
    return names


def read_image(path: Path) -> Image.Image:
    """A PNG file as RGB, its text chunks in `info`. InputError if it is damaged, too large or not 8 bits deep."""
    check_regular(path, "a PNG image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=("PNG",)) as file:
                if file.mode.startswith(("I", "F")):
                    raise InputError(f"{path}: mode {file.mode}, expected an image with 8 bits per channel")
                return file.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{path}: cannot be read as a PNG image: {error}") from None


def metadata_of(image: Image.Image, path: Path) -> dict[str, Any] | None:
    """What `fastgen generate` stored in the image; None for an image that another program wrote. InputError for anything
    but a JSON object."""
    if METADATA_KEY not in image.info:
        return None
    place = f"{path}: text chunk {METADATA_KEY!r}"
    try:
        metadata = parse_json(str(image.info[METADATA_KEY]).encode("utf-8", "replace"), place)
    except InputError as error:
        raise InputError(f"{error}, expected the JSON of a generated image") from None
    if not isinstance(metadata, dict):
        raise InputError(f"{place}: found {brief(metadata)}, expected the JSON of a generated image")
    try:
        json.dumps(metadata, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InputError(f"{place}: found a lone surrogate, expected text that UTF-8 can encode") from None
    return metadata


def check_made_for(metadata: Mapping[str, Any] | None, path: Path, request: Request) -> None:
    """InputError when the image's own metadata names another condition: a task's test files share their image names."""
    actual, expected = (metadata or {}).get("labels"), sorted(request.labels or ())
    if isinstance(actual, list):
        actual = sorted(map(str, actual))
    if request.prompt is not None:
        actual, expected = (metadata or {}).get("prompt"), request.prompt  # type: ignore[assignment]
    if actual is not None and actual != expected:
        difference = f"was generated for {brief(actual)}, the requests say {brief(expected)}"
        raise InputError(f"{path}: {difference}: another file's?")


def saving(metadata: Sequence[Mapping[str, Any] | None]) -> str:
    """How the networks' output was converted to pixels: "clamp" to [-1, 1] or "min-max" of each image; "mixed"; "unknown" for
    images of another program."""
    kinds = {"unknown" if one is None else str(one.get("normalize") or "clamp") for one in metadata}
    return kinds.pop() if len(kinds) == 1 else "mixed"


def made_by(metadata: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
    """The fields MADE_BY that the images carry, with the value that all agree on, else "mixed"."""
    out = {}
    for field in MADE_BY:
        values = {json.dumps((one or {}).get(field), sort_keys=True) for one in metadata}
        if values != {"null"}:
            out[field] = json.loads(values.pop()) if len(values) == 1 else "mixed"
    return out
