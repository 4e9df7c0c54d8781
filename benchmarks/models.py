"""Systems with random weights, of real size, so that anyone can measure without a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastgen.config import Sampling
from fastgen.networks import Model, save_model

UNETS: dict[str, dict[str, Any]] = {
    "medium": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "attention_head_dim": 8},
    "monsters-ddim": {
        "block_out_channels": (256, 384, 512, 768),
        "layers_per_block": 2,
        "attention_head_dim": 16,  # heads, in diffusers
    },
}


def text_model(folder: Path, size: str = "medium", seed: int = 0) -> Path:
    """A 256 px text-to-latent system: the named UNet, a text encoder of CLIP ViT-B/32's size, Stable Diffusion's VAE.

    Random weights from `seed`, saved as a model folder (made once, then reused).
    """
    if (folder / "model_index.json").exists():
        return folder
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from fastgen.tokenizer import train_tokenizer
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    tokenizer = train_tokenizer(
        ["A red dragon with wings and horns.", "A small blue slime with one big eye."], vocab_size=600
    )
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=2048,
        num_attention_heads=8,
        num_hidden_layers=12,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=256,
    )
    unet = UNet2DConditionModel(sample_size=32, cross_attention_dim=512, **UNETS[size])
    schedule = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    config = {k: v for k, v in schedule.config.items() if not k.startswith("_")}
    save_model(
        Model(
            None,
            "text",
            unet.eval(),
            {"_class_name": "DDIMScheduler", **config},
            Sampling("ddim", 50, 7.5),
            text_encoder=CLIPTextModel(text).eval(),
            tokenizer=tokenizer,
            vae=vae.eval(),
        ),
        folder,
    )
    return folder
