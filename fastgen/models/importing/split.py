"""A state dict split into the UNet's weights, the label conditioner's, and the rest."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastgen.errors import InputError, unknown
from fastgen.models.importing.weight_files import LISTED, UNET_MARK, WeightFile

OLD_ATTENTION = re.compile(r"^(.*\battentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)$")
NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class MismatchError(InputError):
    """Weights do not fit an architecture. `mismatches` has a line per key; the message has the first three."""

    def __init__(self, where: str, mismatches: Sequence[str]) -> None:
        self.mismatches = tuple(mismatches)
        more = f"; {len(mismatches) - 3} more" if len(mismatches) > 3 else ""
        super().__init__(f"{where}: {len(mismatches)} weights do not match: {'; '.join(mismatches[:3])}{more}")

    def lines(self) -> list[str]:
        """One line per key, the first 20, then how many more."""
        more = len(self.mismatches) - LISTED
        return [*self.mismatches[:LISTED], *([f"... and {more} more"] if more > 0 else [])]


@dataclass(frozen=True)
class SplitWeights:
    unet: dict[str, Tensor]  # keys without `prefix`
    rest: dict[str, Tensor]  # of what is beside the UNet, full keys
    prefix: str
    notes: tuple[str, ...]


def split(checkpoint: WeightFile) -> SplitWeights:
    """Find the UNet in a state dict by its keys, whatever prefix they have, and rename the keys of old diffusers.

    Raises InputError when there is none, or several and `key` names none of them.
    """
    state, key = checkpoint.state, checkpoint.key
    prefixes = [k.removesuffix(UNET_MARK) for k in state if k.endswith(UNET_MARK)]
    if not prefixes:
        raise _foreign(checkpoint)
    names = [prefix.removesuffix(".") for prefix in prefixes]
    if key is not None and key not in names:
        raise unknown(f"UNet in {checkpoint.path}:", key, names)
    if key is None and len(prefixes) > 1:
        raise InputError(f"{checkpoint.path}: holds several UNets, choose one with --key: {', '.join(names)}")
    prefix = prefixes[names.index(key)] if key is not None else prefixes[0]
    unet = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)} if prefix else dict(state)
    rest = {k: v for k, v in state.items() if not any(k.startswith(p) for p in prefixes)}
    unet, renamed = _renamed(unet)
    notes = [f"the UNet lies below {prefix}*"] if prefix else []
    if renamed:
        notes.append(f"{renamed} attention keys of old diffusers renamed (query, key, value, proj_attn)")
    return SplitWeights(unet, rest, prefix, tuple(notes))


def mismatches(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], prefix: str = "") -> list[str]:
    """A line for each weight that is missing, unexpected, or of another shape."""
    lines = [f"missing {prefix}{k} {tuple(v.shape)}" for k, v in expected.items() if k not in state]
    for key, value in state.items():
        if key not in expected:
            lines.append(f"unexpected {prefix}{key} {tuple(value.shape)}")
        elif value.shape != expected[key].shape:
            lines.append(f"shape {prefix}{key}: found {tuple(value.shape)}, expected {tuple(expected[key].shape)}")
    return lines


def _renamed(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """The state with new names of attention layers, as diffusers' `_fix_state_dict_keys_on_load` gives them; their number."""
    renamed = {}
    for key, value in state.items():
        old = OLD_ATTENTION.match(key)
        renamed[f"{old[1]}.{NEW_ATTENTION[old[2]]}.{old[3]}" if old else key] = value
    return renamed, sum(OLD_ATTENTION.match(key) is not None for key in state)


def _foreign(checkpoint: WeightFile) -> InputError:
    keys = [f"unexpected {k} {tuple(v.shape)}" for k, v in checkpoint.state.items()]
    script = "convert_original_stable_diffusion_to_diffusers.py"
    compvis = any(".input_blocks." in f".{k}" for k in checkpoint.state)
    hint = f" (these are CompVis's keys: convert it with diffusers' {script})" if compvis else ""
    where = f"{checkpoint.path}: no diffusers UNet, which has {UNET_MARK}{hint}"
    return MismatchError(where, [f"missing {UNET_MARK}", *keys])


@dataclass(frozen=True)
class LabelWeights:
    """The layers between the multi-hot labels and their embedding: one Linear, or two with an activation between them."""

    name: str  # of the module in the checkpoint
    layers: tuple[dict[str, Tensor], ...]  # {"weight": (out, in), "bias": (out,)}

    @property
    def num_labels(self) -> int:
        return self.layers[0]["weight"].shape[1]

    @property
    def dim(self) -> int:
        return self.layers[-1]["weight"].shape[0]

    @property
    def hidden(self) -> int:
        return self.layers[0]["weight"].shape[0] if len(self.layers) > 1 else 0

    def state(self) -> dict[str, Tensor]:
        """The state dict of a `LabelConditioner`."""
        names = ("embed",) if len(self.layers) == 1 else ("embed.0", "embed.2")
        return {f"{name}.{k}": v for name, layer in zip(names, self.layers, strict=True) for k, v in layer.items()}

    def module(self) -> nn.Module:
        """The layers as plain torch modules."""
        linears = []
        for layer in self.layers:
            out, inside = layer["weight"].shape
            linears.append(nn.Linear(inside, out, device="meta"))
            linears[-1].load_state_dict(layer, assign=True)
        return linears[0] if len(linears) == 1 else nn.Sequential(linears[0], nn.SiLU(), linears[1])

    def __str__(self) -> str:
        kind = f"Linear-SiLU-Linear conditioner ({self.hidden} wide)" if self.hidden else "Linear conditioner"
        return f"{kind} of {self.num_labels} labels"


def find_label_layers(state: Mapping[str, Tensor], where: Path | str) -> LabelWeights | None:
    """The one Linear, or the chain of two, that these tensors are; None for no tensors. Raises MismatchError for others."""
    if not state:
        return None
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        layer, _, kind = key.rpartition(".")
        groups.setdefault(layer, {})[kind] = value
    names = sorted(groups)
    layers = [groups[name] for name in names]
    linear = len(layers) <= 2 and all(map(_is_linear, layers))
    if not linear or (len(layers) == 2 and len(layers[0]["weight"]) != layers[1]["weight"].shape[1]):
        shapes = [f"unexpected {k} {tuple(v.shape)}" for k, v in state.items()]
        raise MismatchError(f"{where}: beside the UNet, a label conditioner is one Linear or a chain of two", shapes)
    complete = [{"weight": x["weight"], "bias": x.get("bias", torch.zeros(len(x["weight"])))} for x in layers]
    name = names[0] if len(names) == 1 else names[0].rpartition(".")[0]
    return LabelWeights(name or "its Linear", tuple(complete))


def _is_linear(layer: Mapping[str, Tensor]) -> bool:
    weight, bias = layer.get("weight"), layer.get("bias")
    sizes = weight is not None and weight.ndim == 2 and (bias is None or bias.shape == weight.shape[:1])
    return sizes and layer.keys() <= {"weight", "bias"}
