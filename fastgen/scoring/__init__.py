"""Scoring generated images: label accuracy, attributes, FID, KID, CLIP-T, CLIP-I, in one pass; and comparing two runs."""

from __future__ import annotations

from typing import Any

from fastgen.scoring.comparison import Comparison, compare
from fastgen.scoring.generated_images import Paths
from fastgen.scoring.options import PathLike, ScoringOptions, need, takes_options
from fastgen.scoring.result import Figure, Score

__all__ = ["Comparison", "Figure", "Score", "Scorer", "compare", "score"]


@takes_options
def score(images: Paths, requests: PathLike | None = None, **options: Any) -> Score:
    """Score generated images by every metric that the options ask for, in one pass over them.

    images: a folder with `<image_name>` for every request (without requests: its PNG files), or several of them, one per
    seed; standard errors are then over seeds, else over the images of the one folder. Images are read as RGB; an image that
    has not the size of a network is resized, and the result says how.
    options: the fields of `fastgen.scoring.options.ScoringOptions`, which explains them.
    To score many runs, or to compare two (`compare`), build a `Scorer` with the same options: it loads the networks and
    reads the reference once.

    Raises InputError for a combination of options that measures nothing, requests of the wrong kind, objects the evaluator
    does not know, images that are missing, not readable or generated for other requests, fewer than two images for FID, and
    files of the wrong format; FastgenError without torch, torchmetrics or transformers, and for NaN.
    """
    ScoringOptions(**options)
    return need("fastgen.scoring.scorer").Scorer(**options).score(images, requests)


def __getattr__(name: str) -> Any:
    """`Scorer` is imported when it is used: it needs torch."""
    if name != "Scorer":
        raise AttributeError(f"module 'fastgen.scoring' has no attribute {name!r}")
    return need("fastgen.scoring.scorer").Scorer
