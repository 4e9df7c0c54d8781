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
    asked: Path | None,
    for_features: bool,
) -> bool:
    """Whether images of these requests, read from `path`, are judged by an evaluator of `attributes` (None: of objects).

    asked: the file with the requested values, where the user names one. for_features: the evaluator also computes features
    for FID and KID, so that it need not judge. InputError where it is there for judging alone, and cannot judge.
    """
    if requests and path and requests[0].kind == ("text" if attributes else "labels"):
        known = attributes is None or asked is not None or path.with_name(FILE).is_file()
        return known or not for_features
    if for_features and asked is None:
        return False
    what = "attributes need" if attributes else "label accuracy needs"
    if path is None:
        raise InputError(f"{what} the requests that the images were generated from: give --requests")
    if attributes:
        raise InputError(f"{path}: holds labels; {what} requests with prompts; an evaluator of objects judges labels")
    example = 'such as [["red cube"], ...], or --evaluator FOLDER of an evaluator of attributes'
    raise InputError(f"{path}: holds prompts; {what} requests with labels, {example}")


def asked_file(given: Path | None, requests: Path) -> Path:
    """The file with the requested values: `given`, else attributes.json beside the requests. InputError where there is
    none."""
    path = given or requests.with_name(FILE)
    if not path.is_file():
        hint = "" if given else ", which says what was asked for, by the requests' keys; give --attributes FILE"
        raise InputError(f"{path}: no such file{hint}")
    return path
