"""A UNet in two networks, for caching of deep features between steps (Ma et al., DeepCache, 2023).

The whole network also gives its deep feature, the input of its last up block. The shallow one takes a deep feature and computes
the rest: the first convolution, the first down block and the last up block.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn
from torch.nn import functional

from fastgen.models.networks.denoiser import Denoiser
from fastgen.models.networks.patch_unet import PatchUNet

BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D", "CrossAttnUpBlock2D")


def why_whole(unet: Any) -> str | None:
    """Why this denoiser cannot be split, in words; None if it can."""
    name = type(unet).__name__
    if name == PatchUNet.__name__:
        return why_whole(unet.unet)
    if name not in (UNet2DModel.__name__, UNet2DConditionModel.__name__):
        return f"{name} is no UNet of diffusers"
    blocks = [type(block).__name__ for block in (*unet.down_blocks, *unet.up_blocks)]
    if len(unet.up_blocks) < 2:
        return f"its {name} has one level, hence no deep features"
    if other := next((block for block in blocks if block not in BLOCKS), None):
        return f"its {name} has blocks of the kind {other}"
    if unet.config.time_embedding_type == "fourier":
        return f"its {name} divides what it predicts by the timestep"
    return None


def deep_shape(unet: Any, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """(C, h, w) of the deep feature of a UNet that denoises states of this shape."""
    patch = unet.config.patch_size if isinstance(unet, PatchUNet) else 1
    return unet.config.block_out_channels[1], shape[1] // patch, shape[2] // patch


class SplitUNet(nn.Module):
    """The computations of a UNet, which is shared, not copied, with its deep feature as an output or an input."""

    unet: Any

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def whole(self, sample: Tensor, timestep: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
        """Prediction and deep feature. `arguments`: those of the UNet."""
        unet = self.unet
        emb, states = self._embedded(sample, timestep, **arguments)
        skips = self._conv_in(sample)
        x = skips[0]
        for block in unet.down_blocks:
            x, others = block(x, emb, **_states(block, states))
            skips += others
        if unet.mid_block is not None:
            x = unet.mid_block(x, emb, **_states(unet.mid_block, states))
        is_sized = isinstance(unet, UNet2DConditionModel)
        sized = is_sized and any(n % 2**self.unet.num_upsamplers for n in sample.shape[-2:])
        for block in unet.up_blocks[:-1]:
            count = len(block.resnets)
            size = (
                {"upsample_size": skips[-count - 1].shape[2:]} if sized else {}
            )  # of an edge that is no multiple of 2
            x = block(x, skips[-count:], emb, **_states(block, states), **size)
            skips = skips[:-count]
        return self._last(x, skips, emb, states), x

    def shallow(self, sample: Tensor, timestep: Tensor, deep: Tensor, **arguments: Any) -> Tensor:
        """The prediction with a deep feature of another step."""
        emb, states = self._embedded(sample, timestep, **arguments)
        skips, block = self._conv_in(sample), self.unet.down_blocks[0]
        _, others = block(skips[0], emb, **_states(block, states))
        return self._last(deep, (skips + others)[: len(self.unet.up_blocks[-1].resnets)], emb, states)

    def _conv_in(self, sample: Tensor) -> tuple[Tensor, ...]:
        return (self.unet.conv_in(2 * sample - 1.0 if self.unet.config.center_input_sample else sample),)

    def _last(self, deep: Tensor, skips: tuple[Tensor, ...], emb: Tensor, states: Any) -> Tensor:
        """The last up block and what follows it."""
        unet, block = self.unet, self.unet.up_blocks[-1]
        x = block(deep, skips, emb, **_states(block, states))
        if unet.conv_norm_out:
            x = unet.conv_act(unet.conv_norm_out(x))
        return unet.conv_out(x)

    def _embedded(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The embedding of time and class (B, ...), and what cross-attention takes."""
        unet: Any = self.unet
        if isinstance(self.unet, UNet2DModel):
            emb = unet.time_embedding(unet.time_proj(timestep).to(unet.dtype))
            if unet.class_embedding is not None:
                labels = unet.time_proj(class_labels) if unet.config.class_embed_type == "timestep" else class_labels
                emb = emb + unet.class_embedding(labels).to(unet.dtype)
            return emb, None
        emb = unet.time_embedding(unet.get_time_embed(sample, timestep), timestep_cond)
        if (labels := unet.get_class_embed(sample, class_labels)) is not None:
            emb = torch.cat([emb, labels], dim=-1) if unet.config.class_embeddings_concat else emb + labels
        added = unet.get_aug_embed(emb, encoder_hidden_states, added_cond_kwargs)
        emb = emb if added is None else emb + added
        emb = emb if unet.time_embed_act is None else unet.time_embed_act(emb)
        return emb, unet.process_encoder_hidden_states(encoder_hidden_states, added_cond_kwargs)


class SplitPatchUNet(nn.Module):
    """`SplitUNet` of a PatchUNet: between a pixel unshuffle and a pixel shuffle."""

    def __init__(self, unet: PatchUNet) -> None:
        super().__init__()
        self.inner, self.patch = SplitUNet(unet.unet), unet.config.patch_size

    def whole(self, sample: Tensor, timestep: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
        y, deep = self.inner.whole(functional.pixel_unshuffle(sample, self.patch), timestep, **arguments)
        return functional.pixel_shuffle(y, self.patch), deep

    def shallow(self, sample: Tensor, timestep: Tensor, deep: Tensor, **arguments: Any) -> Tensor:
        y = self.inner.shallow(functional.pixel_unshuffle(sample, self.patch), timestep, deep, **arguments)
        return functional.pixel_shuffle(y, self.patch)


class WholeDenoiser(nn.Module):
    """The network `unet_whole` of `signatures`: a Denoiser that also gives its deep feature."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser, self.split = denoiser, _split(denoiser.unet)

    def forward(self, sample: Tensor, timestep: Tensor, *conditions: Tensor) -> tuple[Tensor, Tensor]:
        sample, timestep, arguments = self.denoiser.arguments(sample, timestep, *conditions)
        prediction, deep = self.split.whole(sample, timestep, **arguments)
        return self.denoiser.kept(prediction), deep


class ShallowDenoiser(nn.Module):
    """The network `unet_shallow` of `signatures`: a Denoiser that takes a deep feature behind its conditions."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser, self.split = denoiser, _split(denoiser.unet)

    def forward(self, sample: Tensor, timestep: Tensor, *rest: Tensor) -> Tensor:
        *conditions, deep = rest
        sample, timestep, arguments = self.denoiser.arguments(sample, timestep, *conditions)
        return self.denoiser.kept(self.split.shallow(sample, timestep, deep, **arguments))


def _split(unet: Any) -> Any:
    return SplitPatchUNet(unet) if isinstance(unet, PatchUNet) else SplitUNet(unet)


def _states(block: Any, states: Tensor | None) -> dict[str, Any]:
    """The argument of a block with cross-attention."""
    return {"encoder_hidden_states": states} if getattr(block, "has_cross_attention", False) else {}
