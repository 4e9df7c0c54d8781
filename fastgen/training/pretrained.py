"""`train.pretrained` of a network: its training begins with the weights of a model that is there already."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastgen.errors import InputError
from fastgen.files.jsonfiles import brief
from fastgen.models import evaluator
from fastgen.models.find import find_folder, find_model, name_of
from fastgen.models.folder import Model, load_model
from fastgen.models.weights import load_state, weights_hash
from fastgen.presets import Preset
from fastgen.training.diffusion import NoiseSchedule
from fastgen.training.logs import say

# Keys of a config that say nothing of what a network computes from its weights; the factor is measured after training.
APART = (
    "sample_size",
    "scaling_factor",
    "_name_or_path",
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
)


def source_of(preset: Preset, name: str) -> Model | None:
    """The model whose weights the network `name` of a preset begins with. Raises InputError for what is no model folder."""
    part = getattr(preset, name)
    if part is None or part.train is None or part.train.pretrained is None:
        return None
    found = find_model(os.path.expanduser(part.train.pretrained))
    if found.bundle is not None:
        raise InputError(f"{name}.train.pretrained: {name_of(found.folder)} is a bundle, expected a model folder")
    return load_model(found.folder)


def begin_network(network: nn.Module, source: Model, name: str) -> str:
    """Put the weights of the network `name` ("vae", "text_encoder", "unet", "conditioner") of `source` into `network`, and
    return their hash. Raises InputError where `source` has no such network, or a different one."""
    given = next(iter(source.text_encoders), None) if name == "text_encoder" else getattr(source, name)
    where = f"{name}.train.pretrained = {_named(source)}"
    if given is None:
        raise InputError(f"{where}: this model has no {name}")
    if type(given).__name__ != type(network).__name__:
        raise InputError(f"{where}: its {name} is a {type(given).__name__}, the preset's a {type(network).__name__}")
    ours, theirs = _settings(network), _settings(given)
    for key in sorted(ours.keys() | theirs.keys()):
        found, expected = ours.get(key), theirs.get(key)
        if found != expected:
            raise InputError(f"{name}.config.{key}: found {brief(found)}, {_named(source)} has {brief(expected)}")
    load_state(network, given.state_dict(), Path(_named(source)), f"the preset's {name}")
    return weights_hash(network)


def begin_unet(model: Model, preset: Preset, source: Model) -> str:
    """`begin_network` for the denoiser of `model`, with its conditioner where it has one. What else the weights were trained
    for, the noise schedule and the networks around them, may be changed: a line says so.

    Raises InputError also for labels of another name or order.
    """
    where = f"unet.train.pretrained = {_named(source)}"
    if model.conditioner is None and source.conditioner is not None:
        raise InputError(f"{where}: this model has a conditioner for labels, the preset none")
    digest = begin_network(model.unet, source, "unet")
    if model.conditioner is not None:
        if model.names != source.names:
            missing = sorted(set(model.names or {}) ^ set(source.names or {}))
            difference = f"not in both: {brief(missing)}" if missing else "the same names, in another order"
            raise InputError(f"{where}: its labels are not those of the data ({difference})")
        digest = f"{digest} {begin_network(model.conditioner, source, 'conditioner')}"
    if not _same_noise(preset.scheduler, source.scheduler_config):
        say(f"{where}: its noise schedule or prediction_type is another than the preset's")
    pairs = {
        "vae": (model.vae, source.vae),
        "text_encoder": (next(iter(model.text_encoders), None), next(iter(source.text_encoders), None)),
    }
    for name, (ours, theirs) in pairs.items():
        if _hash(ours) != _hash(theirs):
            say(f"{where}: was trained with another {name}; `--set {name}.path={_named(source)}` takes its own")
    return digest


def begin_evaluator(module: evaluator.ResNet18, path: str, outputs: Mapping[str, Any]) -> str:
    """Put the weights of the evaluator in `path`, a folder or a shipped name, into `module`, and return their hash.

    Raises InputError for another architecture, and for other objects or attributes."""
    given = evaluator.load(find_folder(os.path.expanduser(path)))
    known = given.attributes or given.objects
    if known is not None and dict(known) != dict(outputs):
        raise InputError(f"evaluator.train.pretrained = {path}: its objects or attributes are not those of the data")
    load_state(module, given.module.state_dict(), Path(path), "the preset's evaluator")
    return weights_hash(module)


def _hash(network: nn.Module | None) -> str | None:
    return None if network is None else weights_hash(network)


def _named(source: Model) -> str:
    assert source.folder is not None
    return name_of(source.folder)


def _settings(network: Any) -> dict[str, Any]:
    """What a network was built from, as plain values."""
    config = network.config
    config = dict(config) if isinstance(config, Mapping) else config.to_dict()
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in config.items()
        if key not in APART and not (key.startswith("_") or value is None)
    }


def _same_noise(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    a, b = NoiseSchedule(ours), NoiseSchedule(theirs)
    steps = torch.arange(a.count)
    return (a.count, a.prediction_type) == (b.count, b.prediction_type) and torch.equal(
        a.alphas_cumprod(steps), b.alphas_cumprod(steps)
    )
