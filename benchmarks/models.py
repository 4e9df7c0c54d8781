"""Model folders with random weights, of any preset's size, so that anyone can measure without a checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.sides import PROMPTS
from fastgen.config import Preset, load_preset
from fastgen.jsonfiles import write_json
from fastgen.names import ICLEVR_OBJECTS
from fastgen.networks import LabelConditioner, Model, save_model
from fastgen.training.modules import build_module, build_text_encoder
from fastgen.training.tokenizer import train_tokenizer

MEDIUM = Path(__file__).with_name("medium.toml")


def random_model(preset_name: str | Path, folder: Path, seed: int = 0) -> Path:
    """The preset's networks with random weights as a model folder at `folder`; made once, then reused.

    The last layers are scaled so that the UNet predicts, and the decoder paints, with the contrast of trained ones:
    otherwise every engine would agree on grey.
    """
    if (folder / "model_index.json").exists():
        return folder
    preset = load_preset(preset_name)
    model = _text(preset, seed) if preset.family == "text" else _labels(preset, seed)
    _scale_outputs(model)
    save_model(model, folder)
    return folder


def _config(preset: Preset, name: str) -> Any:
    return getattr(preset, name).config


def _text(preset: Preset, seed: int) -> Model:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    text = _config(preset, "text_encoder")
    tokenizer = train_tokenizer(PROMPTS * 2, text["vocab_size"], text.get("max_position_embeddings", 77))
    unet = build_module(UNet2DConditionModel, _config(preset, "unet"), "unet", seed)
    model = Model(None, "text", unet, dict(preset.scheduler), preset.sampling, tokenizer=tokenizer)
    model.text_encoder = build_text_encoder(text, tokenizer, seed + 1)
    model.vae = build_module(AutoencoderKL, _config(preset, "vae"), "vae", seed + 2)
    return model


def _labels(preset: Preset, seed: int) -> Model:
    from diffusers import UNet2DModel

    unet = build_module(UNet2DModel, _config(preset, "unet"), "unet", seed)
    table = {"dim": 4 * unet.config.block_out_channels[0], **(preset.conditioner or {})}
    conditioner = LabelConditioner(num_labels=len(ICLEVR_OBJECTS), **table)
    return Model(None, "labels", unet, dict(preset.scheduler), preset.sampling, conditioner, ICLEVR_OBJECTS)


def _scale_outputs(model: Model) -> None:
    """Scale the UNet's last layer to outputs of unit variance, the decoder's to a standard deviation of 0.4."""
    layers: list[tuple[str, Any, float]] = [("unet", model.unet.conv_out, 1.0)]
    if model.vae is not None:
        layers.append(("vae_decoder", model.vae.decoder.conv_out, 0.4))  # type: ignore[union-attr]
    for name, layer, deviation in layers:
        inputs = model.signatures()[name].sample_inputs(2, np.random.default_rng(0))
        with torch.inference_mode():
            output = model.networks()[name](*map(torch.from_numpy, inputs.values()))
            layer.weight *= deviation / output.std()


def prepared(preset_name: str | Path, work: Path) -> tuple[Path, Path]:
    """(model folder, bundle) of a random model of this preset below `work`, made and exported once."""
    from export import export
    from fastgen.bundle import is_bundle

    name = Path(preset_name).stem
    model, bundle = random_model(preset_name, work / name), work / f"{name}-bundle"
    if not is_bundle(bundle):
        print(f"exporting {model}", flush=True)
        start = time.perf_counter()
        export(model, bundle)
        write_json(work / f"{name}-export.json", {"seconds": time.perf_counter() - start})
    return model, bundle
