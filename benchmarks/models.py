"""Model folders with random weights, so that anyone can measure without a checkpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgspec.structs import replace

from benchmarks.prompts import prompts
from fastgen.errors import unknown
from fastgen.files.jsonfiles import write_json
from fastgen.files.names import ICLEVR_OBJECTS
from fastgen.models.build import build_text_encoder
from fastgen.models.folder import Model
from fastgen.models.networks.labels import conditioner_for, unet_class
from fastgen.models.saving import save_model
from fastgen.presets import NetworkPreset, Preset, Training, load_preset, preset_names
from fastgen.training.bpe import train_tokenizer

MEDIUM = Path(__file__).with_name("medium.toml")  # for measurements on CPUs
ARCHITECTURES = (
    "monsters-pndm-rag",
    "monsters-ddim",
    "monsters-dpmpp",
    "monsters-best",
    "iclevr-class-embed",
    "iclevr-concat",
    "medium",
)
# What text presets load frozen: CLIP ViT-B/32, but for the vocabulary, which is learnt from the benchmark's own prompts, and
# Stable Diffusion's autoencoder.
TEXT_ENCODER = {
    "vocab_size": 600,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_hidden_layers": 12,
}
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 256,
}


def architecture(name_or_file: str | Path) -> Preset:
    """`medium`, a preset of the package or a TOML file, with networks of the true size where it loads frozen ones. InputError
    for an unknown name."""
    name = str(name_or_file)
    if name != MEDIUM.stem and not name.endswith(".toml") and name not in preset_names():
        raise unknown("architecture", name, [MEDIUM.stem, *preset_names(), "a TOML file"])
    preset = load_preset(MEDIUM if name == MEDIUM.stem else name)
    for part, config in (("text_encoder", TEXT_ENCODER), ("vae", VAE)):
        network = getattr(preset, part)
        if network is not None and network.path is not None:
            built: Any = {part: NetworkPreset(config, train=Training(steps=1))}
            preset = replace(preset, **built)
    return preset


def random_model(name_or_file: str | Path, folder: Path, seed: int = 0) -> Path:
    """The architecture's networks with random weights as a model folder at `folder`; made once, then reused.

    Weights are drawn as torch draws them, on the GPU where there is one; no layer is zero, as those that a training starts
    with: products with zeros take less power and run faster. The last layers are scaled so that the UNet predicts, and the
    decoder paints, with the contrast of trained ones: otherwise every engine would agree on grey.
    """
    if (folder / "model_index.json").exists():
        return folder
    preset = architecture(name_or_file)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = _labels(preset, seed) if preset.conditioner is not None else _text(preset, seed)
        _scale_outputs(model)
    save_model(model, folder)
    return folder


def build(preset: Preset, name: str, seed: int = 0) -> Any:
    """The preset's `unet` or `vae` with torch's own random weights, on the default device (`meta` for none at all)."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    torch.manual_seed(seed)
    config = _config(preset, name)
    cls: Any = UNet2DConditionModel
    if name == "vae":
        cls = AutoencoderKL
    elif preset.conditioner is not None:
        cls = unet_class(preset.conditioner["kind"], config)
    return cls(**config).eval().requires_grad_(False)


def _config(preset: Preset, name: str) -> Mapping[str, Any]:
    return getattr(preset, name).config


def _text(preset: Preset, seed: int) -> Model:
    text = _config(preset, "text_encoder")
    tokenizer = train_tokenizer(prompts(64), text["vocab_size"], text.get("max_position_embeddings", 77))
    unet = build(preset, "unet", seed)
    model = Model(None, unet, dict(preset.scheduler), preset.sampling, tokenizers=[tokenizer])
    model.text_encoders = [build_text_encoder(text, tokenizer, seed + 1)]
    model.vae = build(preset, "vae", seed + 2)
    return model


def _labels(preset: Preset, seed: int) -> Model:
    unet = build(preset, "unet", seed)
    assert preset.conditioner is not None
    conditioner = conditioner_for(preset.conditioner, unet.config, ICLEVR_OBJECTS, len(ICLEVR_OBJECTS))
    model = Model(None, unet, dict(preset.scheduler), preset.sampling, conditioner, dict(ICLEVR_OBJECTS))
    if preset.vae is not None:
        model.vae = build(preset, "vae", seed + 1)
    return model


@torch.inference_mode()
def _scale_outputs(model: Model) -> None:
    """Scale the UNet's last layer to outputs of unit variance, the decoder's to a standard deviation of 0.4."""
    layers: list[tuple[str, Any, float]] = [("unet", model.unet.conv_out, 1.0)]
    if model.vae is not None:
        layers.append(("vae_decoder", model.vae.decoder.conv_out, 0.4))  # type: ignore[union-attr]
    for name, layer, deviation in layers:
        inputs = model.signatures()[name].sample_inputs(1, np.random.default_rng(0))
        output = model.networks()[name](*(torch.asarray(x, device=layer.weight.device) for x in inputs.values()))
        layer.weight *= deviation / output.std()


def prepared(name_or_file: str | Path, work: Path) -> tuple[Path, Path]:
    """(model folder, bundle) of a random model of this architecture below `work`, made and exported once."""
    model = random_model(name_or_file, work / Path(name_or_file).stem)
    return model, bundled(model, work)


def bundled(model: Path, work: Path, dtype: str | None = None) -> Path:
    """The bundle of a model folder below `work`, exported once; one with int8 graphs too is a bundle of its own."""
    from export import export
    from fastgen.models.bundle import is_bundle

    name = model.name if dtype is None else f"{model.name}-{dtype}"
    bundle = work / f"{name}-bundle"
    if not is_bundle(bundle):
        print(f"exporting {name}", flush=True)
        start = time.perf_counter()
        export(model, bundle, dtype=dtype)
        write_json(work / f"{name}-export.json", {"seconds": time.perf_counter() - start})
    return bundle


def export_seconds(bundle: Path) -> float | None:
    """What `bundled` took, if it made this bundle."""
    record = bundle.with_name(bundle.name.removesuffix("-bundle") + "-export.json")
    return json.loads(record.read_text())["seconds"] if record.is_file() else None
