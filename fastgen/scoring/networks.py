"""Feature networks: PIL images -> feature vectors, each image brought to the network's size as the network expects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from fastgen.errors import FastgenError
from fastgen.models.evaluator import IMAGE_SIZE as EVALUATOR_SIZE
from fastgen.models.evaluator import Evaluator
from fastgen.models.evaluator import load as load_evaluator
from fastgen.models.weights import weights_hash
from fastgen.scoring import inception


class FeatureNetwork(Protocol):
    """Turns images into features. `name` is unique within a Scorer."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int:
        """Width and height of its input, px."""

    @property
    def title(self) -> str:
        """Stands in the label of the metrics it is used for."""

    @property
    def preprocessing(self) -> str:
        """The size, and how images of other sizes are brought to it."""

    @property
    def fingerprint(self) -> str:
        """Hash of the weights."""

    def features(self, images: Sequence[Image.Image]) -> np.ndarray:
        """RGB images of any sizes -> (B, D) float32."""


@dataclass(frozen=True)
class EvaluatorNetwork:
    """The evaluator: its features (512 where its width is 64), and the scores that its last layer computes from them."""

    evaluator: Evaluator
    path: Path

    name = "evaluator"
    size = EVALUATOR_SIZE
    preprocessing = f"{EVALUATOR_SIZE} x {EVALUATOR_SIZE} px (bilinear, antialiased)"

    @property
    def title(self) -> str:
        return f"evaluator features: {self.path}"

    @cached_property
    def fingerprint(self) -> str:
        return weights_hash(self.evaluator.module)

    def features(self, images: Sequence[Image.Image]) -> np.ndarray:
        with float32_convolutions():
            return self.evaluator.features(np.stack([to_input(image) for image in images]), len(images))

    def scores(self, features: np.ndarray) -> np.ndarray:
        """Features (N, D) -> (N, num_labels) float32 in [0, 1]."""
        device = self.evaluator.module.conv1.weight.device
        with torch.no_grad():
            return self.evaluator.scores(torch.from_numpy(features).to(device)).cpu().numpy()


@dataclass(frozen=True)
class InceptionNetwork:
    """The network that FID is defined on."""

    module: inception.FidInception

    name = "inception"
    size = inception.IMAGE_SIZE
    title = "inception-2015-12-05"
    preprocessing = f"{inception.IMAGE_SIZE} x {inception.IMAGE_SIZE} px (bilinear, antialiased where it shrinks)"

    @cached_property
    def fingerprint(self) -> str:
        return weights_hash(self.module)

    def features(self, images: Sequence[Image.Image]) -> np.ndarray:
        device = self.module.fc.weight.device
        pixels = [torch.from_numpy(np.array(image)).to(device).permute(2, 0, 1)[None] for image in images]
        batch = torch.cat([inception.resize(x) for x in pixels])  # (B, 3, 299, 299)
        with torch.no_grad(), float32_convolutions():
            return self.module(batch).cpu().numpy()


def evaluator_network(path: Path, allow_pickle: bool, device: torch.device) -> EvaluatorNetwork:
    """Raises as `evaluator.load` does."""
    evaluator = load_evaluator(path, allow_pickle)
    evaluator.module.to(device)
    return EvaluatorNetwork(evaluator, path)


def inception_network(path: Path, allow_pickle: bool, device: torch.device) -> InceptionNetwork:
    """Raises as `inception.load_inception` does."""
    return InceptionNetwork(inception.load_inception(path, allow_pickle).to(device))


def to_input(image: Image.Image) -> np.ndarray:
    """An RGB image, resized to 64 x 64 px -> (3, 64, 64) float32 in [-1, 1]."""
    if image.size != (EVALUATOR_SIZE, EVALUATOR_SIZE):
        image = image.resize((EVALUATOR_SIZE, EVALUATOR_SIZE), Image.Resampling.BILINEAR)
    return np.asarray(image, np.float32).transpose(2, 0, 1) / 127.5 - 1


@contextmanager
def float32_convolutions() -> Iterator[None]:
    """Convolutions in float32 on GPUs too, where torch rounds their inputs to TF32 by default."""
    cudnn: Any = torch.backends.cudnn
    with cudnn.flags(enabled=cudnn.enabled, deterministic=cudnn.deterministic, allow_tf32=False):
        yield


def extract(network: FeatureNetwork, images: Sequence[Image.Image]) -> tuple[np.ndarray, int]:
    """(features (B, D) of the images, how many of them had another size). FastgenError where a feature is not finite."""
    features = network.features(images)
    if broken := int((~np.isfinite(features)).any(axis=1).sum()):
        raise FastgenError(f"the {network.name} network gave NaN or infinity for {broken} of {len(features)} images")
    return features, sum(image.size != (network.size, network.size) for image in images)
