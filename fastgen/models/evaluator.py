"""The evaluators: a ResNet-18 that says which objects are in a 64 px image (sigmoid outputs), or which value each of
several attributes has (a softmax over the outputs of each).

Architecture and weight names are those of torchvision's `resnet18` with `fc = Sequential(Linear(512, 24), Sigmoid())`,
so the checkpoint of the i-CLEVR task fits as it is; a narrower network has fewer channels in the same places.
He et al., Deep Residual Learning for Image Recognition, 2015.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastgen.data.attributes import Attributes, check_attributes
from fastgen.errors import FastgenError, InputError
from fastgen.files.jsonfiles import located, read_json, write_bytes, write_json
from fastgen.files.names import check_objects
from fastgen.models.weights import PICKLES, load_state, read_state

IMAGE_SIZE = 64
WIDTH, WIDEST = 64, 256  # channels of the first stage: torchvision's, and the most that are built
WEIGHTS, LABELS, CONFIG = "model.safetensors", "labels.json", "config.json"


def _conv(width_in: int, width: int, size: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(width_in, width, size, stride, padding=size // 2, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (B, width_in, H, W) -> (B, width, H / stride, W / stride)."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(width_in, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3, 1), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or width_in != width:
            self.downsample = nn.Sequential(_conv(width_in, width, 1, stride), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        hidden = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(hidden)) + shortcut)


def _stage(width_in: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(BasicBlock(width_in, width, stride), BasicBlock(width, width, 1))


class ResNet18(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> scores (B, num_labels), each in [0, 1]. Stages of w, 2w, 4w and 8w channels.

    Fresh weights come from torch's global generator (He initialisation).
    """

    def __init__(self, num_labels: int = 24, width: int = WIDTH) -> None:
        super().__init__()
        self.num_labels, self.width = num_labels, width
        self.conv1, self.bn1 = _conv(3, width, 7, 2), nn.BatchNorm2d(width)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1)
        self.layer1 = _stage(width, width, 1)
        self.layer2 = _stage(width, 2 * width, 2)
        self.layer3 = _stage(2 * width, 4 * width, 2)
        self.layer4 = _stage(4 * width, 8 * width, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(nn.Linear(8 * width, num_labels), nn.Sigmoid())
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 8w): what the last linear layer sees."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))  # (B, w, H / 4, W / 4)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (B, 8w, H / 32, W / 32)
        return self.avgpool(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))


@dataclass(frozen=True)
class Evaluator:
    """A trained evaluator in eval mode, of objects (name -> output index) or of attributes. Both are None where the file
    holds weights alone; the outputs then are those of objects."""

    module: ResNet18
    objects: Mapping[str, int] | None
    attributes: Attributes | None = None

    @property
    def num_labels(self) -> int:
        return self.module.num_labels

    def predict(self, images: np.ndarray, batch_size: int = 64) -> np.ndarray:
        """images (N, 3, 64, 64) float32 in [-1, 1] -> scores (N, num_labels) float32 in [0, 1]; the scores of an attribute's
        values add up to 1. Raises InputError for images of another shape, FastgenError when a score is not finite."""
        return self._batched(lambda x: self.scores(self.module.features(x)), images, batch_size)

    def scores(self, features: Tensor) -> Tensor:
        """Features (N, 8 * width) -> scores (N, num_labels), as `predict` gives them."""
        if self.attributes is None:
            return self.module.fc(features)
        logits = self.module.fc[0](features).split([len(values) for values in self.attributes.values()], dim=1)
        return torch.cat([part.softmax(dim=1) for part in logits], dim=1)

    def features(self, images: np.ndarray, batch_size: int = 64) -> np.ndarray:
        """images as for `predict` -> features (N, 8 * width) float32, for distances between sets of images."""
        return self._batched(self.module.features, images, batch_size)

    def _batched(self, function: Callable[[Tensor], Tensor], images: np.ndarray, batch_size: int) -> np.ndarray:
        shape = (len(images), 3, IMAGE_SIZE, IMAGE_SIZE)
        if not len(images) or images.shape != shape or images.dtype != np.float32:
            expected = f"(N, 3, {IMAGE_SIZE}, {IMAGE_SIZE}) float32, N at least 1"
            raise InputError(f"images are {images.shape} {images.dtype}: expected {expected}")
        device = self.module.conv1.weight.device
        slices = (images[i : i + batch_size] for i in range(0, len(images), batch_size))
        with torch.no_grad():
            out = np.concatenate([function(torch.from_numpy(x).to(device)).cpu().numpy() for x in slices])
        if broken := int((~np.isfinite(out)).any(axis=1).sum()):
            raise FastgenError(f"the evaluator gave NaN or infinity for {broken} of {len(out)} images")
        return out


