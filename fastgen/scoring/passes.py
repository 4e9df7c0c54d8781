"""One pass over a folder: every image is decoded once and given to every network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastgen.generate.requests import Request
from fastgen.scoring.generated_images import check_made_for, metadata_of, read_image
from fastgen.scoring.networks import FeatureNetwork, extract


@dataclass(frozen=True, eq=False)
class FolderPass:
    """The result of a pass over one folder of N images."""

    features: Mapping[str, np.ndarray]  # network -> (N, D)
    resized: Mapping[str, int]  # network -> images that did not have its size
    metadata: tuple[Mapping[str, Any] | None, ...]  # (N,) of the images


def one_pass(
    folder: Path,
    names: Sequence[str],
    requests: Sequence[Request] | None,
    networks: Mapping[str, FeatureNetwork],
    batch_size: int,
) -> FolderPass:
    """Decode, check and embed the images `names` of a folder. InputError for one that cannot be read, or that says it was
    generated for another request."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in networks}
    resized = dict.fromkeys(networks, 0)
    metadata: list[dict[str, Any] | None] = []
    for start in range(0, len(names), batch_size):
        paths = [folder / name for name in names[start : start + batch_size]]
        images = [read_image(path) for path in paths]
        for row, (path, image) in enumerate(zip(paths, images, strict=True), start):
            metadata.append(metadata_of(image, path))
            if requests is not None:
                check_made_for(metadata[-1], path, requests[row])
        for name, network in networks.items():
            features, count = extract(network, images)
            parts[name].append(features)
            resized[name] += count
    return FolderPass({name: np.concatenate(part) for name, part in parts.items()}, resized, tuple(metadata))
