"""A UNet without attention that gets label and time as constant planes, concatenated to the input of every level."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import Timesteps
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn


class BroadcastUNet(ModelMixin, ConfigMixin):
    """Encoder and decoder of double convolutions, one per width of `block_out_channels`, joined by skip connections
    (Ronneberger et al., U-Net, 2015). The input of each is concatenated with the label embedding (B, label_dim) and the
    sinusoidal time embedding (B, time_dim), both broadcast over the plane.

    `sample_size` must be a multiple of 2 ** (levels - 1), each width a multiple of `norm_num_groups`.
    """

    config: Any

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (64, 128, 256, 512),
        label_dim: int = 64,
        time_dim: int = 64,
        norm_num_groups: int = 32,
    ) -> None:
        super().__init__()
        factor = 2 ** (len(block_out_channels) - 1)
        if sample_size % factor:
            raise ValueError(f"sample_size = {sample_size}: expected a multiple of {factor}")
        condition, groups, widths = label_dim + time_dim, norm_num_groups, list(block_out_channels)
        self.time_proj = Timesteps(time_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        inputs = zip([in_channels, *widths], widths, strict=False)
        self.down_blocks = nn.ModuleList(DoubleConv(c + condition, width, groups) for c, width in inputs)
        self.downsamplers = nn.ModuleList(nn.Conv2d(w, w, 3, stride=2, padding=1) for w in widths[:-1])
        deeper = list(zip(widths[::-1], widths[-2::-1], strict=False))  # (width below, width here)
        self.upsamplers = nn.ModuleList(Upsample2D(below, use_conv=True, out_channels=w) for below, w in deeper)
        self.up_blocks = nn.ModuleList(DoubleConv(2 * width + condition, width, groups) for _, width in deeper)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def forward(
        self, sample: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True
    ) -> UNet2DOutput | tuple[Tensor]:
        """sample (B, C, H, W), timestep (B,), class_labels (B, label_dim) -> prediction (B, out_channels, H, W)."""
        time = self.time_proj(timestep.expand(sample.shape[0])).to(sample.dtype)  # (B, time_dim)
        condition = torch.cat([class_labels, time], dim=1)[:, :, None, None]  # (B, label_dim + time_dim, 1, 1)
        x, skips = self.down_blocks[0](sample, condition), []
        for downsample, block in zip(self.downsamplers, self.down_blocks[1:], strict=True):
            skips.append(x)
            x = block(downsample(x), condition)
        for upsample, block in zip(self.upsamplers, self.up_blocks, strict=True):
            x = block(torch.cat([upsample(x), skips.pop()], dim=1), condition)
        x = self.conv_out(x)
        return UNet2DOutput(sample=x) if return_dict else (x,)


class DoubleConv(nn.Module):
    """Two 3x3 convolutions with group normalisation and SiLU; the first gets the condition's planes besides its input."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm1 = nn.GroupNorm(groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        planes = condition.expand(-1, -1, *x.shape[-2:])  # (B, label_dim + time_dim, h, w)
        x = nn.functional.silu(self.norm1(self.conv1(torch.cat([x, planes], dim=1))))
        return nn.functional.silu(self.norm2(self.conv2(x)))
