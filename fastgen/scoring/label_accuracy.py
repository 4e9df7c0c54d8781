"""Label accuracy: the official protocol (`metrics.label_accuracy`) per folder, broken down by count and by object."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fastgen.errors import InputError
from fastgen.files.names import ICLEVR_OBJECTS, check_objects, read_objects
from fastgen.models.evaluator import Evaluator
from fastgen.scoring import metrics
from fastgen.scoring.metrics import Share
from fastgen.scoring.options import PathLike
from fastgen.scoring.samples import Ratio


def label_objects(judge: Evaluator, objects: Mapping[str, int] | PathLike | None, requests: Path) -> Mapping[str, int]:
    """Object name -> output of the evaluator, in output order."""
    if objects is not None:
        names = read_objects(objects) if isinstance(objects, str | os.PathLike) else objects
        check_objects(names)
        if judge.objects is not None and dict(names) != dict(judge.objects):
            raise InputError("objects: they differ from those in the evaluator's folder; leave the option out")
    elif judge.objects is not None:
        names = judge.objects
    else:
        beside = requests.parent / "objects.json"
        names = read_objects(beside) if beside.exists() else ICLEVR_OBJECTS
    if len(names) != judge.num_labels:
        counts = f"the evaluator has {judge.num_labels} outputs, the list of objects {len(names)}"
        raise InputError(f"{counts}: expected one for each")
    return dict(sorted(names.items(), key=lambda item: item[1]))


def label_sample(scores: np.ndarray, targets: np.ndarray) -> Ratio:
    """Hits among each image's top k over its k labels; scores and targets (N, K)."""
    hits = metrics.label_hits(scores, targets)
    return Ratio(hits.sum(axis=1), np.count_nonzero(targets, axis=1))


def breakdowns(
    scores: Sequence[np.ndarray], targets: np.ndarray, objects: Sequence[str]
) -> tuple[dict[int, Share], dict[str, Share]]:
    """(number of objects in the image -> Share, requested object -> Share), all folders together."""
    all_scores, all_targets = np.concatenate(scores), np.tile(targets, (len(scores), 1))  # (S N, K) both
    by_object = zip(objects, metrics.accuracy_by_object(all_scores, all_targets), strict=True)
    return metrics.accuracy_by_count(all_scores, all_targets), {name: share for name, share in by_object if share.total}
