"""Building an index of a training set: embeddings of its texts, latents of its images."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import numpy as np

from fastgen import __version__
from fastgen.data import Dataset, Example, read_dataset
from fastgen.data.images import Mode, load_images
from fastgen.engines.batches import cut
from fastgen.engines.choose import default_engine
from fastgen.errors import FastgenError, InputError, Say, unknown
from fastgen.files.folders import new_folder
from fastgen.files.hashes import record_files
from fastgen.files.jsonfiles import brief, write_bytes, write_json
from fastgen.files.records import builtins
from fastgen.generate.conditions import pooled_states
from fastgen.models.bundle import is_bundle
from fastgen.models.find import output_folder
from fastgen.models.spec import Spec
from fastgen.retrieval.copies import calibrate, subjects, thumbnails
from fastgen.retrieval.index import (
    EMBEDDINGS,
    FORMAT_VERSION,
    IMAGES,
    LATENTS,
    MANIFEST,
    PAIRS,
    THUMBNAILS,
    FrameChoice,
    Index,
    TextChoice,
    foreign_network,
    is_index,
    open_index,
    read_info,
)
from fastgen.retrieval.nearest import unit

if TYPE_CHECKING:
    from fastgen.engines.base import Engine
    from fastgen.generate.pipeline import Pipeline

ENCODE = 16  # images per forward of the VAE's encoder
LOADED = 8 * ENCODE  # images in memory at a time
THUMBNAIL = 16  # px


@dataclass(frozen=True)
class IndexOptions:
    """The content of an index.

    `text`: what is embedded, a caption as the model was trained on it, or the description without the action. Captions are
    the default: prompts have that form too, and the pose is retrieved with them. `frames`: every frame of an animation, or its
    first. Frames share their texts, so the nearest image is the same; all are the default because any frame can be copied.
    `image_mode`: how images become square, see `load_image`; None for that of the model's training, else "stretch".
    """

    text: TextChoice = "caption"
    frames: FrameChoice = "all"
    image_mode: Mode | None = None

    def __post_init__(self) -> None:
        choices = {"text": get_args(TextChoice), "frames": get_args(FrameChoice), "image_mode": (None, *get_args(Mode))}
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise unknown(field, str(getattr(self, field)), [name for name in allowed if name])


def build_index(
    data: str | os.PathLike[str],
    pipeline: Pipeline,
    out: str | os.PathLike[str],
    options: IndexOptions | None = None,
    *,
    limit: int | None = None,
    progress: bool = True,
    say: Say = lambda line: None,
) -> tuple[Index, bool]:
    """Index the training data in the folder `data` with the text encoder and the VAE of a pipeline; the folder `out` is
    written complete or not at all. `limit`: use the first examples only, so many. `say` gets lines on images and texts that do
    not match, and on an unknown `image_mode`.

    Returns the index, and whether it is new: one of the same data, model and options is kept. Raises InputError for data
    without texts, a model without a text encoder, bad images, and an `out` that holds something else.
    """
    options, out = options or IndexOptions(), Path(out)
    _check_model(pipeline.spec)
    dataset = _examples(read_dataset(data, limit=limit), options)
    for note in dataset.notes:
        say(f"note: {note}")
    mode = options.image_mode or trained_mode(pipeline.spec)
    if mode is None:
        what = "how this model's training made images square is not recorded"
        say(f"note: {what}; they are stretched, unless --image-mode says otherwise")
    identity = _identity(pipeline, dataset, replace(options, image_mode=mode or "stretch"))
    if is_index(out):
        _check_same(out, identity)
        return open_index(out), False
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out}: exists and is no index; choose another --out")
    with new_folder(out) as folder:
        _fill(folder, pipeline, dataset, identity, progress)
    return open_index(out), True


def _examples(dataset: Dataset, options: IndexOptions) -> Dataset:
    """The examples to index. Raises InputError for labels, and for descriptions that the data do not have."""
    if dataset.kind != "text":
        raise InputError(f"{dataset.root}: holds labels; an index needs captions")
    if options.text == "description" and not dataset.examples[0].descriptions:
        raise InputError(f"{dataset.root}: has captions only; descriptions apart from an action need train_info.json")
    if options.frames == "all":
        return dataset
    first: dict[str, Example] = {}
    for example in dataset.examples:
        first.setdefault(example.group, example)
    return replace(dataset, examples=tuple(first.values()))


def indexing_engine(folder: Path, device: str | None) -> str:
    """The engine to build an index with: the default one without plans, as these leave out the VAE's encoder."""
    return default_engine(folder, device, built=False)


def default_folder(model: Path) -> Path:
    """The default folder of a model's index: `output_folder`, but beside a bundle, which an export may replace."""
    return model.with_name("index") if is_bundle(model) else output_folder(model, "index")


def trained_mode(spec: Spec) -> Mode | None:
    """How a model's training made images square; None where that is not recorded."""
    return cast(Mode, spec.image_mode) if spec.image_mode in get_args(Mode) else None


def _identity(pipeline: Pipeline, dataset: Dataset, options: IndexOptions) -> dict[str, Any]:
    """Everything an index depends on: indices with the same values are equal."""
    spec = pipeline.spec
    return {
        "format_version": FORMAT_VERSION,
        "component_sha256": dict(spec.component_sha256),
        "model_sha256": spec.sha256,
        "latent_shape": tuple(spec.space.shape),
        "scaling_factor": spec.space.scaling_factor,
        "image_size": spec.space.image[1],
        "image_mode": options.image_mode,
        "text": options.text,
        "frames": options.frames,
        "data_sha256": dataset.fingerprint,
    }


