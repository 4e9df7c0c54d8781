"""A UNet on patches: squares of pixels become channels, so that its largest maps, the slowest ones, are smaller."""

from __future__ import annotations

from typing import Any

from diffusers import ConfigMixin, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor
from torch.nn import functional


class PatchUNet(ModelMixin, ConfigMixin):
    """UNet2DModel between a pixel unshuffle and a pixel shuffle (Shi et al., Real-Time Single Image Super-Resolution, 2016).

    The arguments are those of UNet2DModel, but for `patch_size`: the edge of a patch in pixels, a divisor of `sample_size`.
    `sample_size`, `in_channels` and `out_channels` are those of the images.
    """

    config: Any

    @register_to_config
    def __init__(
        self,
        patch_size: int = 2,
        sample_size: int = 64,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (64, 128, 192),
        down_block_types: tuple[str, ...] = ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        layers_per_block: int = 1,
        norm_num_groups: int = 8,
        attention_head_dim: int = 32,
        class_embed_type: str | None = "identity",
    ) -> None:
        super().__init__()
        if sample_size % patch_size:
            raise ValueError(f"sample_size = {sample_size}: expected a multiple of patch_size = {patch_size}")
        self.unet: Any = UNet2DModel(
            sample_size=sample_size // patch_size,
            in_channels=in_channels * patch_size**2,
            out_channels=out_channels * patch_size**2,
            block_out_channels=block_out_channels,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            attention_head_dim=attention_head_dim,
            class_embed_type=class_embed_type,
        )

    @property
    def conv_out(self) -> Any:
        return self.unet.conv_out

    def forward(
        self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> UNet2DOutput | tuple[Tensor]:
        """sample (B, C, H, W), timestep (B,), class_labels (B, 4 x the first width) -> prediction (B, out_channels, H, W)."""
        patches = functional.pixel_unshuffle(sample, self.config.patch_size)  # (B, C p p, H / p, W / p)
        y = self.unet(patches, timestep, class_labels=class_labels, return_dict=False)[0]
        y = functional.pixel_shuffle(y, self.config.patch_size)
        return UNet2DOutput(sample=y) if return_dict else (y,)
