"""Model folders (diffusers layout, safetensors) <-> PyTorch modules, and the modules with the interfaces of signatures.py.

This is the one module of generation that needs torch, diffusers and transformers: bundles do not.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.config import Sampling
from fastgen.errors import InputError
from fastgen.jsonfiles import read_json, write_json
from fastgen.names import read_objects
from fastgen.prompts import Tokenizer
from fastgen.schedulers import default_name
from fastgen.signatures import Signature, label_signatures, text_signatures
from fastgen.solver import SolverTable, compile_key
from fastgen.spec import Spec, sha256_file, sha256_names

WEIGHTS = ("unet", "conditioner", "text_encoder", "vae")  # folders whose weights identify a model
COMPONENTS = ("text_encoder", "vae")  # whose own hashes are recorded: an index depends on them, not on the UNet
SETTINGS = "fastgen.json"  # generation defaults and training record, beside model_index.json


class LabelConditioner(nn.Module):
    """Multi-hot labels (B, num_labels) -> embedding (B, dim): Linear, or Linear-SiLU-Linear when `hidden` > 0.

    `kind` says where the embedding enters the UNet: "class_embed" is added to the time embedding (dim = 4 x the first
    width), "concat" is broadcast over the image and concatenated to its channels.
    """

    def __init__(self, kind: str, num_labels: int, dim: int, hidden: int = 0) -> None:
        super().__init__()
        self.config = {"kind": kind, "num_labels": num_labels, "dim": dim, "hidden": hidden}
        self.kind = kind
        if hidden:
            self.embed: nn.Module = nn.Sequential(nn.Linear(num_labels, hidden), nn.SiLU(), nn.Linear(hidden, dim))
        else:
            self.embed = nn.Linear(num_labels, dim)

    def forward(self, class_labels: Tensor) -> Tensor:
        return self.embed(class_labels)


class LabelUNet(nn.Module):
    """UNet2DModel and its conditioner as one network."""

    unet: Any
    conditioner: Any

    def __init__(self, unet: nn.Module, conditioner: LabelConditioner) -> None:
        super().__init__()
        self.unet, self.conditioner = unet, conditioner

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """sample (B, C, H, W), timestep (B,), class_labels (B, num_labels) -> prediction (B, C, H, W)."""
        embedding = self.conditioner(class_labels)  # (B, dim)
        if self.conditioner.kind == "class_embed":
            return self.unet(sample, timestep, class_labels=embedding, return_dict=False)[0]
        planes = embedding[:, :, None, None].expand(-1, -1, *sample.shape[-2:])  # (B, dim, H, W)
        return self.unet(torch.cat([sample, planes], dim=1), timestep, return_dict=False)[0]


class TextUNet(nn.Module):
    """UNet2DConditionModel with positional tensors in and one tensor out."""

    unet: Any

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """sample (B, C, h, w), timestep (B,), encoder_hidden_states (B, 77, D) -> prediction (B, C, h, w)."""
        return self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]


class TextEncoder(nn.Module):
    """CLIPTextModel: ids (B, 77) -> last_hidden_state (B, 77, D), pooler_output (B, D)."""

    def __init__(self, text_model: nn.Module) -> None:
        super().__init__()
        self.text_model = text_model

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        out = self.text_model(input_ids=input_ids)
        return out.last_hidden_state, out.pooler_output


class VaeDecoder(nn.Module):
    """Unscaled latents (B, C, h, w) -> image (B, 3, H, W), nominally in [-1, 1]."""

    vae: Any

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: Tensor) -> Tensor:
        return self.vae.decode(latent_sample, return_dict=False)[0]


class VaeEncoder(nn.Module):
    """Image (B, 3, H, W) in [-1, 1] -> moments of the latents (B, 2C, h, w): mean and log-variance, unscaled."""

    vae: Any

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, sample: Tensor) -> Tensor:
        hidden = self.vae.encoder(sample)
        return hidden if self.vae.quant_conv is None else self.vae.quant_conv(hidden)


@dataclass
class Model:
    """A model folder in memory, in eval mode."""

    folder: Path | None
    family: str  # "text" | "labels"
    unet: nn.Module
    scheduler_config: dict[str, Any]
    sampling: Sampling
    conditioner: LabelConditioner | None = None
    objects: dict[str, int] | None = None  # label family: object name -> index
    text_encoder: nn.Module | None = None
    tokenizer: Any = None  # transformers' CLIPTokenizer
    vae: nn.Module | None = None

    def networks(self) -> dict[str, nn.Module]:
        """The modules under the names and interfaces of `signatures`."""
        if self.family == "labels":
            assert self.conditioner is not None
            return {"unet": LabelUNet(self.unet, self.conditioner).eval()}
        assert self.text_encoder is not None
        assert self.vae is not None
        return {
            "text_encoder": TextEncoder(self.text_encoder).eval(),
            "unet": TextUNet(self.unet).eval(),
            "vae_decoder": VaeDecoder(self.vae).eval(),
            "vae_encoder": VaeEncoder(self.vae).eval(),
        }

    def signatures(self) -> dict[str, Signature]:
        config: Any = self.unet.config
        size = config.sample_size
        if self.family == "labels":
            assert self.objects is not None
            return label_signatures(channels=config.out_channels, image_size=size, num_labels=len(self.objects))
        text: Any = self.text_encoder.config  # type: ignore[union-attr]
        vae: Any = self.vae.config  # type: ignore[union-attr]
        return text_signatures(
            latents=(config.in_channels, size, size),
            image_size=size * 2 ** (len(vae.block_out_channels) - 1),
            tokens=text.max_position_embeddings,
            width=text.hidden_size,
            pooled=text.hidden_size,
            vocabulary=text.vocab_size,
        )

    @cached_property
    def spec(self) -> Spec:
        """Raises InputError for a model that was never saved: its weights have no hash."""
        if self.folder is None:
            raise InputError("this model lives in memory only; save it with save_model and load the folder")
        weights = sorted(f for f in self.folder.glob("*/*.safetensors") if f.parent.name in WEIGHTS)
        hashes = {f.relative_to(self.folder).as_posix(): sha256_file(f) for f in weights}
        parts = {c: {n: h for n, h in hashes.items() if n.startswith(f"{c}/")} for c in COMPONENTS}
        return Spec(
            family=self.family,
            signatures=self.signatures(),
            sampling=self.sampling,
            scheduler_config=self.scheduler_config,
            scaling_factor=self.scaling_factor,
            objects=self.objects,
            sha256=sha256_names(hashes),
            component_sha256={component: sha256_names(part) for component, part in parts.items() if part},
        )

    def prompt_tokenizer(self) -> Tokenizer:
        backend = copy.deepcopy(self.tokenizer.backend_tokenizer)
        length = int(self.signatures()["text_encoder"].inputs[0].shape[1])
        return Tokenizer(backend, self.tokenizer.pad_token, length)

    def table(self, key: str) -> SolverTable:
        """The solver table `NAME:STEPS[:NOISE_STEPS]` of this model's noise schedule, compiled now."""
        return compile_key(key, self.scheduler_config)

    @property
    def scaling_factor(self) -> float:
        """Latents = VAE latents x this (1 in the label family, whose space is pixels)."""
        return 1.0 if self.vae is None else float(self.vae.config.scaling_factor)  # type: ignore[union-attr, arg-type]


