"""The denoiser of a checkpoint: from its config.json, from a preset, or from both where they agree."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastgen.errors import InputError, first_line
from fastgen.models.layout import DENOISERS, LEGACY
from fastgen.presets import Preset

CLASSES = DENOISERS[:3]  # of diffusers
KINDS = ("class_embed", "concat", "tokens")  # label conditioners of networks of diffusers
OWN = ("class_embed_type", "num_class_embeds")  # without meaning where a Linear is in place of class_embedding
LISTED = 20


@dataclass(frozen=True)
class Architecture:
    """A denoiser's class and arguments. `native`: its own class embedding, as `class_embed_type` and `num_class_embeds` say, is
    used; else these two are None in `config`, and what lies at class_embedding is a conditioner."""

    class_name: str
    config: dict[str, Any]  # every argument of the class
    where: str  # its origin, for messages: "config.json" or "preset NAME"
    native: bool

    @property
    def time_embedding_dim(self) -> int:
        return int(self.config.get("time_embedding_dim") or 4 * self.config["block_out_channels"][0])

    @property
    def states_width(self) -> int:
        """Width of the states that cross-attention takes; 0 for a network without it."""
        width = self.config.get("encoder_hid_dim") or self.config.get("cross_attention_dim")
        return int(width) if isinstance(width, int) and self.class_name == "UNet2DConditionModel" else 0


def decide(config: Mapping[str, Any] | None, preset: Preset | None, path: Path) -> Architecture:
    """The architecture in config.json or the preset. Raises InputError when both are missing, when they differ (key by key),
    and for a class that fastgen does not run."""
    if config is None and preset is None:
        raise InputError(f"{path}: a state dict does not say its architecture; name a preset or TOML file with --as")
    stored = None if config is None else _arguments(config, _class(config, path), f"{path}/config.json")
    name = _preset_class(preset) if preset else _class(config or {}, path)
    expected = None if preset is None or preset.unet is None else _arguments(preset.unet.config, name, preset.name)
    if stored is not None and expected is not None and preset is not None:
        if _class(config or {}, path) != name:
            raise InputError(f"{path}: is a {(config or {})['_class_name']}, preset {preset.name} a {name}")
        stored["sample_size"] = stored["sample_size"] or expected["sample_size"]
        _compare(stored, expected, path, preset)
    arguments = stored or expected or {}
    if arguments["sample_size"] is None:
        raise InputError(
            f"{path}: sample_size is None, expected the size that it was trained at; a preset (--as) can say it"
        )
    declared = any(arguments.get(key) is not None for key in OWN) and arguments.get("class_embed_type") != "identity"
    native = declared and not (preset and preset.conditioner)
    if not native:
        arguments |= {key: None for key in OWN if key in arguments}
    where = f"preset {preset.name}" if preset and stored is None else "config.json"
    return Architecture(name, arguments, where, native or name == "DiTTransformer2DModel")


def empty_network(architecture: Architecture, class_embed_type: str | None = None) -> Any:
    """The network without memory for its weights. `class_embed_type`: in place of its own, where that is None.

    Raises InputError for arguments that diffusers refuses.
    """
    import diffusers
    from accelerate import init_empty_weights

    own = (
        {"class_embed_type": class_embed_type} if class_embed_type and "class_embed_type" in architecture.config else {}
    )
    try:
        with init_empty_weights():
            return getattr(diffusers, architecture.class_name)(**architecture.config | own).eval()
    except (ValueError, TypeError, AssertionError, RuntimeError, NotImplementedError) as error:
        raise InputError(f"{architecture.where}: {architecture.class_name} refuses it: {first_line(error)}") from None


def fill(module: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> Any:
    """Put weights of the right names and shapes into an empty module, without a copy."""
    module.load_state_dict(dict(state), strict=True, assign=True)
    return module.requires_grad_(False).eval()


def _preset_class(preset: Preset) -> str:
    """The class of diffusers that a preset's UNet is. Raises InputError for an evaluator, and for a UNet of fastgen's own."""
    if preset.unet is None:
        raise InputError(f"preset {preset.name} describes an evaluator, expected a diffusion model")
    kind = (preset.conditioner or {}).get("kind", KINDS[0])
    if kind not in KINDS:
        raise InputError(f"preset {preset.name}: conditioner.kind {kind!r} cannot be imported, only {', '.join(KINDS)}")
    crosses = preset.text_encoder is not None or kind == "tokens" or "cross_attention_dim" in preset.unet.config
    return "UNet2DConditionModel" if crosses else "UNet2DModel"


def _class(config: Mapping[str, Any], path: Path) -> str:
    name = config.get("_class_name")
    if name == LEGACY[0] and config.get("norm_type") == "ada_norm_zero":
        return LEGACY[1]
    if name not in CLASSES:
        raise InputError(f"{path}/config.json: _class_name is {name!r}, expected {', '.join(CLASSES)}")
    return str(name)


def _arguments(config: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """All arguments of the class: those of the config, else the defaults."""
    import diffusers

    from fastgen.models.configs import AVERAGED, WRITTEN

    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    known = {key: _plain(p.default) for key, p in parameters.items() if key != "self"}
    arguments = {k: _plain(v) for k, v in config.items() if not k.startswith("_")}
    harmless = (*AVERAGED, *WRITTEN.get(name, ()))
    if foreign := [k for k, v in arguments.items() if k not in known and v and k not in harmless]:
        raise InputError(f"{where}: {name} of diffusers {diffusers.__version__} has no {', '.join(foreign)}")
    return known | {k: v for k, v in arguments.items() if k in known}


def _plain(value: Any) -> Any:
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _compare(stored: Mapping[str, Any], expected: Mapping[str, Any], path: Path, preset: Preset) -> None:
    ignored = OWN if preset.conditioner else ()
    different = [key for key in expected if key not in ignored and stored[key] != expected[key]]
    if different:
        listed = [f"{key} = {stored[key]!r}, preset {expected[key]!r}" for key in different[:LISTED]]
        more = f"; {len(different) - LISTED} more" if len(different) > LISTED else ""
        where = f"{path}/config.json differs from preset {preset.name}"
        raise InputError(f"{where}: {'; '.join(listed)}{more}; leave --as out to go by config.json")
