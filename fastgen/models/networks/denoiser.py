"""The network that denoises, whatever its class and its condition, with the interface of `models.signatures`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.models.condition import CLASS, GUIDANCE, POOLED, STATES
from fastgen.models.networks.labels import LabelConditioner


class Denoiser(nn.Module):
    """A UNet or transformer of diffusers, or one of ours, with positional tensors in and one tensor out.

    `inputs`: the names of what follows sample and timestep, see `Condition.inputs`. `conditioner` embeds the labels or the
    class, where the network does not do that itself. `channels`: of the prediction; what the network says beside it, a learned
    variance, is dropped. `time_ids`: the sizes that SDXL-like networks take, six integers, the same for every image.
    """

    unet: Any
    time_ids: Tensor | None

    def __init__(
        self,
        unet: nn.Module,
        inputs: Sequence[str],
        conditioner: LabelConditioner | None = None,
        *,
        channels: int | None = None,
        time_ids: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.unet, self.conditioner = unet, conditioner
        self.inputs, self.channels = tuple(inputs), channels
        ids = None if time_ids is None else torch.tensor(list(time_ids), dtype=torch.int64)  # no cast rounds integers
        self.register_buffer("time_ids", ids, persistent=False)
        if getattr(unet.config, "class_embed_type", None) == "timestep":
            unet.class_embedding.register_forward_pre_hook(_as_weights)  # type: ignore[union-attr]
        self.integer_time = isinstance(getattr(unet, "time_proj", None), nn.Embedding)

    def forward(self, sample: Tensor, timestep: Tensor, *conditions: Tensor) -> Tensor:
        """sample (B, C, h, w), timestep (B,), conditions (B, ...) in the order of `inputs` -> prediction (B, C, h, w)."""
        sample, timestep, arguments = self.arguments(sample, timestep, *conditions)
        return self.kept(self.unet(sample, timestep, **arguments, return_dict=False)[0])

    def kept(self, prediction: Tensor) -> Tensor:
        """The prediction without what the network says beside it."""
        return prediction if self.channels is None else prediction[:, : self.channels]

    def arguments(self, sample: Tensor, timestep: Tensor, *conditions: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """What the UNet or transformer takes: sample, timestep, and the conditions by name."""
        tensors = dict(zip(self.inputs, conditions, strict=True))
        arguments: dict[str, Any] = {name: tensors[name] for name in (STATES, CLASS, GUIDANCE) if name in tensors}
        if self.conditioner is not None:
            embedding = self.conditioner(arguments.pop(CLASS))
            if self.conditioner.kind == "concat":
                planes = embedding[:, :, None, None].expand(-1, -1, *sample.shape[-2:])  # (B, dim, h, w)
                sample = torch.cat([sample, planes], dim=1)
            else:
                arguments[STATES if self.conditioner.kind == "tokens" else CLASS] = embedding
        if POOLED in tensors:
            assert self.time_ids is not None
            ids = self.time_ids.expand(len(sample), -1).float()  # (B, 6)
            arguments["added_cond_kwargs"] = {POOLED: tensors[POOLED], "time_ids": ids}
        if self.integer_time:
            timestep = timestep.long()
        if STATES not in arguments and hasattr(self.unet, "encoder_hid_proj"):
            arguments[STATES] = None  # UNet2DConditionModel names it without a default
        return sample, timestep, arguments


def _as_weights(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Give an embedding its inputs in its own dtype: UNet2DModel computes the sinusoids of a number in float32 alone."""
    dtype = next(module.parameters()).dtype
    return tuple(x.to(dtype) for x in inputs)
