"""Writing model folders: diffusers' layout, safetensors, so that its pipelines load them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgen.files.jsonfiles import write_json
from fastgen.files.records import builtins
from fastgen.models.layout import SETTINGS
from fastgen.models.networks.labels import class_record, save_conditioner
from fastgen.models.pipelines import given_statistics, latent_statistics

if TYPE_CHECKING:
    from fastgen.models.folder import Model


DENOISER_FOLDERS = {"DiTTransformer2DModel": "transformer"}  # others are in unet/


def save_model(model: Model, folder: Path, record: Mapping[str, Any] | None = None, *, trained: bool = True) -> None:
    """Write the model folder (diffusers layout; StableDiffusionPipeline.from_pretrained loads one with text and latents).

    `record`, how the model was trained, goes into fastgen.json. `trained`: False leaves out the weights of the UNet and the
    conditioner, which an unfinished run has in its checkpoints.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _save_module(model.unet, folder / DENOISER_FOLDERS.get(type(model.unet).__name__, "unet"), trained)
    (folder / "scheduler").mkdir(exist_ok=True)
    write_json(folder / "scheduler" / "scheduler_config.json", model.scheduler_config, infinity=True)
    index: dict[str, Any] = {"_class_name": _pipeline_class(model)}
    index |= {"scheduler": ["diffusers", model.scheduler_config["_class_name"]]}
    index |= {DENOISER_FOLDERS.get(type(model.unet).__name__, "unet"): class_record(model.unet)}
    if model.conditioner is not None:
        save_conditioner(model.conditioner, folder / "conditioner", trained)
        index |= {"conditioner": class_record(model.conditioner)}
    if model.names is not None:
        write_json(folder / "labels.json", model.names)
    if model.vae is not None:
        _save_module(model.vae, folder / "vae", True)
        index |= {"vae": class_record(model.vae)}
    for i, (encoder, tokenizer) in enumerate(zip(model.text_encoders, model.tokenizers, strict=True)):
        end = f"_{i + 1}" if i else ""
        save_text_encoder(encoder, tokenizer, folder, end)
        index |= {f"text_encoder{end}": ["transformers", type(encoder).__name__]}
        index |= {f"tokenizer{end}": ["transformers", type(tokenizer).__name__]}
    if index["_class_name"] == "StableDiffusionPipeline":
        index |= {name: [None, None] for name in ("safety_checker", "feature_extractor", "image_encoder")}
        index |= {"requires_safety_checker": False}
    settings: dict[str, Any] = {"sampling": builtins(model.sampling), "training": dict(record or {})}
    settings |= {} if model.null_class is None else {"null_class": model.null_class}
    write_json(folder / SETTINGS, settings)
    write_json(folder / "model_index.json", index)


def _pipeline_class(model: Model) -> str:
    """diffusers' pipeline for such a model, where there is one that takes the same components and counts all statistics of the
    autoencoder; else a name that diffusers does not have."""
    name, latent = type(model.unet).__name__, model.vae is not None
    if model.conditioner is not None:
        return "LabelDiffusion"
    if model.text_encoders:
        pipeline = "StableDiffusionXLPipeline" if len(model.text_encoders) > 1 else "StableDiffusionPipeline"
    elif name == "DiTTransformer2DModel":
        pipeline = "DiTPipeline"
    else:
        pipeline = "LDMPipeline" if latent else "DDPMPipeline"
    if model.vae is not None and not given_statistics(model.vae) <= set(latent_statistics(pipeline, model.vae)):
        return "LatentDiffusion"
    return pipeline


def _save_module(module: Any, folder: Path, weights: bool) -> None:
    if weights:
        module.save_pretrained(folder, safe_serialization=True)
    else:
        module.save_config(folder)


def save_text_encoder(text_encoder: Any, tokenizer: Any, folder: Path, end: str = "") -> None:
    """Write text_encoder/ and tokenizer/ in the layout that transformers 4 and 5 both read: `text_model.*` weight keys
    of CLIP (version 5 writes no prefix, and version 4 then keeps random weights silently), vocab.json and merges.txt beside
    tokenizer.json. `end`: "_2" for SDXL's second one."""
    from safetensors.torch import save_file

    text_encoder.save_pretrained(folder / f"text_encoder{end}", safe_serialization=True)
    tokenizer.save_pretrained(folder / f"tokenizer{end}")
    if type(text_encoder).__name__ != "CLIPTextModel":
        return
    state = {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in text_encoder.state_dict().items()}
    state = {k: v.contiguous() for k, v in state.items() if not k.endswith("position_ids")}
    save_file(state, folder / f"text_encoder{end}" / "model.safetensors", metadata={"format": "pt"})
    bpe = json.loads((folder / f"tokenizer{end}" / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in bpe["merges"]]
    write_json(folder / f"tokenizer{end}" / "vocab.json", bpe["vocab"])
    lines = "\n".join(["#version: 0.2", *merges, ""])
    (folder / f"tokenizer{end}" / "merges.txt").write_text(lines, encoding="utf-8")
