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


def asked_attributes(path: Path, requests: Sequence[Request], attributes: Attributes) -> np.ndarray:
    """Multi-hot (N, K) float32 with one value of each attribute of the evaluator. An entry is found by the request's key,
    else by the name of its image without .png. InputError for requests without an entry, and for values that the evaluator
    does not know."""
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
    hits = [attribute_hits(one, targets, sizes).astype(np.float64) for one in scores]  # (N, A) each
    each: dict[str, tuple[Sample, ...]] = {
        name: tuple(Mean(one[:, i]) for one in hits) for i, name in enumerate(attributes)
    }
    return {MEAN: tuple(Mean(one.mean(axis=1)) for one in hits), **each}


def value_shares(scores: Sequence[np.ndarray], targets: np.ndarray, attributes: Attributes) -> Mapping[str, Share]:
    """Label of a value, such as "colour: red" -> how many of the images requested with it show it, all folders together."""
    sizes = [len(values) for values in attributes.values()]
    hits = np.concatenate([attribute_hits(one, targets, sizes) for one in scores])  # (S N, A)
    correct = np.repeat(hits, sizes, axis=1) * np.tile(targets, (len(scores), 1))  # (S N, K)
    totals = len(scores) * np.count_nonzero(targets, axis=0)  # (K,)
    shares = zip(outputs(attributes), np.count_nonzero(correct, axis=0), totals, strict=True)
    return {text: Share(int(hit), int(total)) for text, hit, total in shares if total}
