"""The index of a training set, a folder that `indexing.build_index` writes: search in it, and the start of a run from it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from fastgen.errors import InputError
from fastgen.files.hashes import check_file, sha256_file, sha256_json
from fastgen.files.jsonfiles import read_json
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
TextChoice = Literal["caption", "description"]
FrameChoice = Literal["all", "first"]


@dataclass(frozen=True, eq=False)
class Index:
    """An open index of T distinct texts and N images. `info`: index.json; `sha256`: its hash, which covers all files."""

    folder: Path
    info: Mapping[str, Any]
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
        return self.info["text"]

    @cached_property
    def images(self) -> list[dict[str, Any]]:
        """Of every image {"id": its path below the data folder, "group", "subject"}."""
        lines = (self.folder / IMAGES).read_text(encoding="utf-8").splitlines()
        return json.loads(f"[{','.join(lines)}]")

    def check(self, spec: Spec) -> None:
        """InputError unless the index was built with this model's text encoder and VAE."""
        if spec.condition.text is None:
            raise InputError(f"{self.folder}: an index is for models of text; this model takes {spec.condition.takes}")
        if other := foreign_network(self.info, spec.component_sha256, spec.sha256):
            name, ours, theirs = other
            raise self._foreign(f"another {name} ({ours[:12]}; this model's is {theirs[:12]})")
        shape = tuple(self.info["latent_shape"])
        if shape != spec.space.shape:
            raise self._foreign(f"latents of shape {shape}; this model's are {spec.space.shape}")
        if not np.isclose(self.info["scaling_factor"], spec.space.scaling_factor, rtol=1e-6):
            raise self._foreign(
                f"scaling factor {self.info['scaling_factor']}; this model's is {spec.space.scaling_factor}"
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
    info: Mapping[str, Any], component_sha256: Mapping[str, str], model_sha256: str
) -> tuple[str, str, str] | None:
    """(name, hash in the index, hash of the model) of the first network that differs from the one an index was built with.
    Where one side has no hashes of single networks, such as an older bundle, the whole model's are compared."""
    for field, name in (("text_encoder", "text encoder"), ("vae", "VAE")):
        ours, theirs = info["component_sha256"].get(field), component_sha256.get(field)
        if ours is None or theirs is None:
            name, ours, theirs = "model", info["model_sha256"], model_sha256
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
        return {r: (int(rows[place]), float(similarities[place])) for r, place in places.items()}

    def latents(self, requests: Sequence[Request]) -> np.ndarray:
        """Clean latents (B, C, h, w) float32."""
        return self._index.latents[[self.nearest[r][0] for r in requests]].astype(np.float32)

    def record(self, request: Request) -> dict[str, Any]:
        """The manifest's fields of a request: its training image's id, and the similarity."""
        row, similarity = self.nearest[request]
        return {"retrieved": self._index.images[row]["id"], "similarity": round(similarity, 6)}

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


def read_info(folder: Path) -> dict[str, Any]:
    """index.json. Raises InputError when it is missing, malformed, or of another format."""
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"{folder}: is no index ({MANIFEST} is missing); make one: `{COMMAND}`")
    info = read_json(path)
    version = info.get("format_version") if isinstance(info, dict) else None
    if version != FORMAT_VERSION:
        raise InputError(f"{path}: format_version is {version!r}, this fastgen reads {FORMAT_VERSION}; build it again")
    return info


def open_index(folder: str | os.PathLike[str]) -> Index:
    """Open an index; latents and thumbnails are mapped, not read.

    Raises InputError for a folder that is no index, and for files that are missing, truncated, altered, or of another shape.
    """
    folder = Path(folder)
    info = read_info(folder)
    try:
        for name, record in info["files"].items():
            check_file(folder / name, record, MANIFEST, "build the index again", content=name not in MAPPED)
        images, texts, pairs = (info["counts"][key] for key in ("images", "texts", "pairs"))
        side = int(info["thumbnail_size"])
        shapes = {
            EMBEDDINGS: ((texts, info["width"]), "float32"),
            LATENTS: ((images, *info["latent_shape"]), "float16"),
            THUMBNAILS: ((images, side, side, 3), "uint8"),
            PAIRS: ((pairs, 2), "int32"),
        }
        _check_options(folder, info)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{folder / MANIFEST}: malformed ({type(error).__name__}: {error}); build it again") from None
    arrays = [_array(folder / name, shape, dtype) for name, (shape, dtype) in shapes.items()]
    return Index(folder, info, sha256_file(folder / MANIFEST), *arrays)


def _check_options(folder: Path, info: Mapping[str, Any]) -> None:
    """KeyError or TypeError for a field that is missing or of another type, InputError for an unknown choice."""
    for field, choices in (("text", get_args(TextChoice)), ("frames", get_args(FrameChoice))):
        if info[field] not in choices:
            raise InputError(f"{folder / MANIFEST}: {field} is {info[field]!r}, expected one of {', '.join(choices)}")
    for field, kind in (("component_sha256", dict), ("model_sha256", str), ("scaling_factor", float)):
        if not isinstance(info[field], kind):
            raise TypeError(f"{field} is {info[field]!r}")
    for field in ("image_size", "image_mode", "copies"):
        info[field]


def _array(path: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as an array ({error}); build the index again") from None
    if (array.shape, array.dtype) != (shape, np.dtype(dtype)):
        raise InputError(f"{path}: {array.dtype} {array.shape}, expected {dtype} {shape}; build the index again")
    return array
