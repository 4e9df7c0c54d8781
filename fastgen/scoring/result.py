"""The result of scoring: figures with standard errors, and the settings they depend on; as JSON and as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from fastgen.files.records import Record, builtins
from fastgen.scoring.metrics import Share
from fastgen.scoring.samples import Sample, mean_and_error

Better = Literal["higher", "lower"]
# Metric -> which direction is better; "higher" for attributes, whatever their names are.
BETTER: Mapping[str, Better] = {
    "label_accuracy": "higher",
    "fid": "lower",
    "kid": "lower",
    "clip_t": "higher",
    "clip_i": "higher",
}


@dataclass(frozen=True)
class Figure:
    """One metric of a run: the mean over its folders."""

    value: float
    standard_error: float  # NaN where it is undefined
    over: str  # what the standard error is over: "seeds" (folders), or "images" of the only folder
    better: Better
    label: str  # the metric's full name: with the network whose features it is of
    method: str  # how the standard error was found
    folders: Mapping[str, float]  # folder -> value

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "standard_error": or_none(self.standard_error), "folders": dict(self.folders)}


@dataclass(frozen=True)
class Resized:
    """Images that did not have a network's size."""

    to: str  # the size, and how they were brought to it
    images: int  # of all folders
    reference: int


@dataclass(frozen=True)
class Score:
    """One run: one or several folders of images generated from the same requests (one folder per seed)."""

    requests: str | None
    evaluator: str | None
    num_images: int  # in each folder
    # Metric -> figure, of the metrics that the options ask for: label_accuracy, or attributes and each of them by its name,
    # fid, kid, clip_t, clip_i.
    metrics: Mapping[str, Figure]
    # Hits among the requested labels, all folders together: by the number of objects in the image, and by object.
    by_count: Mapping[int, Share]
    by_object: Mapping[str, Share]  # only objects that were requested
    reference: Mapping[str, Any] | None  # path, images, sha256
    clip: Mapping[str, Any] | None  # variant, preprocessing
    resized: Mapping[str, Resized]  # network -> what was resized for it
    saving: str  # how the networks' output was converted to pixels: clamp, min-max, mixed, unknown
    # Model, checkpoint, engine, scheduler, ...: the value in all images' metadata, or "mixed".
    made_by: Mapping[str, Any]
    warnings: tuple[str, ...]
    names: tuple[str, ...] = field(repr=False)  # of the images
    samples: Mapping[str, tuple[Sample, ...]] = field(repr=False, compare=False)  # metric -> one per folder
    by_value: Mapping[str, Share] = field(default_factory=dict)  # "colour: red" -> hits among the requests for it

    @property
    def accuracy(self) -> float:
        """Label accuracy: the mean over the folders; as they share their requests, also that of all their labels."""
        return self.metrics["label_accuracy"].value

    @property
    def standard_error(self) -> float:
        """Of the label accuracy."""
        return self.metrics["label_accuracy"].standard_error

    @property
    def error_over(self) -> str:
        """What the standard error of the label accuracy is over."""
        return self.metrics["label_accuracy"].over

    @property
    def folders(self) -> Mapping[str, float]:
        """Folder -> label accuracy."""
        return self.metrics["label_accuracy"].folders

    def to_json(self) -> dict[str, Any]:
        """A value for `json.dumps`; a standard error that is undefined is None. `accuracy`, `standard_error` and `folders` at
        the top are the label accuracy's, where it was asked for."""
        out = {
            "metrics": {name: figure.to_json() for name, figure in self.metrics.items()},
            "requests": self.requests,
            "evaluator": self.evaluator,
            "reference": self.reference,
            "clip": self.clip,
            "num_images": self.num_images,
            "resized": {name: vars(resized) for name, resized in self.resized.items()},
            "saving": self.saving,
            "made_by": dict(self.made_by),
            "warnings": list(self.warnings),
        }
        if self.by_value:
            out["by_value"] = {name: _share_json(share) for name, share in self.by_value.items()}
        if "label_accuracy" not in self.metrics:
            return out
        return out | {
            "accuracy": self.accuracy,
            "standard_error": or_none(self.standard_error),
            "standard_error_over": self.error_over,
            "folders": dict(self.folders),
            "by_count": {str(count): _share_json(share) for count, share in self.by_count.items()},
            "by_object": {name: _share_json(share) for name, share in self.by_object.items()},
        }

    def table(self, details: bool = True) -> str:
        """Several lines of text: the figures, what they were measured on, and with `details` folders, counts and objects."""
        figures = [(f.label, number(f.value), _error_text(f)) for f in self.metrics.values()]
        lines = columns([("metric", "value", "standard error"), *figures])
        lines += ["", *self._circumstances()]
        if not details:
            return "\n".join(lines)
        names = next(iter(self.metrics.values())).folders
        if len(names) > 1:
            values = [(name, *(number(f.folders[name]) for f in self.metrics.values())) for name in names]
            lines += ["", *columns([("folder", *self.metrics), *values])]
        for title, shares in (
            ("objects in image", self.by_count),
            ("object", self.by_object),
            ("value asked for", self.by_value),
        ):
            if shares:
                rows = [(str(k), f"{s.accuracy:.4f}  ({s.hits} of {s.total})") for k, s in shares.items()]
                lines += ["", *columns([(title, "accuracy"), *rows])]
        return "\n".join(lines)

    def _circumstances(self) -> list[str]:
        seeds = len(next(iter(self.metrics.values())).folders)
        labels = sum(share.total for share in self.by_count.values()) // seeds
        images = f"{f'{seeds} seeds of ' if seeds > 1 else ''}{self.num_images} images"
        lines = [f"{images} with {labels} labels" if labels else images]
        if self.reference:
            content = f"{self.reference['images']} images, sha256 {self.reference['sha256'][:12]}"
            lines.append(f"reference: {self.reference['path']}, {content}")
        origin = "".join(f", {key} {_short(value)}" for key, value in self.made_by.items())
        lines.append(f"saving: {self.saving}{origin}")
        for name, resized in self.resized.items():
            if resized.images or resized.reference:
                reference = f" and {resized.reference} of the reference" if resized.reference else ""
                lines.append(f"{name}: {resized.images} images{reference} resized to {resized.to}")
        return lines


