"""Scoring generated images: label accuracy, attributes, FID, KID, CLIP-T, CLIP-I, in one pass; and comparing two runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from fastgen.scoring.comparison import Comparison, compare
from fastgen.scoring.images import Paths
from fastgen.scoring.options import check_options, need
from fastgen.scoring.result import Figure, Score

__all__ = ["Comparison", "Figure", "Score", "Scorer", "compare", "score"]

PathLike = str | os.PathLike[str]


def score(
    images: Paths,
    requests: PathLike | None = None,
    *,
    evaluator: PathLike | None = None,
    reference: PathLike | None = None,
    features: PathLike | None = None,
    clip: PathLike | None = None,
    objects: Mapping[str, int] | PathLike | None = None,
    attributes: PathLike | None = None,
    allow_pickle: bool = False,
    download: bool = False,
    batch_size: int = 64,
    device: str | None = None,
) -> Score:
    """Score generated images by every metric that the arguments ask for, in one pass over them.

    images: a folder with `<image_name>` for every request (without requests: its PNG files), or several of them, one per
    seed; standard errors are then over seeds, else over the images of the one folder. To score many runs, or to compare two
    (`compare`), build a `Scorer` with the same arguments: networks are loaded and the reference is read once.
    evaluator: what `evaluator.load` reads; gives label accuracy by the official protocol (`metrics.label_accuracy`).
    objects: name -> output of the evaluator, or a JSON file of that; by default what the evaluator's folder says, else
    objects.json beside the requests, else the 24 objects of i-CLEVR.
    With an evaluator of attributes: for requests with prompts the share of images with the value that was asked for, of each
    attribute, and `attributes`, the mean over all of them.
    attributes: what was asked for, {"0_main": {"body": "cat", ...}, ...} by the requests' keys; by default attributes.json
    beside the requests.
    reference: a folder of images, or a dataset. features: "evaluator", or a file with the weights of FID's Inception
    (`inception.load_inception`); gives FID and KID against the reference, whose features are kept in the cache.
    clip: a CLIP folder, or a hub id (fetched only with `download`); gives CLIP-T, the mean cosine of image and prompt, and,
    where the reference has images of the same names, CLIP-I, the mean cosine of the two images.
    Images are read as RGB; one that has not the size of a network is resized, and the result says how.
    device: "cpu", "cuda", ...; the GPU if there is one.

    Raises InputError for a combination of arguments that measures nothing, requests of the wrong kind, objects the evaluator
    does not know, images that are missing, not readable or generated for other requests, fewer than two images for FID, and
    files that are not what they should be; FastgenError without torch, torchmetrics or transformers, and for NaN.
    """
    given: dict[str, Any] = {"evaluator": evaluator, "reference": reference, "features": features, "clip": clip}
    check_options(**given, attributes=attributes, batch_size=batch_size)
    scorer = need("fastgen.scoring.scorer").Scorer(
        evaluator=evaluator,
        reference=reference,
        features=features,
        clip=clip,
        objects=objects,
        attributes=attributes,
        allow_pickle=allow_pickle,
        download=download,
        batch_size=batch_size,
        device=device,
    )
    return scorer.score(images, requests)


def __getattr__(name: str) -> Any:
    """`Scorer` is imported when it is used: it needs torch."""
    if name != "Scorer":
        raise AttributeError(f"module 'fastgen.scoring' has no attribute {name!r}")
    return need("fastgen.scoring.scorer").Scorer
