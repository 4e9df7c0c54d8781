"""Attributes: the share of images that show the requested value, for each attribute and on average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fastgen.data.attributes import MEAN, Attributes, check_complete, labels_of, outputs, read_attributes
from fastgen.files.jsonfiles import brief, located
from fastgen.generate.requests import Request
from fastgen.scoring.metrics import Share, attribute_hits
from fastgen.scoring.samples import Mean, Sample


def attribute_targets(path: Path, requests: Sequence[Request], attributes: Attributes) -> np.ndarray:
    """The requested values, multi-hot (N, K) float32, one of each attribute of the evaluator. The key of an entry is that of
    the request, else the name of its image without .png. InputError for requests without an entry, and for values that the
    evaluator does not know."""
    entries, objects = read_attributes(path), outputs(attributes)
    keys = [r.id if r.id in entries else r.image_name.removesuffix(".png") for r in requests]
    check_complete(path, entries, keys, "requests")
    rows = np.zeros((len(keys), len(objects)), np.float32)  # (N, K)
    for row, key in zip(rows, keys, strict=True):
        with located(f"{path}: key {brief(key)}"):
            row[[objects[text] for text in labels_of(entries[key], attributes)]] = 1
    return rows


def metric_names(attributes: Attributes) -> tuple[str, ...]:
    """The mean over all attributes comes first: it is the default metric of a sweep."""
    return (MEAN, *attributes)


def attribute_samples(
    scores: Sequence[np.ndarray], targets: np.ndarray, attributes: Attributes
) -> dict[str, tuple[Sample, ...]]:
    """Metric -> a sample for each folder; scores (N, K) of each folder."""
    sizes = [len(values) for values in attributes.values()]
    hits = [attribute_hits(folder, targets, sizes).astype(np.float64) for folder in scores]  # (N, A) each
    samples: dict[str, tuple[Sample, ...]] = {MEAN: tuple(Mean(folder.mean(axis=1)) for folder in hits)}
    return samples | {name: tuple(Mean(folder[:, i]) for folder in hits) for i, name in enumerate(attributes)}


def value_shares(scores: Sequence[np.ndarray], targets: np.ndarray, attributes: Attributes) -> Mapping[str, Share]:
    """Label of a value, such as "colour: red" -> how many of the images requested with it show it, all folders together."""
    sizes = [len(values) for values in attributes.values()]
    hits = np.concatenate([attribute_hits(folder, targets, sizes) for folder in scores])  # (S N, A)
    correct = np.repeat(hits, sizes, axis=1) * np.tile(targets, (len(scores), 1))  # (S N, K)
    totals = len(scores) * np.count_nonzero(targets, axis=0)  # (K,)
    shares = zip(outputs(attributes), np.count_nonzero(correct, axis=0), totals, strict=True)
    return {text: Share(int(hit), int(total)) for text, hit, total in shares if total}
