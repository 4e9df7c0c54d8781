from __future__ import annotations

from typing import Any

import pytest
import torch

from fastgen.training.attention import MOST_KEYS, SmallAttention, attend_on_cpu


@pytest.mark.parametrize("size", [8, 32], ids=["few keys", "many keys"])
def test_a_unet_predicts_and_learns_the_same_as_with_diffusers_own_attention(size: int) -> None:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel(
        sample_size=size,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=12,
    )
    inputs = torch.randn(2, 4, size, size), torch.tensor([3, 700]), torch.randn(2, 77, 12)
    assert (size * size <= MOST_KEYS) == (size == 8)

    def run() -> tuple[torch.Tensor, list[torch.Tensor]]:
        unet.zero_grad()
        out = unet(*inputs).sample
        out.square().mean().backward()
        return out.detach(), [p.grad.clone() for p in unet.parameters()]

    expected, gradients = run()
    attend_on_cpu(unet)
    assert all(isinstance(p, SmallAttention) for p in unet.attn_processors.values())
    found, others = run()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other, one, atol=1e-6, rtol=1e-3)


def test_the_attention_of_pixels_runs_on_planes() -> None:
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(0)
    attention: Any = Attention(8, heads=2, dim_head=4, norm_num_groups=4, residual_connection=True, bias=True)
    x = torch.randn(2, 8, 4, 4)
    expected = attention(x)
    attend_on_cpu(attention)
    torch.testing.assert_close(attention(x), expected, atol=1e-6, rtol=1e-5)
