"""The options of scoring, checked before torch is imported."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from fastgen.errors import FastgenError, InputError
from fastgen.files.installing import hint

MEASURES = (
    "--evaluator E (label accuracy, attributes), --reference DIR --features inception.pth|evaluator (FID, KID), "
    "--clip C (CLIP-T; with --reference CLIP-I)"
)
PathLike = str | os.PathLike[str]
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """The keyword arguments of `fastgen.score` and `Scorer`: what is measured, and with which networks.

    evaluator: what `evaluator.load` reads; gives label accuracy by the official protocol (`metrics.label_accuracy`).
    objects: name -> output of the evaluator, or a JSON file of that; by default what the evaluator's folder says, else
    objects.json beside the requests, else the 24 objects of i-CLEVR.
    With an evaluator of attributes: for requests with prompts the share of images that show the requested value of each
    attribute, and `attributes`, the mean over all of them.
    attributes: the requested values, {"0_main": {"body": "cat", ...}, ...} by the requests' keys; by default attributes.json
    beside the requests.
    reference: a folder of images, or a dataset. features: "evaluator", or a file with the weights of FID's Inception
    (`inception.load_inception`); gives FID and KID against the reference, whose features are kept in the cache.
    clip: a CLIP folder, or a hub id (fetched only with `download`); gives CLIP-T, the mean cosine of image and prompt, and,
    where the reference has images of the same names, CLIP-I, the mean cosine of the two images.
    allow_pickle: also read .pth and .bin files (weights only). batch_size: images per batch.
    device: "cpu", "cuda", ...; the GPU if there is one.

    Raises InputError for a combination that measures nothing or lacks a part.
    """

    evaluator: PathLike | None = None
    reference: PathLike | None = None
    features: PathLike | None = None
    clip: PathLike | None = None
    objects: Mapping[str, int] | PathLike | None = None
    attributes: PathLike | None = None
    allow_pickle: bool = False
    download: bool = False
    batch_size: int = 64
    device: str | None = None

    def __post_init__(self) -> None:
        evaluator, reference, features, clip = self.evaluator, self.reference, self.features, self.clip
        if self.batch_size < 1:
            raise InputError(f"batch_size = {self.batch_size}: expected at least 1")
        if features is not None and reference is None:
            raise InputError("--features are for FID and KID, which need --reference DIR: images to compare with")
        if reference is not None and features is None and clip is None:
            uses = "FID and KID (add --features evaluator, or inception.pth) and --clip"
            raise InputError(f"--reference is used by {uses}")
        if evaluator is None and features is None and clip is None:
            raise InputError(f"nothing to measure: give {MEASURES}")
        if self.attributes is not None and evaluator is None:
            raise InputError("--attributes holds what an evaluator of attributes judges: add --evaluator E")
        if str(features) == "evaluator" and evaluator is None:
            raise InputError("--features evaluator needs the evaluator: --evaluator E")


def takes_options(function: Function) -> Function:
    """Shows the fields of ScoringOptions in the signature of `function(..., **options)`."""
    signature = inspect.signature(function)
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    parameters += inspect.signature(ScoringOptions).parameters.values()
    function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return function


def need(module: str) -> Any:
    """The imported module; FastgenError that says what to install where a package is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise FastgenError(f"scoring needs {error.name}, which is not installed: {hint('score')}") from None
