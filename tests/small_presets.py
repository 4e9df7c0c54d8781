"""Overrides that bring the presets of published systems to a size at which a test trains them in seconds."""

from __future__ import annotations

TEXT_SMALL = [
    "image_size=64",
    "unet.config.sample_size=16",
    "unet.config.norm_num_groups=8",
    "unet.config.cross_attention_dim=32",
    "unet.config.attention_head_dim=2",
    "unet.config.layers_per_block=1",
]
LABEL_SMALL = ["unet.config.norm_num_groups=4", "unet.config.layers_per_block=1"]
SMALL = {
    "monsters-pndm-rag": [*TEXT_SMALL, "unet.config.block_out_channels=[8, 8, 16, 16, 16]"],
    "monsters-ddim": [*TEXT_SMALL, "unet.config.block_out_channels=[8, 8, 16, 16]"],
    "monsters-dpmpp": [
        *TEXT_SMALL,
        "unet.config.block_out_channels=[8, 8, 16, 16]",
        "unet.train.loss_from_epoch={lpips = 0, kl = 1}",
    ],
    "monsters-best": [*TEXT_SMALL, "unet.config.block_out_channels=[8, 8, 16]"],
    "iclevr-class-embed": [*LABEL_SMALL, "unet.config.block_out_channels=[8, 8, 8, 8, 8, 8]", "conditioner.dim=32"],
    "iclevr-concat": [*LABEL_SMALL, "unet.config.block_out_channels=[8, 8, 8, 8, 8, 8]"],
    "iclevr-small": [*LABEL_SMALL, "unet.config.block_out_channels=[8, 8, 8]", "conditioner.dim=32"],
    "iclevr-broadcast": ["unet.config.norm_num_groups=4", "unet.config.block_out_channels=[8, 8, 8, 8]"],
}
SHORT = [
    "unet.train.steps=4",
    "unet.train.batch_size=4",
    "unet.train.accumulation=2",
    "unet.train.warmup_steps=1",
    "unet.train.precision=fp32",
    "unet.train.checkpoint_every=2",
    "unet.train.validation_fraction=0.25",
    "sampling.num_inference_steps=4",
]
