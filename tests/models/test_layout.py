"""What lies in a model folder: the files that hold weights, and what beside them changes the model and is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastgen.errors import InputError
from fastgen.models.layout import class_names, read_layout
from fastgen.models.weight_choice import weight_files

STEM = "diffusion_pytorch_model"
PLAIN = {
    "_class_name": "DDPMPipeline",
    "unet": ["diffusers", "UNet2DModel"],
    "scheduler": ["diffusers", "DDPMScheduler"],
}


def folder_of(folder: Path, index: dict[str, Any] = PLAIN, *files: str) -> Path:
    (folder / "model_index.json").write_text(json.dumps(index))
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (
            "pytorch_lora_weights.safetensors",
            "LoRA weights: fuse them with --lora .*safetensors.:SCALE., or leave them out",
        ),
        ("my_lora.bin", "LoRA weights in a pickle"),
        ("ip-adapter_sd15.safetensors", "an IP-Adapter"),
        ("ip_adapter.bin", "an IP-Adapter"),
        ("learned_embeds.safetensors", "a textual inversion"),
    ],
)
def test_files_that_change_the_model_are_not_passed_over(tmp_path: Path, file: str, words: str) -> None:
    folder_of(tmp_path, PLAIN, file)
    with pytest.raises(InputError, match=f"holds {file}, {words}"):
        read_layout(tmp_path)
    if "lora" in file:
        assert read_layout(tmp_path, has_lora=True).denoiser == "unet"
    else:
        with pytest.raises(InputError, match=words):
            read_layout(tmp_path, has_lora=True)


@pytest.mark.parametrize(
    ("components", "words"),
    [
        ({"controlnet": ["diffusers", "ControlNetModel"]}, "has controlnet, which fastgen does not run"),
        ({"unet": [None, None]}, "has neither unet nor transformer"),
        (
            {"unet": ["diffusers", "StableCascadeUNet"]},
            "unet: found 'StableCascadeUNet', fastgen runs UNet2DConditionModel, ",
        ),
        ({"text_encoder": ["transformers", "CLIPTextModel"]}, "names a text encoder, but no tokenizer"),
        ({"image_encoder": ["transformers", "CLIPVisionModel"]}, "is asked by images, which requests cannot hold"),
    ],
)
def test_pipelines_that_fastgen_does_not_run_are_refused_by_name(tmp_path: Path, components: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_layout(folder_of(tmp_path, PLAIN | components))


def test_folders_are_found_where_pipelines_have_them(tmp_path: Path) -> None:
    more = {"vqvae": ["diffusers", "VQModel"], "safety_checker": [None, None], "requires_safety_checker": False}
    layout = read_layout(folder_of(tmp_path, PLAIN | more, "unet_ema/config.json"), "ema")
    assert (layout.denoiser, layout.vae, layout.label, layout.text_encoders) == ("unet_ema", "vqvae", "ema", {})


def test_every_name_of_a_class_counts(tmp_path: Path) -> None:
    assert class_names({"0": "tench, Tinca tinca", "1": "cat"}, tmp_path) == {"tench": 0, "Tinca tinca": 0, "cat": 1}
    with pytest.raises(InputError, match="expected a class id and its names"):
        class_names({"a": "cat"}, tmp_path)


def test_the_plain_safetensors_come_first_then_half_precision_then_pickles(tmp_path: Path) -> None:
    order = [f"{STEM}.safetensors", f"{STEM}.fp16.safetensors", f"{STEM}.bin", f"{STEM}.fp16.bin"]
    options = [{}, {"variant": "fp16"}, {"use_safetensors": False}, {"use_safetensors": False, "variant": "fp16"}]
    for name in order:
        (tmp_path / name).write_text("")
    for name, expected in zip(order, options, strict=True):
        found = weight_files(tmp_path, allow_pickle=True)
        assert (found.files, found.options) == ((tmp_path / name,), expected)
        if name.endswith(".bin"):
            with pytest.raises(InputError, match=rf"{name}: weights in a pickle; .* --allow-pickle"):
                weight_files(tmp_path)
        (tmp_path / name).unlink()
    with pytest.raises(InputError, match=f"holds no weights, expected {STEM}.safetensors or model.safetensors"):
        weight_files(tmp_path, allow_pickle=True)


@pytest.mark.parametrize("index", [f"{STEM}.safetensors.index.json", f"{STEM}.safetensors.index.fp16.json"])
def test_shards_are_read_together_and_a_missing_one_is_named(tmp_path: Path, index: str) -> None:
    names = [f"{STEM}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    places = {"a": names[1], "b": names[0], "c": names[1]}
    (tmp_path / index).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (tmp_path / names[0]).write_text("")
    with pytest.raises(InputError, match=f"{names[1]}: no such file, {index} names it"):
        weight_files(tmp_path)
    (tmp_path / names[1]).write_text("")
    found = weight_files(tmp_path)
    assert found.files == tuple(tmp_path / name for name in names)
    assert found.options == ({"variant": "fp16"} if "fp16" in index else {})
    (tmp_path / index).write_text(json.dumps({"metadata": {}, "weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(InputError, match="weight_map"):
        weight_files(tmp_path)
    (tmp_path / index).write_text(json.dumps({"weight_map": places}))
    with pytest.raises(InputError, match="metadata is missing"):  # diffusers reads no index without it
        weight_files(tmp_path)