def _check_same(out: Path, identity: Mapping[str, Any]) -> None:
    """InputError unless the index at `out` has this identity."""
    record = read_info(out)
    info = builtins(record)
    same_networks = foreign_network(record, identity["component_sha256"], identity["model_sha256"]) is None
    for field, value in identity.items():
        if info[field] != value and not (same_networks and field in ("component_sha256", "model_sha256")):
            difference = f"{field} is {brief(info[field])} there and {brief(value)} now"
            raise InputError(f"{out}: holds another index: {difference}; delete it, or choose another --out")


def _fill(folder: Path, pipeline: Pipeline, dataset: Dataset, identity: Mapping[str, Any], progress: bool) -> None:
    texts, pairs = _texts(dataset.examples, identity["text"])
    with _bar(len(texts), "texts", progress) as bar:
        rows = unit(pooled_states(pipeline.engine, pipeline.tokenizers, texts, bar.update), "text")  # (T, D)
    np.save(folder / EMBEDDINGS, rows)
    np.save(folder / PAIRS, pairs)
    small = _encode_images(folder, pipeline, dataset, identity, progress)
    np.save(folder / THUMBNAILS, small)
    owners = subjects([e.descriptions or e.captions for e in dataset.examples])
    images = [
        {"id": e.image.relative_to(dataset.root).as_posix(), "group": e.group, "subject": owner}
        for e, owner in zip(dataset.examples, owners.tolist(), strict=True)
    ]
    write_bytes(folder / IMAGES, "".join(json.dumps(image) + "\n" for image in images).encode())
    info = {
        **identity,
        "fastgen": __version__,
        "engine": pipeline.engine.name,
        "dtype": {name: pipeline.engine.executed(name) for name in ("text_encoder", "vae_encoder")},
        "counts": {"images": len(images), "texts": len(texts), "pairs": len(pairs)},
        "width": rows.shape[1],
        "thumbnail_size": THUMBNAIL,
        "copies": calibrate(small, owners),
        "notes": list(dataset.notes),
        "files": record_files(folder),
    }
    write_json(folder / MANIFEST, info)


def _texts(examples: Sequence[Example], text: TextChoice) -> tuple[list[str], np.ndarray]:
    """(the distinct texts in the order in which they first occur, (P, 2) int32 sorted pairs of a text and an image)."""
    numbers: dict[str, int] = {}
    pairs = set()
    for row, example in enumerate(examples):
        for words in example.captions if text == "caption" else example.descriptions:
            pairs.add((numbers.setdefault(words, len(numbers)), row))
    return list(numbers), np.array(sorted(pairs), np.int32)


def _encode_images(
    folder: Path, pipeline: Pipeline, dataset: Dataset, identity: Mapping[str, Any], progress: bool
) -> np.ndarray:
    """Write the clean states that the denoiser sees, of latents the posterior's mean; returns the thumbnails (N, s, s, 3)
    uint8."""
    count = len(dataset.examples)
    latents = np.lib.format.open_memmap(folder / LATENTS, "w+", "float16", (count, *identity["latent_shape"]))
    small = np.empty((count, THUMBNAIL, THUMBNAIL, 3), np.uint8)
    with _bar(count, "images", progress) as bar:
        for start in range(0, count, LOADED):
            rows = slice(start, start + LOADED)
            part = replace(dataset, examples=dataset.examples[rows])
            images = load_images(part, identity["image_size"], mode=identity["image_mode"])[
                0
            ]  # (b, size, size, 3) uint8
            small[rows] = thumbnails(images, THUMBNAIL)
            with np.errstate(over="ignore"):
                latents[rows] = _clean_states(pipeline, images)
            if not np.isfinite(latents[rows]).all():
                raise FastgenError("the VAE's latents are not finite in float16; try --dtype fp32")
            bar.update(len(images))
    latents.flush()
    return small


def _check_model(spec: Spec) -> None:
    """InputError for a model without text, or whose images are not square and RGB, as those of a dataset are read."""
    if spec.condition.text is None:
        raise InputError(f"an index needs a text encoder; this model takes {spec.condition.takes}")
    channels, height, width = spec.space.image
    if height != width or channels != 3:
        raise InputError(
            f"an index holds square RGB images; this model's have {channels} channels and {spec.space.size}"
        )


def _clean_states(pipeline: Pipeline, images: np.ndarray) -> np.ndarray:
    """(b, H, W, 3) uint8 -> clean states (b, C, h, w) float32."""
    if pipeline.spec.space.latent:
        return np.asarray(pipeline.spec.space.from_vae(_latents(pipeline.engine, images)), np.float32)
    return _signed(images)


def _signed(images: np.ndarray) -> np.ndarray:
    """(b, H, W, 3) uint8 -> (b, 3, H, W) float32 in [-1, 1]."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float32) / np.float32(127.5) - np.float32(1)


def _latents(engine: Engine, images: np.ndarray) -> np.ndarray:
    """(b, H, W, 3) uint8 -> the posterior's mean (b, C, h, w) float32, unscaled."""
    x = _signed(images)
    sizes = engine.batch_sizes("vae_encoder") or [ENCODE]
    means = []
    for batch in cut(len(x), max(sizes), sizes):
        rows = engine.padded(engine.array(x[batch.rows]), batch.bucket)
        moments = engine.numpy(engine.run("vae_encoder", rows)[0])[: len(batch)]  # (b, 2C, h, w)
        means.append(moments[:, : moments.shape[1] // 2].copy())
    return np.concatenate(means)


def _bar(count: int, name: str, progress: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=count, desc=name, unit=name.removesuffix("s"), disable=None if progress else True)
