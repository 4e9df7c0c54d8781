"""The networks of the text family with the interfaces of signatures.py: tensors in, tensors out."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class TextUNet(nn.Module):
    """UNet2DConditionModel with positional tensors in and one tensor out."""

    unet: Any

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """sample (B, C, h, w), timestep (B,), encoder_hidden_states (B, 77, D) -> prediction (B, C, h, w)."""
        return self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]


class TextEncoder(nn.Module):
    """CLIPTextModel: ids (B, 77) -> last_hidden_state (B, 77, D), pooler_output (B, D)."""

    def __init__(self, text_model: nn.Module) -> None:
        super().__init__()
        self.text_model = text_model

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        out = self.text_model(input_ids=input_ids)
        return out.last_hidden_state, out.pooler_output


class VaeDecoder(nn.Module):
    """Unscaled latents (B, C, h, w) -> image (B, 3, H, W), nominally in [-1, 1]."""

    vae: Any

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: Tensor) -> Tensor:
        return self.vae.decode(latent_sample, return_dict=False)[0]


class VaeEncoder(nn.Module):
    """Image (B, 3, H, W) in [-1, 1] -> moments of the latents (B, 2C, h, w): mean and log-variance, unscaled."""

    vae: Any

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, sample: Tensor) -> Tensor:
        hidden = self.vae.encoder(sample)
        return hidden if self.vae.quant_conv is None else self.vae.quant_conv(hidden)