def figure(key: str, label: str, samples: Sequence[Sample], folders: Sequence[Any]) -> Figure:
    """The figure of one metric from the samples of its folders."""
    value, error, over, method = mean_and_error(samples)
    values = {str(folder): sample.value for folder, sample in zip(folders, samples, strict=True)}
    return Figure(value, error, over, BETTER.get(key, "higher"), label, method, values)


class FigureRecord(Record, frozen=True):
    """A Figure as `Figure.to_json` writes it."""

    value: float
    standard_error: float | None
    over: str
    better: Better
    label: str
    method: str
    folders: dict[str, float]

    def figure(self) -> Figure:
        values: dict[str, Any] = builtins(self)
        return Figure(**values | {"standard_error": math.nan if self.standard_error is None else self.standard_error})


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text, every column but the last padded to one width."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return ["  ".join([*(f"{c:<{w}}" for c, w in zip(row, widths, strict=False)), row[-1]]) for row in rows]


def number(value: float) -> str:
    """Four decimals, or four significant digits for what is below 0.01, as KID often is."""
    if not np.isfinite(value):
        return "undefined"
    return f"{value:.4f}" if abs(value) >= 0.01 or value == 0 else f"{value:.4g}"


def or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _error_text(figure: Figure) -> str:
    if math.isnan(figure.standard_error):
        return "undefined"
    return f"{number(figure.standard_error)} over {figure.over} ({figure.method})"


def _share_json(share: Share) -> dict[str, Any]:
    return {"accuracy": share.accuracy, "hits": share.hits, "labels": share.total}


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)