def save_model(model: Model, folder: Path, record: Mapping[str, Any] | None = None) -> None:
    """Write the model folder (diffusers layout). `record` (how it was trained) goes into fastgen.json.

    The text family loads with StableDiffusionPipeline.from_pretrained.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _save_module(model.unet, folder / "unet")
    (folder / "scheduler").mkdir(exist_ok=True)
    write_json(folder / "scheduler" / "scheduler_config.json", model.scheduler_config)
    scheduler_class = model.scheduler_config["_class_name"]
    index: dict[str, Any] = {"scheduler": ["diffusers", scheduler_class]}
    if model.family == "labels":
        assert model.conditioner is not None
        _save_conditioner(model.conditioner, folder / "conditioner")
        write_json(folder / "labels.json", model.objects)
        index |= {"_class_name": "LabelDiffusion", "unet": ["diffusers", "UNet2DModel"]}
        index |= {"conditioner": ["fastgen.networks", "LabelConditioner"]}
    else:
        assert model.vae is not None
        assert model.text_encoder is not None
        _save_module(model.vae, folder / "vae")
        save_text_encoder(model.text_encoder, model.tokenizer, folder)
        index |= {
            "_class_name": "StableDiffusionPipeline",
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "safety_checker": [None, None],
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
        }
    sampling = {k: getattr(model.sampling, k) for k in ("scheduler", "num_inference_steps", "guidance_scale")}
    write_json(folder / SETTINGS, {"sampling": sampling, "training": dict(record or {})})
    write_json(folder / "model_index.json", index)


def _save_module(module: Any, folder: Path) -> None:
    module.save_pretrained(folder, safe_serialization=True)


def _save_conditioner(conditioner: LabelConditioner, folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in conditioner.state_dict().items()}, folder / "model.safetensors")
    write_json(folder / "config.json", conditioner.config)


def save_text_encoder(text_encoder: Any, tokenizer: Any, folder: Path) -> None:
    """text_encoder/ and tokenizer/ in the layout that transformers 4 and 5 both read: `text_model.*` weight keys (version 5
    drops the prefix, version 4 then silently keeps random weights), vocab.json and merges.txt beside tokenizer.json."""
    from safetensors.torch import save_file

    text_encoder.save_pretrained(folder / "text_encoder", safe_serialization=True)
    state = {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in text_encoder.state_dict().items()}
    state = {k: v.contiguous() for k, v in state.items() if not k.endswith("position_ids")}
    save_file(state, folder / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder / "tokenizer")
    bpe = json.loads((folder / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in bpe["merges"]]
    write_json(folder / "tokenizer" / "vocab.json", bpe["vocab"])
    lines = "\n".join(["#version: 0.2", *merges, ""])
    (folder / "tokenizer" / "merges.txt").write_text(lines, encoding="utf-8")


def load_model(folder: str | os.PathLike[str]) -> Model:
    """Load a model folder onto the CPU in float32, in eval mode.

    Raises InputError when the folder is not one, a component is missing, or a weight does not match its architecture.
    """
    folder = Path(folder)
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise InputError(f"{folder}: not a model folder (model_index.json is missing)")
    index = read_json(index_file)
    scheduler_config = read_json(folder / "scheduler" / "scheduler_config.json")
    sampling = _sampling(folder, scheduler_config)
    if "conditioner" in index:
        return _load_labels(folder, scheduler_config, sampling)
    if "text_encoder" in index and "vae" in index:
        return _load_text(folder, scheduler_config, sampling)
    kind = index.get("_class_name")
    raise InputError(f"{index_file}: {kind} is neither a text-to-latent model nor a labels-to-pixels model")


def _sampling(folder: Path, scheduler_config: Mapping[str, Any]) -> Sampling:
    if (folder / SETTINGS).is_file():
        try:
            return Sampling(**read_json(folder / SETTINGS)["sampling"])
        except (KeyError, TypeError) as error:
            raise InputError(f"{folder / SETTINGS}: sampling: malformed ({type(error).__name__}: {error})") from None
    guidance = 1.0 if (folder / "conditioner").is_dir() else 7.5
    return Sampling(default_name(scheduler_config), 50, guidance)


def _load_labels(folder: Path, scheduler_config: dict[str, Any], sampling: Sampling) -> Model:
    from diffusers import UNet2DModel

    unet = _from_pretrained(UNet2DModel, folder / "unet")
    conditioner = _load_conditioner(folder / "conditioner")
    objects = read_objects(folder / "labels.json")
    return Model(folder, "labels", unet, scheduler_config, sampling, conditioner.eval(), objects)


def _load_conditioner(folder: Path) -> LabelConditioner:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        conditioner = LabelConditioner(**read_json(folder / "config.json"))
        conditioner.load_state_dict(load_file(folder / "model.safetensors"))
    except (OSError, TypeError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder}: cannot be loaded as a conditioner: {' '.join(str(error).split())}") from None
    return conditioner


def _load_text(folder: Path, scheduler_config: dict[str, Any], sampling: Sampling) -> Model:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    return Model(
        folder,
        "text",
        _from_pretrained(UNet2DConditionModel, folder / "unet"),
        scheduler_config,
        sampling,
        text_encoder=_from_pretrained(CLIPTextModel, folder / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        vae=_from_pretrained(AutoencoderKL, folder / "vae"),
    )


def _from_pretrained(cls: Any, folder: Path) -> Any:
    """from_pretrained, float32, that refuses a missing folder and weights which do not fit, instead of warning about them."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: config.json is missing, expected a saved {cls.__name__}")
    from safetensors import SafetensorError

    try:
        module, info = cls.from_pretrained(
            folder, output_loading_info=True, use_safetensors=True, local_files_only=True, torch_dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder}: cannot be loaded as {cls.__name__}: {str(error).splitlines()[0]}") from None
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *map(str, info["mismatched_keys"])]
    wrong = [key for key in wrong if not str(key).endswith("position_ids")]
    if wrong:
        raise InputError(f"{folder}: {len(wrong)} weights do not match {cls.__name__}, the first {wrong[0]}")
    return module.eval()
