"""The networks of a preset: built with fresh weights from their class's own keyword arguments, or loaded and frozen."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastgen.errors import InputError, first_line, unknown
from fastgen.files.records import to_record
from fastgen.models.configs import DIFFUSERS, DiffusersConfig
from fastgen.models.find import find_folder
from fastgen.models.loaders import WHOLE_CLIP, pretrained, pretrained_tokenizer
from fastgen.presets import NetworkPreset

# What classes of diffusers and transformers raise for values that they cannot use.
REFUSALS = (ValueError, TypeError, AssertionError, RuntimeError, ArithmeticError, LookupError, AttributeError)
MAX_WEIGHTS = 10_000_000_000  # 40 GB; training takes four times as much


def build_module(cls: Any, config: Mapping[str, Any], name: str, seed: int) -> Any:
    """`cls(**config)`, a diffusers model, with weights that depend on the seed alone.

    Raises InputError, which names `{name}.config`, for an argument that `cls` does not have, and for values that it refuses.
    """
    _check_keys(config, [p for p in inspect.signature(cls.__init__).parameters if p != "self"], name)
    to_record(
        {key: value for key, value in config.items() if key in DIFFUSERS}, DiffusersConfig, field=f"{name}.config"
    )
    try:
        with torch.device("meta"):
            weights = sum(parameter.numel() for parameter in cls(**config).parameters())
        if weights > MAX_WEIGHTS:
            raise InputError(f"{name}.config: describes {weights:,} weights, expected at most {MAX_WEIGHTS:,}")
        torch.manual_seed(seed)
        return calm_start(cls(**config))
    except REFUSALS as error:
        raise InputError(f"{name}.config: {cls.__name__} refuses it: {first_line(error)}") from None


@torch.no_grad()
def calm_start(module: Any) -> Any:
    """Set the last layer of each residual branch and of a UNet to 0 (Dhariwal & Nichol, 2021), and a VAE's log-variance to
    about -6, a deviation of exp(-3): the network learns faster."""
    from diffusers import Transformer2DModel
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D

    for part in module.modules():
        kind = type(part)
        if kind is ResnetBlock2D:
            _zero(part.conv2)
        elif kind is Transformer2DModel:
            _zero(part.proj_out)
        elif kind is Attention and part.residual_connection:
            _zero(part.to_out[0])
    if hasattr(module, "quant_conv"):
        if module.quant_conv is not None:
            logvar = slice(module.config.latent_channels, None)
            module.quant_conv.weight[logvar] *= 0.1
            module.quant_conv.bias[logvar] = -6
    elif hasattr(module, "conv_out"):
        _zero(module.conv_out)
    return module


def _zero(layer: Any) -> None:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def build_text_encoder(config: Mapping[str, Any], tokenizer: Any, seed: int) -> Any:
    """A CLIPTextModel for the tokenizer's vocabulary and special tokens, with weights that depend on the seed alone.

    Raises InputError for an argument that CLIPTextConfig does not have, and for values that CLIPTextModel refuses.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    known = CLIPTextConfig().to_dict()
    _check_keys(config, known, "text_encoder")
    names = ("bos_token_id", "eos_token_id", "pad_token_id")  # pooler_output is the state at the end token
    tokens = {"vocab_size": len(tokenizer), **{name: getattr(tokenizer, name) for name in names}}
    settings = {"projection_dim": config.get("hidden_size", known["hidden_size"]), **config, **tokens}
    torch.manual_seed(seed)
    try:
        return CLIPTextModel(CLIPTextConfig(**settings))
    except REFUSALS as error:
        raise InputError(f"text_encoder.config: CLIPTextModel refuses it: {first_line(error)}") from None


def load_vae(network: NetworkPreset, *, local_files_only: bool = False) -> Any:
    """A frozen AutoencoderKL, float32, from a folder or hub id, or the `vae` of a whole model folder."""
    from diffusers import AutoencoderKL

    return _frozen(AutoencoderKL, network, "vae", local_files_only)


def load_text_encoder(network: NetworkPreset, *, local_files_only: bool = False) -> tuple[Any, Any]:
    """(CLIPTextModel, CLIPTokenizer), frozen; the tokenizer lies beside the weights, or in `tokenizer` beside
    `text_encoder` in a whole model folder."""
    from transformers import CLIPTextModel

    encoder = _frozen(CLIPTextModel, network, "text_encoder", local_files_only)
    subfolder = _subfolder(network, "text_encoder")
    beside = "tokenizer" if subfolder == "text_encoder" else subfolder
    where = f"text_encoder.path = {network.path!r}"
    return encoder, pretrained_tokenizer(
        _source(network), where, subfolder=beside or "", local_files_only=local_files_only
    )


def _frozen(cls: Any, network: NetworkPreset, name: str, local_files_only: bool) -> Any:
    subfolder = _subfolder(network, name)
    options: dict[str, Any] = {"local_files_only": local_files_only} | ({"subfolder": subfolder} if subfolder else {})
    where = f"{name}.path = {network.path!r}"
    try:
        module = pretrained(cls, _source(network), where, lambda key: key.startswith(WHOLE_CLIP), **options)
    except InputError as error:  # of one of the folder's files, or of the folder
        raise InputError(f"{where}: {str(error).removeprefix(f'{where}: ')}") from None
    if hasattr(module, "register_to_config"):  # diffusers would save where on this machine it came from
        module.register_to_config(_name_or_path="")
    return module.requires_grad_(False)


def _source(network: NetworkPreset) -> str:
    """The folder of a network that is loaded: `path`, a shipped model's where it is the name of one; else a hub id."""
    return str(find_folder(os.path.expanduser(str(network.path))))


def _subfolder(network: NetworkPreset, name: str) -> str | None:
    if network.subfolder is None and network.path and (Path(_source(network)) / name).is_dir():
        return name
    return network.subfolder


def _check_keys(config: Mapping[str, Any], known: Iterable[str], name: str) -> None:
    choices = [f"{name}.config.{key}" for key in known]
    for key in config:
        if f"{name}.config.{key}" not in choices:
            raise unknown("key", f"{name}.config.{key}", choices)
