"""Small things that the tests of scoring share: folders of images, an evaluator and a CLIP with random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from fastgen.files.names import ICLEVR_OBJECTS
from fastgen.files.png import png_bytes

ATTRIBUTES = {"body": ("cat", "slime"), "colour": ("blue", "green", "red")}
PROMPTS = ["a red dragon with wings", "a small blue slime", "green robot with a sword", "purple insect with many legs"]


def make_images(folder, seed=0, size=(64, 64), count=5, tint=0, metadata=None):
    """`count` images of noise, 0.png ...; `tint` (0..255) is the lowest value; `metadata`, if any, as `generate` writes it."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = rng.integers(tint, 256, (size[1], size[0], 3), dtype=np.uint8)
        if metadata is None:
            Image.fromarray(pixels).save(folder / f"{i}.png")
        else:
            (folder / f"{i}.png").write_bytes(png_bytes(pixels, metadata))
    return folder


def make_evaluator(folder: Path, seed: int = 0) -> Path:
    import torch

    from fastgen.models import evaluator

    torch.manual_seed(seed)
    evaluator.save(evaluator.ResNet18(width=8).eval(), folder, ICLEVR_OBJECTS, {})
    return folder


def make_attribute_evaluator(folder: Path, seed: int = 0) -> Path:
    import torch

    from fastgen.models import evaluator

    torch.manual_seed(seed)
    evaluator.save(evaluator.ResNet18(5, width=8).eval(), folder, ATTRIBUTES, {})
    return folder


def make_clip(folder: Path, context: int = 32) -> Path:
    """A CLIP of one layer in each tower: 32 px images, 8-dimensional embeddings, a tokenizer learnt from PROMPTS."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    from fastgen.training.bpe import train_tokenizer

    tokenizer = train_tokenizer(PROMPTS * 2, vocab_size=540, length=context)
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**tower, **special, "vocab_size": len(tokenizer), "max_position_embeddings": context}
    vision = {**tower, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
