"""The Inception-v3 of the Frechet Inception Distance, in PyTorch.

FID is defined on the 2,048 pool features of one network: `inception-2015-12-05`, the frozen TensorFlow graph of Heusel et
al., GANs Trained by a Two Time-Scale Update Rule, 2017. Its weights exist as `pt_inception-2015-12-05-6726825d.pth`
(https://github.com/mseitzer/pytorch-fid; torch-fidelity and torchmetrics use the same ones), whose names this module has.
It differs from torchvision's `inception_v3` in three places: average pooling does not count the padding, the last block
pools its maximum instead of its average, and there are 1,008 classes.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.models.weights import load_state, read_state

IMAGE_SIZE, FEATURES, CLASSES = 299, 2048, 1008


class Conv(nn.Module):
    """Convolution without bias, batch normalisation with TensorFlow's epsilon, ReLU."""

    def __init__(self, width_in: int, width: int, size: int | tuple[int, int], stride: int = 1, padding: bool = False):
        super().__init__()
        height, breadth = (size, size) if isinstance(size, int) else size
        pad = (height // 2, breadth // 2) if padding else 0
        self.conv = nn.Conv2d(width_in, width, (height, breadth), stride, pad, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def _average(x: Tensor) -> Tensor:
    """3 x 3 average around each pixel; at the border of those pixels alone that exist."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _maximum(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


class BlockA(nn.Module):
    """(B, width_in, 35, 35) -> (B, 224 + pool, 35, 35)."""

    def __init__(self, width_in: int, pool: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(width_in, 64, 1)
        self.branch5x5_1 = Conv(width_in, 48, 1)
        self.branch5x5_2 = Conv(48, 64, 5, padding=True)
        self.branch3x3dbl_1 = Conv(width_in, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=True)
        self.branch3x3dbl_3 = Conv(96, 96, 3, padding=True)
        self.branch_pool = Conv(width_in, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(_average(x))], 1)


class BlockB(nn.Module):
    """(B, 288, 35, 35) -> (B, 768, 17, 17)."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3 = Conv(288, 384, 3, stride=2)
        self.branch3x3dbl_1 = Conv(288, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=True)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), three, F.max_pool2d(x, 3, stride=2)], 1)


class BlockC(nn.Module):
    """(B, 768, 17, 17) -> (B, 768, 17, 17), its 7 x 7 convolutions factorised, `width` channels inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(768, 192, 1)
        self.branch7x7_1 = Conv(768, width, 1)
        self.branch7x7_2 = Conv(width, width, (1, 7), padding=True)
        self.branch7x7_3 = Conv(width, 192, (7, 1), padding=True)
        self.branch7x7dbl_1 = Conv(768, width, 1)
        self.branch7x7dbl_2 = Conv(width, width, (7, 1), padding=True)
        self.branch7x7dbl_3 = Conv(width, width, (1, 7), padding=True)
        self.branch7x7dbl_4 = Conv(width, width, (7, 1), padding=True)
        self.branch7x7dbl_5 = Conv(width, 192, (1, 7), padding=True)
        self.branch_pool = Conv(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        once = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), once, twice, self.branch_pool(_average(x))], 1)


class BlockD(nn.Module):
    """(B, 768, 17, 17) -> (B, 1280, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = Conv(768, 192, 1)
        self.branch3x3_2 = Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Conv(768, 192, 1)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7), padding=True)
        self.branch7x7x3_3 = Conv(192, 192, (7, 1), padding=True)
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([three, seven, F.max_pool2d(x, 3, stride=2)], 1)


class BlockE(nn.Module):
    """(B, width_in, 8, 8) -> (B, 2048, 8, 8); the last block of the network pools the maximum (`last`)."""

    def __init__(self, width_in: int, last: bool = False) -> None:
        super().__init__()
        self.branch1x1 = Conv(width_in, 320, 1)
        self.branch3x3_1 = Conv(width_in, 384, 1)
        self.branch3x3_2a = Conv(384, 384, (1, 3), padding=True)
        self.branch3x3_2b = Conv(384, 384, (3, 1), padding=True)
        self.branch3x3dbl_1 = Conv(width_in, 448, 1)
        self.branch3x3dbl_2 = Conv(448, 384, 3, padding=True)
        self.branch3x3dbl_3a = Conv(384, 384, (1, 3), padding=True)
        self.branch3x3dbl_3b = Conv(384, 384, (3, 1), padding=True)
        self.branch_pool = Conv(width_in, 192, 1)
        self.pool = _maximum if last else _average

    def forward(self, x: Tensor) -> Tensor:
        one = self.branch3x3_1(x)
        two = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        parts = [self.branch3x3_2a(one), self.branch3x3_2b(one), self.branch3x3dbl_3a(two), self.branch3x3dbl_3b(two)]
        return torch.cat([self.branch1x1(x), *parts, self.branch_pool(self.pool(x))], 1)


class FidInception(nn.Module):
    """Images (B, 3, 299, 299) float32 in [-1, 1] -> pool features (B, 2048) float32.

    Expects what pytorch-fid gives it: pixels 0..255 scaled to [-1, 1], resized to 299 px bilinearly (`fc` is there because
    the file has it; the features lie before it).
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=True)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = BlockA(192, 32), BlockA(256, 64), BlockA(288, 64)
        self.Mixed_6a = BlockB()
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (BlockC(width) for width in (128, 160, 160, 192))
        self.Mixed_7a = BlockD()
        self.Mixed_7b, self.Mixed_7c = BlockE(1280), BlockE(2048, last=True)
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = F.max_pool2d(x, 3, stride=2)  # (B, 64, 73, 73)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))  # (B, 192, 71, 71)
        x = F.max_pool2d(x, 3, stride=2)  # (B, 192, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # (B, 288, 35, 35)
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))  # (B, 768, 17, 17)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # (B, 2048, 8, 8)
        return x.mean(dim=(2, 3))


def resize(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) in 0..255 -> (B, 3, 299, 299) float32 in [-1, 1], bilinear, antialiased where it shrinks.

    Enlarging is pytorch-fid's `interpolate(mode="bilinear", align_corners=False)`; why shrinking must be antialiased: Parmar
    et al., On Aliased Resizing and Surprising Subtleties in GAN Evaluation, 2022.
    """
    size = (IMAGE_SIZE, IMAGE_SIZE)
    x = pixels.float() / 255
    if x.shape[2:] != size:
        x = F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)
    return 2 * x - 1


def load_inception(path: Path, allow_pickle: bool = False) -> FidInception:
    """The network in eval mode on the CPU, from `pt_inception-2015-12-05-6726825d.pth` (a pickle: with `allow_pickle`) or the
    same state dict as .safetensors. InputError for a file that does not fit, its wrong names listed."""
    state = dict(read_state(path, allow_pickle))
    module = FidInception()
    counters = {key: value for key, value in module.state_dict().items() if key.endswith(".num_batches_tracked")}
    load_state(module, {**counters, **state}, path, "the FID Inception-v3 (inception-2015-12-05)")
    return module.eval()