def save(module: ResNet18, folder: Path, outputs: Mapping[str, int] | Attributes, record: Mapping[str, Any]) -> None:
    """Write an evaluator folder: model.safetensors, labels.json with `outputs` (name -> output for objects, name -> values
    for attributes), and config.json with `record` (how it was trained).

    Raises InputError when `outputs` does not name every output once, FastgenError when the disk refuses.
    """
    from safetensors.torch import save as to_bytes

    _evaluator(outputs, module)
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}
    write_bytes(folder / WEIGHTS, to_bytes(state, metadata={"format": "pt"}))
    write_json(folder / LABELS, dict(outputs))
    config = {"architecture": "resnet18", "num_labels": module.num_labels, "width": module.width}
    write_json(folder / CONFIG, {**config, "image_size": IMAGE_SIZE, "training": dict(record)})


def load(path: Path, allow_pickle: bool = False) -> Evaluator:
    """Read an evaluator onto the CPU in float32: a folder of `save`, a .safetensors file, or the task's checkpoint
    (`torch.save({"model": state_dict})`; only with `allow_pickle`, and then nothing but tensors and plain containers).

    Raises InputError when the file is none of these, cannot be read, is a pickle without permission, or when weights
    are missing, unexpected, of the wrong shape or not finite (named one by one, the first ten).
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path)
    if not path.is_file():
        raise InputError(f"{path}: not found, expected an evaluator: a folder, a .safetensors file or a checkpoint.pth")
    if path.suffix not in (".safetensors", *PICKLES):
        raise InputError(f"{path}: expected an evaluator folder, a .safetensors file or one of {', '.join(PICKLES)}")
    return Evaluator(_with_weights(read_state(path, allow_pickle), path), None)


def _load_folder(folder: Path) -> Evaluator:
    for name in (CONFIG, LABELS, WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(f"{folder}: not an evaluator folder ({name} is missing)")
    config = read_json(folder / CONFIG)
    architecture = config.get("architecture") if isinstance(config, dict) else None
    if architecture != "resnet18":
        raise InputError(f"{folder / CONFIG}: architecture = {architecture!r}: expected 'resnet18'")
    module = _with_weights(read_state(folder / WEIGHTS), folder / WEIGHTS)
    outputs = read_json(folder / LABELS)
    with located(folder / LABELS):
        return _evaluator(outputs, module)


def _evaluator(outputs: Any, module: ResNet18) -> Evaluator:
    """The evaluator of objects (name -> output), or of attributes (name -> list of values). InputError where their number is
    not that of the module's outputs."""
    if isinstance(outputs, Mapping) and any(isinstance(value, list | tuple) for value in outputs.values()):
        evaluator = Evaluator(module, None, check_attributes(outputs))
        count, what = sum(map(len, outputs.values())), "values"
    else:
        check_objects(outputs)
        evaluator, count, what = Evaluator(module, outputs), len(outputs), "objects"
    if count != module.num_labels:
        raise InputError(f"found {count} {what}, expected one for each of the {module.num_labels} outputs")
    return evaluator


def _with_weights(state: Mapping[str, Any], path: Path) -> ResNet18:
    module = ResNet18(_rows(state.get("fc.0.weight"), 2, 24), _rows(state.get("conv1.weight"), 4, WIDTH, WIDEST))
    width = "" if module.width == WIDTH else f" and width {module.width}"
    load_state(module, state, path, f"ResNet-18 with {module.num_labels} outputs{width}")
    return module.eval()


def _rows(weight: object, dimensions: int, default: int, most: int = 100_000) -> int:
    """The outputs of a layer, from its weight; the default where that is none of the right dimensions."""
    if isinstance(weight, Tensor) and weight.ndim == dimensions and 1 <= len(weight) <= most:
        return len(weight)
    return default
