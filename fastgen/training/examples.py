"""A dataset in memory: decoded pixels, training and validation rows, captions and labels as numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from fastgen.data import Dataset, split
from fastgen.data.cache import cached_pixels
from fastgen.errors import InputError
from fastgen.generate.requests import multi_hot
from fastgen.presets import Preset, Training
from fastgen.training.logs import say


@dataclass(frozen=True)
class Examples:
    """Row i of every array belongs to example i of the dataset."""

    dataset: Dataset
    images: np.ndarray  # (N, H, W, 3) uint8
    readable: np.ndarray  # rows whose image could be read
    pixel_fields: dict[str, str | int]  # cache key of the images

    def rows(self, recipe: Training) -> tuple[np.ndarray, np.ndarray]:
        """(training rows, validation rows), the latter shuffled. InputError when either is empty."""
        dataset = replace(self.dataset, examples=tuple(self.dataset.examples[row] for row in self.readable))
        index = {example.image: int(row) for example, row in zip(dataset.examples, self.readable, strict=True)}
        parts = [
            np.array([index[example.image] for example in part.examples], dtype=np.int64)
            for part in split(dataset, recipe.validation_fraction)
        ]
        if not all(map(len, parts)):
            counts = f"{len(parts[0])} training and {len(parts[1])} validation images"
            need = "training needs both, that is at least two groups of images"
            raise InputError(f"{self.dataset.root}: {counts}; {need}")
        train, validation = parts
        return train, np.random.default_rng(0).permutation(validation)

    @cached_property
    def multi_hot(self) -> np.ndarray:
        """(N, num_labels) float32."""
        return multi_hot(self.dataset.examples, self.dataset.objects or {})

    @cached_property
    def classes(self) -> np.ndarray:
        """(N,) int64: the index of each example's one label. Raises InputError for an example with several."""
        for example in self.dataset.examples:
            if len(example.labels) != 1:
                reason = "a model of classes learns exactly one per image"
                raise InputError(f"{example.image}: has {len(example.labels)} labels; {reason}")
        objects = self.dataset.objects or {}
        return np.array([objects[example.labels[0]] for example in self.dataset.examples], np.int64)

    @cached_property
    def captions(self) -> tuple[list[str], list[np.ndarray]]:
        """The distinct captions, the empty prompt first, and for each example the indices of its captions."""
        texts = ["", *sorted({text for example in self.dataset.examples for text in example.captions} - {""})]
        index = {text: number for number, text in enumerate(texts)}
        return texts, [np.array([index[text] for text in example.captions]) for example in self.dataset.examples]

    def captions_of(self, rows: np.ndarray) -> list[str]:
        """A line of text for each example: its first caption, or its labels."""
        examples = [self.dataset.examples[row] for row in rows]
        return [example.captions[0] if example.captions else ", ".join(example.labels) for example in examples]

    @cached_property
    def subjects(self) -> tuple[np.ndarray, np.ndarray]:
        """For each example the number of its subject, and of its set of captions: (N,) and (N,).

        Captions that begin with the same sentences describe one subject: "A red bat." and "A red bat. The monster is
        attacking."
        """
        captions = [example.captions for example in self.dataset.examples]
        beginnings = [tuple(text.partition(". ")[0].rstrip(".") for text in texts) for texts in captions]
        return _numbered(beginnings), _numbered(captions)


def load_examples(dataset: Dataset, preset: Preset, skip_bad: bool) -> Examples:
    """Decode the dataset, or read it from the cache; a note on stderr for every kind of example that is left out. Raises
    InputError for a dataset of the other kind and, unless `skip_bad`, for images that cannot be read."""
    if preset.kind not in (dataset.kind, "nothing"):
        holds, needs = ("captions" if kind == "text" else "labels" for kind in (dataset.kind, preset.kind))
        raise InputError(f"{dataset.root}: holds images with {holds}; preset {preset.name} needs {needs}")
    pixels = cached_pixels(dataset, preset.image_size, preset.image_mode, skip_bad)
    for line in (*dataset.notes, *pixels.notes):
        say(f"note: {line}")
    fields: dict[str, str | int] = {"data": dataset.fingerprint, "size": preset.image_size, "mode": preset.image_mode}
    return Examples(dataset, pixels.images, pixels.kept, fields)


def _numbered(values: list[tuple[str, ...]]) -> np.ndarray:
    numbers: dict[tuple[str, ...], int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values])
