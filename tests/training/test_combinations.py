"""Every condition trains in every space: a model of each combination is trained, saved, and generates."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import fastgen  # noqa: E402
from fastgen.errors import InputError  # noqa: E402
from fastgen.models.folder import load_model  # noqa: E402
from fastgen.presets import load_preset  # noqa: E402
from fastgen.training import train  # noqa: E402

TRAIN = 'steps = 2\nbatch_size = 4\nprecision = "fp32"\nvalidation_fraction = 0.25\n'
BLOCKS = "block_out_channels = [8, 16]\nlayers_per_block = 1\nnorm_num_groups = 4\n"
SELF = 'down_block_types = ["DownBlock2D", "AttnDownBlock2D"]\nup_block_types = ["AttnUpBlock2D", "UpBlock2D"]\n'
CROSS = (
    'down_block_types = ["DownBlock2D", "CrossAttnDownBlock2D"]\nup_block_types = ["CrossAttnUpBlock2D", "UpBlock2D"]\n'
)
CROSS += "cross_attention_dim = 16\nattention_head_dim = 2\n"
VAE = f"""
[vae.config]
down_block_types = ["DownEncoderBlock2D", "DownEncoderBlock2D"]
up_block_types = ["UpDecoderBlock2D", "UpDecoderBlock2D"]
latent_channels = 4
sample_size = 16
{BLOCKS}[vae.train]
{TRAIN}"""
TEXT = f"""
[text_encoder.config]
vocab_size = 600
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 1
num_attention_heads = 2
[text_encoder.train]
{TRAIN}"""
REST = f"""
[unet.train]
{TRAIN}
[scheduler]
_class_name = "DDPMScheduler"
beta_schedule = "squaredcos_cap_v2"
prediction_type = "v_prediction"
clip_sample = false
[sampling]
num_inference_steps = 2
"""
# Condition -> (the preset's table, extra input channels, the UNet's blocks, a request).
CONDITIONS: dict[str, tuple[str, int, str, dict]] = {
    "text": (TEXT, 0, CROSS, {"prompts": ["a red square"]}),
    "labels": (
        '[conditioner]\nkind = "class_embed"\n',
        0,
        SELF + 'class_embed_type = "identity"\n',
        {"labels": [["red", "big"]]},
    ),
    "planes": ('[conditioner]\nkind = "concat"\ndim = 5\n', 5, SELF, {"labels": [["red"]]}),
    "label planes": ('[conditioner]\nkind = "concat"\nembed = "identity"\n', 5, SELF, {"labels": [["red"]]}),
    "tokens": ('[conditioner]\nkind = "tokens"\n', 0, CROSS, {"labels": [["blue", "small"]]}),
    "words": ('[conditioner]\nkind = "tokens"\nembed = "words"\n', 0, CROSS, {"labels": [["blue", "small"]]}),
    "class": (
        '[conditioner]\nkind = "class_embed"\nembed = "embedding"\n',
        0,
        SELF + 'class_embed_type = "identity"\n',
        {"labels": ["red"]},
    ),
    "class token": ('[conditioner]\nkind = "tokens"\nembed = "embedding"\n', 0, CROSS, {"labels": ["green"]}),
    "nothing": ("", 0, SELF, {"count": 1}),
}
COLOURS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}


def preset(condition: str, space: str, folder: Path) -> Path:
    table, extra, blocks, _ = CONDITIONS[condition]
    channels, size = (4, 8) if space == "latents" else (3, 16)
    guidance = "" if condition == "nothing" else "guidance_scale = 2.0\n"
    unet = f"\n[unet.config]\nsample_size = {size}\nin_channels = {channels + extra}\nout_channels = {channels}\n"
    text = "image_size = 16\n" + (VAE if space == "latents" else "") + table + unet + BLOCKS + blocks + REST + guidance
    file = folder / "mine.toml"
    file.write_text(text)
    return file


def dataset(folder: Path, condition: str) -> Path:
    rows = []
    for i in range(16):
        colour, size = list(COLOURS)[i % 3], ("big", "small")[i % 2]
        image = np.full((16, 16, 3), 255, np.uint8)
        image[4:12, 4:12] = COLOURS[colour]
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")
        labels = [colour] if condition.startswith("class") else [colour, size]
        value = {"text": f"a {size} {colour} square"} if condition == "text" else {"labels": labels}
        rows.append({"file_name": f"{i}.png", **value})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.mark.parametrize("space", ["pixels", "latents"])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_model_of_each_combination_is_trained_and_generates(condition, space, tmp_path):
    torch.set_num_threads(1)
    chosen = load_preset(preset(condition, space, tmp_path))
    out = train(chosen, dataset(tmp_path / "data", condition), tmp_path / "model", progress=False)
    spec = load_model(out).spec
    assert spec.space.latent == (space == "latents")
    request = CONDITIONS[condition][3]
    assert spec.condition.kind == {"prompts": "text", "labels": "labels", "count": "nothing"}[next(iter(request))]
    pipeline = fastgen.load(out, "eager")
    image, again = (pipeline.generate(**request, seeds=[7])[0] for _ in range(2))
    assert image.size == (16, 16)
    assert image.tobytes() == again.tobytes()


def test_training_draws_the_condition_of_a_class_model(tmp_path):
    """One label per image is a class, and the class after the last stands for none: guidance works."""
    chosen = load_preset(preset("class", "pixels", tmp_path))
    out = train(chosen, dataset(tmp_path / "data", "class"), tmp_path / "model", progress=False)
    condition = load_model(out).condition
    assert condition.classes == {"blue": 0, "green": 1, "red": 2}
    assert condition.null_class == 3
    several = dataset(tmp_path / "several", "labels")
    with pytest.raises(InputError, match="has 2 labels; a model of classes learns exactly one per image"):
        train(chosen, several, tmp_path / "other", progress=False)
