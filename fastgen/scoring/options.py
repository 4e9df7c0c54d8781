"""What was asked for: checked before anything heavy is imported."""

from __future__ import annotations

import importlib
from typing import Any

from fastgen.errors import FastgenError, InputError
from fastgen.installing import hint

ASK = (
    "--evaluator E (label accuracy, attributes), --reference DIR --features inception.pth|evaluator (FID, KID), "
    "--clip C (CLIP-T; with --reference CLIP-I)"
)


def check_options(
    *, evaluator: Any, reference: Any, features: Any, clip: Any, batch_size: int, attributes: Any = None
) -> None:
    """InputError for a combination of options that measures nothing or lacks a part."""
    if batch_size < 1:
        raise InputError(f"batch_size = {batch_size}: expected at least 1")
    if features is not None and reference is None:
        raise InputError("--features are for FID and KID, which need --reference DIR: images to compare with")
    if reference is not None and features is None and clip is None:
        raise InputError("--reference is used by FID and KID (add --features evaluator, or inception.pth) and --clip")
    if evaluator is None and features is None and clip is None:
        raise InputError(f"nothing to measure: give {ASK}")
    if attributes is not None and evaluator is None:
        raise InputError("--attributes is what an evaluator of attributes is asked about: add --evaluator E")
    if str(features) == "evaluator" and evaluator is None:
        raise InputError("--features evaluator needs the evaluator: --evaluator E")


def need(module: str) -> Any:
    """The imported module; FastgenError that says what to install where a package is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise FastgenError(f"scoring needs {error.name}, which is not installed: {hint('score')}") from None
