"""The UNet of a checkpoint: from its config.json, from a preset, or from both where they agree."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastgen.errors import InputError, first_line
from fastgen.presets import Preset

CLASSES = {"text": "UNet2DConditionModel", "labels": "UNet2DModel"}
KINDS = ("class_embed", "concat")  # label conditioners of a plain UNet2DModel
PATCHED = ("class_embed_type", "num_class_embeds")  # without meaning where a Linear is in place of class_embedding
MORE_CONDITIONS = ("addition_embed_type", "class_embed_type", "num_class_embeds")  # fastgen has no such text UNet
LISTED = 20


@dataclass(frozen=True)
class Architecture:
    """A UNet's class and arguments."""

    family: str  # "text" | "labels"
    config: dict[str, Any]  # every argument of the class; `class_embed_type` is None in the label family
    where: str  # its origin, for messages: "config.json" or "preset NAME"

    @property
    def class_name(self) -> str:
        return CLASSES[self.family]

    @property
    def time_embedding_dim(self) -> int:
        return int(self.config["time_embedding_dim"] or 4 * self.config["block_out_channels"][0])


def decide(config: Mapping[str, Any] | None, preset: Preset | None, path: Path) -> Architecture:
    """The architecture in config.json or the preset. Raises InputError when both are missing, when they differ (key by key),
    and for a class or a further condition that fastgen does not run."""
    if config is None and preset is None:
        raise InputError(f"{path}: a state dict does not say its architecture; name a preset or TOML file with --as")
    family = _preset_family(preset) if preset else _family(config or {}, path)
    stored = None if config is None else _arguments(config, _family(config, path), f"{path}/config.json")
    expected = None if preset is None or preset.unet is None else _arguments(preset.unet.config, family, preset.name)
    if stored is not None and expected is not None and preset is not None:
        if _family(config or {}, path) != family:
            raise InputError(f"{path}: is a {(config or {})['_class_name']}, preset {preset.name} a {CLASSES[family]}")
        stored["sample_size"] = stored["sample_size"] or expected["sample_size"]
        _compare(stored, expected, family, path, preset.name)
    arguments = stored or expected or {}
    _check(arguments, family, path)
    if family == "labels":
        arguments |= dict.fromkeys(PATCHED)
    return Architecture(family, arguments, f"preset {preset.name}" if preset and stored is None else "config.json")


def empty_unet(architecture: Architecture, class_embed_type: str | None = None) -> Any:
    """The UNet without memory for its weights; `class_embed_type` counts in the label family alone.

    Raises InputError for arguments that diffusers refuses.
    """
    import diffusers
    from accelerate import init_empty_weights

    labels = {"class_embed_type": class_embed_type} if architecture.family == "labels" else {}
    try:
        with init_empty_weights():
            return getattr(diffusers, architecture.class_name)(**architecture.config | labels).eval()
    except (ValueError, TypeError, AssertionError, RuntimeError, NotImplementedError) as error:
        raise InputError(f"{architecture.where}: {architecture.class_name} refuses it: {first_line(error)}") from None


def fill(module: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> Any:
    """Put weights of the right names and shapes into an empty module, without a copy."""
    module.load_state_dict(dict(state), strict=True, assign=True)
    return module.requires_grad_(False).eval()


def _preset_family(preset: Preset) -> str:
    if preset.family not in CLASSES:
        raise InputError(f"preset {preset.name} is of family {preset.family!r}, expected one of {', '.join(CLASSES)}")
    kind = (preset.conditioner or {}).get("kind", KINDS[0])
    if kind not in KINDS:
        raise InputError(f"preset {preset.name}: conditioner.kind {kind!r} cannot be imported, only {', '.join(KINDS)}")
    return preset.family


def _family(config: Mapping[str, Any], path: Path) -> str:
    name = config.get("_class_name")
    for family, class_name in CLASSES.items():
        if name == class_name:
            return family
    raise InputError(f"{path}/config.json: _class_name is {name!r}, expected {' or '.join(CLASSES.values())}")


def _arguments(config: Mapping[str, Any], family: str, where: str) -> dict[str, Any]:
    """All arguments of the family's class: those of the config, else the defaults."""
    import diffusers

    parameters = inspect.signature(getattr(diffusers, CLASSES[family]).__init__).parameters
    known = {name: _plain(p.default) for name, p in parameters.items() if name != "self"}
    arguments = {k: _plain(v) for k, v in config.items() if not k.startswith("_")}
    if foreign := [k for k, v in arguments.items() if k not in known and v]:
        raise InputError(f"{where}: {CLASSES[family]} of diffusers {diffusers.__version__} has no {', '.join(foreign)}")
    return known | {k: v for k, v in arguments.items() if k in known}


def _plain(value: Any) -> Any:
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _compare(stored: Mapping[str, Any], expected: Mapping[str, Any], family: str, path: Path, preset: str) -> None:
    ignored = PATCHED if family == "labels" else ()
    different = [key for key in expected if key not in ignored and stored[key] != expected[key]]
    if different:
        listed = [f"{key} = {stored[key]!r}, preset {expected[key]!r}" for key in different[:LISTED]]
        more = f"; {len(different) - LISTED} more" if len(different) > LISTED else ""
        where = f"{path}/config.json differs from preset {preset}"
        raise InputError(f"{where}: {'; '.join(listed)}{more}; leave --as out to go by config.json")


def _check(config: dict[str, Any], family: str, path: Path) -> None:
    size = config["sample_size"]
    if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
        size = config["sample_size"] = size[0]
    if not isinstance(size, int):
        raise InputError(f"{path}: sample_size is {size!r}, expected a whole number; a preset (--as) can say it")
    if more := [key for key in MORE_CONDITIONS if family == "text" and config[key] is not None]:
        raise InputError(f"{path}: {more[0]} = {config[more[0]]!r}: this UNet takes conditions besides the text")
