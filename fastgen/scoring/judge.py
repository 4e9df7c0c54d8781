"""Whether an evaluator can judge images of given requests. An evaluator of objects needs labels; an evaluator of attributes
needs prompts and a file with the requested value of each attribute."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastgen.data.attributes import FILE, Attributes
from fastgen.errors import InputError
from fastgen.generate.requests import Request


def is_judged(
    requests: Sequence[Request] | None,
    path: Path | None,
    attributes: Attributes | None,
    values: Path | None,
    for_features: bool,
) -> bool:
    """Whether an evaluator of `attributes` (None: of objects) judges images of these requests, which were read from `path`.

    values: the file with the requested values, where the user names one. for_features: the evaluator also gives the features
    of FID and KID, so it need not judge. InputError where judging is all that it is for, and it cannot judge.
    """
    if requests and path and requests[0].kind == ("text" if attributes else "labels"):
        return attributes is None or values is not None or path.with_name(FILE).is_file() or not for_features
    if for_features and values is None:
        return False
    what = "attributes need" if attributes else "label accuracy needs"
    if path is None:
        raise InputError(f"{what} the requests that the images were generated from: give --requests")
    if attributes:
        raise InputError(f"{path}: holds labels; {what} requests with prompts; an evaluator of objects judges labels")
    example = 'such as [["red cube"], ...], or --evaluator FOLDER of an evaluator of attributes'
    raise InputError(f"{path}: holds prompts; {what} requests with labels, {example}")


def values_file(path: Path | None, requests: Path) -> Path:
    """The file with the requested values: `path`, else attributes.json beside the requests. InputError for a missing one."""
    file = path or requests.with_name(FILE)
    if not file.is_file():
        hint = "" if path else ", which says what was asked for, by the requests' keys; give --attributes FILE"
        raise InputError(f"{file}: no such file{hint}")
    return file
