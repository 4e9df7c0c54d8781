"""Feature networks: PIL images -> feature vectors, each image brought to the network's size as the network expects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

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
    def title(self) -> str:
        """Stands in the label of the metrics it is used for."""

    @property
    def preprocessing(self) -> str:
        """How an image that does not fit is brought to size, and the size."""

    @property
    def fingerprint(self) -> str:
        """Hash of the weights."""

    def fits(self, image: Image.Image) -> bool:
        """Whether the image has the network's size already."""

    def features(self, images: Sequence[Image.Image]) -> np.ndarray:
        """RGB images of any sizes -> (B, D) float32."""


@dataclass(frozen=True)
class EvaluatorNetwork:
    """The evaluator: its features (512 where its width is 64), and what its last layer makes of them."""

    evaluator: Evaluator
    path: Path

    name = "evaluator"
    preprocessing = f"{EVALUATOR_SIZE} x {EVALUATOR_SIZE} px (bilinear, antialiased)"

    @property
    def title(self) -> str:
        return f"evaluator features: {self.path}"

    @cached_property
    def fingerprint(self) -> str:
        return weights_hash(self.evaluator.module)

    def fits(self, image: Image.Image) -> bool:
        return image.size == (EVALUATOR_SIZE, EVALUATOR_SIZE)

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
    title = "inception-2015-12-05"
    preprocessing = f"{inception.IMAGE_SIZE} x {inception.IMAGE_SIZE} px (bilinear, antialiased where it shrinks)"

    @cached_property
    def fingerprint(self) -> str:
        return weights_hash(self.module)

    def fits(self, image: Image.Image) -> bool:
        return image.size == (inception.IMAGE_SIZE, inception.IMAGE_SIZE)

    def features(self, images: Sequence[Image.Image]) -> np.ndarray:
        device = self.module.fc.weight.device
        batch = torch.cat([inception.resize(to_tensor(image).to(device)) for image in images])  # (B, 3, 299, 299)
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
    """An RGB image, stretched to 64 x 64 px where it is not that already -> (3, 64, 64) float32 in [-1, 1]."""
    if image.size != (EVALUATOR_SIZE, EVALUATOR_SIZE):
        image = image.resize((EVALUATOR_SIZE, EVALUATOR_SIZE), Image.Resampling.BILINEAR)
    return np.asarray(image, np.float32).transpose(2, 0, 1) / 127.5 - 1


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image -> (1, 3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


@contextmanager
def float32_convolutions() -> Iterator[None]:
    """Convolutions in float32 on GPUs too, where torch rounds their inputs to TF32 by default."""
    cudnn: Any = torch.backends.cudnn
    with cudnn.flags(enabled=cudnn.enabled, deterministic=cudnn.deterministic, allow_tf32=False):
        yield


def extract(networks: Mapping[str, FeatureNetwork], images: Sequence[Image.Image]) -> dict[str, np.ndarray]:
    """Every network's features (B, D) of the images. FastgenError where one is not finite."""
    out = {name: network.features(images) for name, network in networks.items()}
    for name, features in out.items():
        if broken := int((~np.isfinite(features)).any(axis=1).sum()):
            raise FastgenError(f"the {name} network gave NaN or infinity for {broken} of {len(features)} images")
    return out
