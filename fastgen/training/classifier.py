"""The evaluators' objectives: a binary classification for each object, or one classification for each attribute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastgen.data.attributes import Attributes
from fastgen.scoring.metrics import attribute_hits, label_accuracy
from fastgen.training.draws import Draws
from fastgen.training.sources import NOISE, flip_some, to_signed
from fastgen.training.tasks import Task

SHIFT_X, SHIFT_Y, BLUR, GRAIN, LIGHT = range(10, 15)  # further streams of Draws
MAX_SHIFT = 4  # px
MAX_GRAIN = 0.08  # standard deviation of the noise added, on the scale [-1, 1]
MAX_LIGHT = 0.1  # change of contrast


class Logits(nn.Module):
    """The evaluator without its final sigmoid, which is not safe in half precision."""

    def __init__(self, evaluator: nn.Module) -> None:
        super().__init__()
        self.evaluator = evaluator

    def forward(self, x: Tensor) -> Tensor:
        """(b, 3, 64, 64) in [-1, 1] -> (b, num_labels)."""
        return self.evaluator.fc[0](self.evaluator.features(x))  # type: ignore[operator, index]


class ClassifierTask(Task):
    """Binary cross-entropy on multi-hot labels. Training mirrors, shifts and blurs the images, adds noise and changes the
    contrast, all a little, because the network will judge images of a generator.

    Batch normalisation takes its statistics over a micro-batch: they alone depend on how a batch is split.
    """

    name = "evaluator"

    def __init__(
        self,
        evaluator: nn.Module,
        images: np.ndarray,
        multi_hot: np.ndarray,
        rows: tuple[np.ndarray, np.ndarray],
        device: torch.device,
    ) -> None:
        super().__init__(Logits(evaluator), rows)
        self.images, self.multi_hot, self.device = images, multi_hot, device

    def losses(self, module: nn.Module, rows: np.ndarray, draws: Draws) -> Tensor:
        x = to_signed(self.images[rows], self.device)
        if module.training:
            x = augment(x, draws)
        labels = torch.from_numpy(self.multi_hot[rows]).to(self.device)  # (b, num_labels)
        return self.loss(module(x).float(), labels)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(b, num_labels) both -> (b,)."""
        return functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(dim=1)

    def figures(self, module: nn.Module) -> Mapping[str, float]:
        rows = self.validation_rows
        parts = np.array_split(rows, -(-len(rows) // 256))
        scores = np.concatenate([module(to_signed(self.images[p], self.device)).float().cpu().numpy() for p in parts])
        return self.judge(scores, self.multi_hot[rows])

    def judge(self, scores: np.ndarray, labels: np.ndarray) -> Mapping[str, float]:
        """The task's official score on the validation images."""
        return {"accuracy": label_accuracy(scores, labels)}


class AttributeTask(ClassifierTask):
    """The sum of the attributes' softmax cross-entropies; each row of `multi_hot` has one value of each attribute."""

    def __init__(self, *args: Any, attributes: Attributes) -> None:
        super().__init__(*args)
        self.attributes, self.sizes = attributes, [len(values) for values in attributes.values()]

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        parts = zip(logits.split(self.sizes, dim=1), labels.split(self.sizes, dim=1), strict=True)
        return torch.stack([functional.cross_entropy(x, y, reduction="none") for x, y in parts]).sum(dim=0)

    def judge(self, scores: np.ndarray, labels: np.ndarray) -> Mapping[str, float]:
        """For each attribute the share of validation images whose true value has the highest score, and the lowest share."""
        shares = attribute_hits(scores, labels, self.sizes).mean(axis=0).tolist()
        figures = {f"accuracy_{name}": share for name, share in zip(self.attributes, shares, strict=True)}
        return {**figures, "accuracy_lowest": min(shares)}


def augment(x: Tensor, draws: Draws) -> Tensor:
    """Random small changes of images (b, 3, H, W) in [-1, 1], of another size for each image."""

    def amounts(stream: int) -> Tensor:
        return torch.from_numpy(draws.uniform(stream)).to(x)[:, None, None, None]

    down, right = (draws.integers(stream, 2 * MAX_SHIFT + 1) for stream in (SHIFT_Y, SHIFT_X))
    x = shift(flip_some(x, draws), down, right)
    blurred = functional.avg_pool2d(functional.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    x = torch.lerp(x, blurred, (2 * amounts(BLUR) - 1).clamp(min=0))  # half of the images stay sharp
    x = x * (1 + MAX_LIGHT * (2 * amounts(LIGHT) - 1))
    return x + MAX_GRAIN * (2 * amounts(GRAIN) - 1).clamp(min=0) * draws.normal(NOISE, tuple(x.shape[1:]))


def shift(x: Tensor, down: np.ndarray, right: np.ndarray) -> Tensor:
    """Image i of (b, 3, H, W) moved by down[i] - MAX_SHIFT and right[i] - MAX_SHIFT px, its border repeated."""
    height, width = x.shape[-2:]
    padded = functional.pad(x, (MAX_SHIFT,) * 4, mode="replicate")
    images = [p[:, i : i + height, j : j + width] for p, i, j in zip(padded, down, right, strict=True)]
    return torch.stack(images)
