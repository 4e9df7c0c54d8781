"""Text encoders of transformers as one network: token ids in, states and a pooled vector out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class TextEncoder(nn.Module):
    """One text encoder, or the two of SDXL side by side: CLIPTextModel, CLIPTextModelWithProjection or T5EncoderModel.

    `penultimate`: the states are those before the last layer and its norm, as SDXL takes them; else those after it. The pooled
    vector is that of `pooled_encoder`: CLIP's projected one where there is a projection, else its state at the end token; of
    T5, which has none, the mean of the states of all tokens that are no padding."""

    def __init__(self, encoders: Sequence[nn.Module], penultimate: bool = False) -> None:
        super().__init__()
        self.encoders, self.penultimate = nn.ModuleList(encoders), penultimate

    def forward(self, *input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Ids (B, T) for each encoder -> states (B, T, D), of all encoders together, and pooled (B, P)."""
        states: list[Tensor] = []
        pooled: list[Tensor] = []
        pooling = pooled_encoder(list(self.encoders))
        for encoder, ids in zip(self.encoders, input_ids, strict=True):
            out: Any = encoder(input_ids=ids, output_hidden_states=True) if self.penultimate else encoder(input_ids=ids)
            states.append(out.hidden_states[-2] if self.penultimate else out.last_hidden_state)
            if encoder is pooling:
                pooled.append(_pooled(encoder, out, ids))
        return states[0] if len(states) == 1 else torch.cat(states, dim=-1), pooled[0]


def _pooled(encoder: Any, out: Any, ids: Tensor) -> Tensor:
    for name in ("text_embeds", "pooler_output"):
        if getattr(out, name, None) is not None:
            return getattr(out, name)
    padding = encoder.config.pad_token_id
    mask = torch.ones_like(ids) if padding is None else (ids != padding)
    weights = mask.to(out.last_hidden_state.dtype)[:, :, None]  # (B, T, 1)
    return (out.last_hidden_state * weights).sum(1) / weights.sum(1).clamp(min=1)


def pooled_encoder(encoders: Sequence[Any]) -> Any:
    """The text encoder whose pooled vector counts: the first that projects it, as in SDXL's pipeline, else the last."""
    return next((encoder for encoder in encoders if "Projection" in type(encoder).__name__), encoders[-1])
