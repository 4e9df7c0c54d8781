"""The index of a training set, a folder that `indexing.build_index` writes: search in it, and the start of a run from it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from msgspec import Meta

from fastgen.data.images import Mode
from fastgen.errors import InputError
from fastgen.files.hashes import FileRecord, check_file, sha256_file, sha256_json
from fastgen.files.jsonfiles import MAX_DATA_BYTES, brief, read_json, read_jsonl
from fastgen.files.names import check_relative
from fastgen.files.npy import map_array
from fastgen.files.records import Count, Edge, Name, Record, Width, to_record
from fastgen.generate.conditions import pooled_states
from fastgen.generate.requests import Request, resolve_seed
from fastgen.retrieval.nearest import nearest_rows, unit

if TYPE_CHECKING:
    from fastgen.generate.runner import ModelRunner
    from fastgen.models.spec import Spec

FORMAT_VERSION = 1
MANIFEST = "index.json"
EMBEDDINGS, LATENTS, THUMBNAILS, PAIRS = "embeddings.npy", "latents.npy", "thumbnails.npy", "pairs.npy"
IMAGES = "images.jsonl"
MAPPED = (LATENTS, THUMBNAILS)  # large files: their sizes are verified, not their hashes
COMMAND = "fastgen index DATA --model MODEL --out INDEX"
HELP = "build the index again"
Images = Annotated[int, Meta(ge=1, le=100_000_000)]
Finite = Annotated[float, Meta(ge=0, le=1e9)]
TextChoice = Literal["caption", "description"]
FrameChoice = Literal["all", "first"]


class Counts(Record, frozen=True):
    images: Images
    texts: Images
    pairs: Images


class Thresholds(Record, frozen=True):
    """Of near copies, see `copies.calibrate`."""

    distance: Finite
    ratio: Finite
    median_distance_to_another_subject: Finite
    percentile: Finite
    sample: Count
    subjects: Count


class IndexImage(Record, frozen=True):
    """An image of the training set. `id`: its path below the data folder."""

    id: Name
    group: Name
    subject: Count

    def __post_init__(self) -> None:
        check_relative(self.id, "id")


class IndexRecord(Record, frozen=True):
    """index.json: what an index depends on, its sizes, and its files."""

    format_version: Literal[1]
    component_sha256: dict[Name, Name]
    model_sha256: Name
    latent_shape: tuple[Width, Edge, Edge]
    scaling_factor: Annotated[float, Meta(gt=0, le=1e6)]
    image_size: Edge
    image_mode: Mode
    text: TextChoice
    frames: FrameChoice
    data_sha256: Name
    fastgen: Name
    engine: Name
    dtype: dict[Name, Name | None]
    counts: Counts
    width: Width
    thumbnail_size: Annotated[int, Meta(ge=1, le=256)]
    copies: Thresholds | None
    notes: tuple[str, ...]
    files: dict[Name, FileRecord]

    def __post_init__(self) -> None:
        if self.files.keys() != {EMBEDDINGS, LATENTS, THUMBNAILS, PAIRS, IMAGES}:
            names = ", ".join((EMBEDDINGS, LATENTS, THUMBNAILS, PAIRS, IMAGES))
            raise InputError(f"files: found {brief(list(self.files))}, expected {names}")


@dataclass(frozen=True, eq=False)
class Index:
    """An open index of T distinct texts and N images. `info`: index.json; `sha256`: its hash, which covers all files."""

    folder: Path
    info: IndexRecord
    sha256: str
    embeddings: np.ndarray  # (T, D) float32, unit length
    latents: np.ndarray  # (N, C, h, w) float16: the VAE's mean x scaling factor
    thumbnails: np.ndarray  # (N, s, s, 3) uint8
    pairs: np.ndarray  # (P, 2) int32: (text, image that it describes), sorted

    def __len__(self) -> int:
        """The number of images."""
        return len(self.latents)

    @property
    def text(self) -> TextChoice:
        return self.info.text

    @cached_property
    def images(self) -> list[IndexImage]:
        path = self.folder / IMAGES
        try:
            return [
                to_record(value, IndexImage, f"{path}: line {line}") for line, value in read_jsonl(path, MAX_DATA_BYTES)
            ]
        except InputError as error:
            raise InputError(f"{error}; {HELP}") from None

    def check(self, spec: Spec) -> None:
        """InputError unless the index was built with this model's text encoder and VAE."""
        if spec.condition.text is None:
            raise InputError(f"{self.folder}: an index is for models of text; this model takes {spec.condition.takes}")
        if other := foreign_network(self.info, spec.component_sha256, spec.sha256):
            name, ours, theirs = other
            raise self._foreign(f"another {name} ({ours[:12]}; this model's is {theirs[:12]})")
        shape = self.info.latent_shape
        if shape != spec.space.shape:
            raise self._foreign(f"latents of shape {shape}; this model's are {spec.space.shape}")
        if not np.isclose(self.info.scaling_factor, spec.space.scaling_factor, rtol=1e-6):
            raise self._foreign(
                f"scaling factor {self.info.scaling_factor}; this model's is {spec.space.scaling_factor}"
            )

    def _foreign(self, what: str) -> InputError:
        return InputError(f"{self.folder}: was built with {what}; build one for this model: `{COMMAND}`")

    def nearest(self, queries: np.ndarray, k: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """The k images whose texts are nearest by cosine: (rows (Q, k) int64, similarities (Q, k) float64), best first.

        `queries` (Q, D), of any length but zero. Among equal similarities the text that comes first wins, then the first of
        its images. A larger k than the number of images counts as that number. Raises InputError for queries of another width,
        zero, or not finite.
        """
        if queries.ndim != 2 or queries.shape[1] != self.embeddings.shape[1]:
            raise InputError(f"queries of shape {queries.shape}, expected (Q, {self.embeddings.shape[1]})")
        queries = unit(queries, "the query")
        k = min(k, len(self))
        texts = min(1 + (k - 1) * self._texts_per_image, len(self.embeddings))  # so many always have k distinct images
        rows = np.empty((len(queries), k), np.int64)
        similarities = np.empty((len(queries), k))
        for q, (nearest, values) in enumerate(nearest_rows(self.embeddings, queries, texts)):
            images, which = self._distinct_images(nearest, k)
            rows[q], similarities[q] = images, values[which]
        return rows, similarities

    def start(self, pipeline: ModelRunner, requests: Sequence[Request], *, seed: int, top_k: int = 1) -> Retrieval:
        """The start of a run from this index, see `Retrieval`."""
        return Retrieval(self, pipeline, requests, seed=seed, top_k=top_k)

    def _distinct_images(self, texts: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The first k distinct images of these texts, and for each the position of its text among them."""
        parts = [self.pairs[self._offsets[t] : self._offsets[t + 1], 1] for t in texts]
        images = np.concatenate(parts)
        first = np.sort(np.unique(images, return_index=True)[1])[:k]
        return images[first], np.repeat(np.arange(len(parts)), [len(part) for part in parts])[first]

    @cached_property
    def _offsets(self) -> np.ndarray:
        """(T + 1,): where each text's pairs begin."""
        return np.searchsorted(self.pairs[:, 0], np.arange(len(self.embeddings) + 1))

    @cached_property
    def _texts_per_image(self) -> int:
        return int(np.bincount(self.pairs[:, 1]).max())


def foreign_network(
    info: IndexRecord, component_sha256: Mapping[str, str], model_sha256: str
) -> tuple[str, str, str] | None:
    """(name, hash in the index, hash of the model) of the first network that differs from the one an index was built with.
    Where one side has no hashes of single networks, such as an older bundle, the whole model's are compared."""
    for field, name in (("text_encoder", "text encoder"), ("vae", "VAE")):
        ours, theirs = info.component_sha256.get(field), component_sha256.get(field)
        if ours is None or theirs is None:
            name, ours, theirs = "model", info.model_sha256, model_sha256
        if ours != theirs:
            return name, ours, theirs
    return None


class Retrieval:
    """A `start.Start`: for every request one of its `top_k` nearest training images, drawn by the request's seed alone.

    `seed`: the base of the requests' seeds. The first call of `latents` or `record` embeds all texts. Raises InputError for an
    index of another model, and a `top_k` below 1.
    """

    def __init__(
        self, index: Index, pipeline: ModelRunner, requests: Sequence[Request], *, seed: int, top_k: int = 1
    ) -> None:
        if top_k < 1:
            raise InputError(f"rag_top_k is {top_k}, expected at least 1")
        index.check(pipeline.spec)
        self._index, self._pipeline, self._seed, self._top_k = index, pipeline, seed, top_k
        self._queries = [query(r, index.text) for r in requests]
        self._requests = requests

    @property
    def identity(self) -> dict[str, Any]:
        queries = sha256_json(self._queries)
        return {"rag_sha256": self._index.sha256, "rag_top_k": self._top_k, "queries_sha256": queries}

    @cached_property
    def texts(self) -> list[str]:
        return list(dict.fromkeys(self._queries))

    @cached_property
    def nearest(self) -> dict[Request, tuple[int, float]]:
        """The training image of every request: its row in the index, and the cosine similarity of its text."""
        states = pooled_states(self._pipeline.engine, self._pipeline.tokenizers, self.texts)
        rows, similarities = self._index.nearest(states, self._top_k)  # (Q, k)
        numbers = {text: i for i, text in enumerate(self.texts)}
        queries = zip(self._requests, self._queries, strict=True)
        places = {r: (numbers[text], self._draw(r, rows.shape[1])) for r, text in queries}
        drawn = np.unique([rows[place] for place in places.values()])
        for row in drawn:
            if not np.isfinite(self._index.latents[row]).all():
                raise InputError(f"{self._index.folder / LATENTS}: row {row} is not finite; {HELP}")
        return {r: (int(rows[place]), float(similarities[place])) for r, place in places.items()}

    def latents(self, requests: Sequence[Request]) -> np.ndarray:
        """Clean latents (B, C, h, w) float32."""
        return self._index.latents[[self.nearest[r][0] for r in requests]].astype(np.float32)

    def record(self, request: Request) -> dict[str, Any]:
        """The manifest's fields of a request: its training image's id, and the similarity."""
        row, similarity = self.nearest[request]
        return {"retrieved": self._index.images[row].id, "similarity": round(similarity, 6)}

    def _draw(self, request: Request, count: int) -> int:
        """One of `count`, by the request's seed."""
        digest = hashlib.sha256(f"retrieve:{resolve_seed(request, self._seed)}".encode()).digest()
        return int.from_bytes(digest, "big") % count


def query(request: Request, text: TextChoice) -> str:
    """The text that a request is looked up by: its description, if the index has descriptions and the request has one."""
    alone = request.description if text == "description" else None
    return alone or request.prompt or ""


def is_index(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def read_info(folder: Path) -> IndexRecord:
    """index.json. Raises InputError when it is missing, malformed, or of another format."""
    path = folder / MANIFEST
    if not os.path.lexists(path):
        raise InputError(f"{folder}: is no index ({MANIFEST} is missing); make one: `{COMMAND}`")
    value = read_json(path)
    version = value.get("format_version") if isinstance(value, dict) else None
    if version != FORMAT_VERSION:
        found = f"format_version is {brief(version)}"
        raise InputError(f"{path}: {found}, this fastgen reads {FORMAT_VERSION}; build it again")
    try:
        return to_record(value, IndexRecord, path)
    except InputError as error:
        raise InputError(f"{error}; build it again") from None


def open_index(folder: str | os.PathLike[str]) -> Index:
    """Open an index; latents and thumbnails are mapped, not read.

    Raises InputError for a folder that is no index, and for files that are missing, truncated, altered, or of another shape.
    """
    folder = Path(folder)
    info = read_info(folder)
    for name, record in info.files.items():
        check_file(folder / name, record, MANIFEST, HELP, content=name not in MAPPED)
    images, texts, side = info.counts.images, info.counts.texts, info.thumbnail_size
    embeddings = map_array(folder / EMBEDDINGS, "float32", (texts, info.width), HELP)
    latents = map_array(folder / LATENTS, "float16", (images, *info.latent_shape), HELP)
    thumbnails = map_array(folder / THUMBNAILS, "uint8", (images, side, side, 3), HELP)
    pairs = map_array(folder / PAIRS, "int32", (info.counts.pairs, 2), HELP)
    lengths = np.linalg.norm(embeddings, axis=1)
    if not (np.abs(lengths - 1) < 1e-3).all():
        raise InputError(f"{folder / EMBEDDINGS}: found a row that is not of length 1; {HELP}")
    if pairs.min() < 0 or pairs[:, 1].max() >= images or not np.array_equal(np.unique(pairs[:, 0]), np.arange(texts)):
        raise InputError(f"{folder / PAIRS}: found a text or an image that the index does not have, or lacks; {HELP}")
    if (np.diff(pairs[:, 0]) < 0).any():
        raise InputError(f"{folder / PAIRS}: its texts are not sorted; {HELP}")
    index = Index(folder, info, sha256_file(folder / MANIFEST), embeddings, latents, thumbnails, pairs)
    if len(index.images) != images:
        raise InputError(f"{folder / IMAGES}: found {len(index.images)} images, expected {images}; {HELP}")
    return index
