"""The reference set: its images, and their features, which the cache keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fastgen.data.cache import cached, read_array
from fastgen.data.dataset import files_in
from fastgen.data.images import open_image
from fastgen.data.readers import FORMATS, read_dataset
from fastgen.errors import InputError
from fastgen.files.hashes import sha256_file, sha256_names
from fastgen.files.jsonfiles import write_json
from fastgen.files.names import CONTACT_SHEET
from fastgen.files.records import Count, read_record
from fastgen.scoring.networks import FeatureNetwork, extract

CACHE = "scoring"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
CHUNK = 4096


@dataclass(frozen=True)
class ReferenceImages:
    """Images that generated ones are compared with, in the order of their paths."""

    path: Path
    files: tuple[Path, ...]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names and contents of the files."""
        return self.fingerprint_of(self.files)

    def fingerprint_of(self, files: Sequence[Path]) -> str:
        try:
            return sha256_names({f.relative_to(self.path).as_posix(): sha256_file(f) for f in sorted(files)})
        except OSError as error:
            raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from None

    def files_by_name(self, names: Sequence[str]) -> dict[str, Path]:
        """Those of `names` that the reference has: the name of its file, or its path below the reference."""
        by_name = {file.name: file for file in self.files}
        by_name |= {file.relative_to(self.path).as_posix(): file for file in self.files}
        return {name: by_name[name] for name in names if name in by_name}


@dataclass(frozen=True, eq=False)
class Statistics:
    """Features of M images, (M, D) float32, with their sums, which determine mean and covariance."""

    features: np.ndarray
    total: np.ndarray  # (D,) float64: sum of the features
    products: np.ndarray  # (D, D) float64: sum of their outer products
    resized: int = 0  # images that did not have the network's size

    @classmethod
    def of(cls, features: np.ndarray, resized: int = 0) -> Statistics:
        parts = [features[i : i + CHUNK].astype(np.float64) for i in range(0, len(features), CHUNK)]
        return cls(features, sum(x.sum(axis=0) for x in parts), sum(x.T @ x for x in parts), resized)  # type: ignore[arg-type]

    @property
    def mean(self) -> np.ndarray:
        return self.total / len(self.features)

    @cached_property
    def covariance(self) -> np.ndarray:
        """(D, D), divided by M - 1."""
        mean = self.mean
        return (self.products - len(self.features) * np.outer(mean, mean)) / (len(self.features) - 1)

    @cached_property
    def root(self) -> np.ndarray:
        """The symmetric square root of the covariance, (D, D)."""
        values, vectors = np.linalg.eigh(self.covariance)
        return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def read_reference(path: Path) -> ReferenceImages:
    """A dataset folder (all its images), or a folder of images; InputError where it holds none."""
    if not path.is_dir():
        raise InputError(f"{path}: no such folder, expected reference images or a dataset")
    if any(format_.recognise(path) for format_ in FORMATS):
        files = {example.image for example in read_dataset(path).examples}
    else:
        names = (name for name in files_in(path) if name.lower().endswith(SUFFIXES) and name != CONTACT_SHEET)
        files = {path / name for name in names}
    if not files:
        raise InputError(f"{path}: holds no images ({', '.join(SUFFIXES)}) and is no dataset; expected a reference")
    return ReferenceImages(path, tuple(sorted(files)))


def reference_statistics(reference: ReferenceImages, network: FeatureNetwork, batch_size: int) -> Statistics:
    """The network's features of all images and their sums; from the cache when weights and images are the same."""
    return _cached(reference, reference.files, reference.fingerprint, network, batch_size)


def named_features(
    reference: ReferenceImages, files: Mapping[str, Path], network: FeatureNetwork, batch_size: int
) -> np.ndarray:
    """The network's features (N, D) of some of the reference's images, in the order of `files`; from the cache too."""
    distinct = sorted(set(files.values()))
    rows = {file: row for row, file in enumerate(distinct)}
    statistics = _cached(reference, distinct, reference.fingerprint_of(distinct), network, batch_size)
    return np.asarray(statistics.features)[[rows[file] for file in files.values()]]


def _cached(
    reference: ReferenceImages, files: Sequence[Path], fingerprint: str, network: FeatureNetwork, batch_size: int
) -> Statistics:
    def write(folder: Path) -> None:
        parts, resized = [], 0
        with tqdm(total=len(files), desc=f"{reference.path}: {network.name} features", disable=None) as bar:
            for start in range(0, len(files), batch_size):
                images = [open_image(file) for file in files[start : start + batch_size]]
                features, count = extract(network, images)
                parts.append(features)
                resized += count
                bar.update(len(images))
        statistics = Statistics.of(np.concatenate(parts), resized)
        for name in ("features", "total", "products"):
            np.save(folder / f"{name}.npy", getattr(statistics, name))
        write_json(folder / "resized.json", resized)

    fields = {"images": fingerprint, "weights": network.fingerprint, "preprocessing": network.preprocessing}
    folder = cached("features", fields, write, CACHE)
    features, total, products = (read_array(folder, name) for name in ("features", "total", "products"))
    return Statistics(features, total, products, read_record(folder / "resized.json", Count))
