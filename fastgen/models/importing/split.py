"""A state dict split into the UNet's weights, the label conditioner's, and the rest."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

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


def split(checkpoint: WeightFile, mark: str = UNET_MARK) -> SplitWeights:
    """Find the denoiser in a state dict by its key `mark`, whatever prefix it has, and rename the keys of old diffusers.

    Raises InputError when there is none, or several and `key` names none of them.
    """
    state, key = checkpoint.state, checkpoint.key
    prefixes = [k.removesuffix(mark) for k in state if k.endswith(mark)]
    if not prefixes:
        raise _foreign(checkpoint, mark)
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


def _foreign(checkpoint: WeightFile, mark: str) -> InputError:
    keys = [f"unexpected {k} {tuple(v.shape)}" for k, v in checkpoint.state.items()]
    script = "convert_original_stable_diffusion_to_diffusers.py"
    compvis = any(".input_blocks." in f".{k}" for k in checkpoint.state)
    hint = f" (these are CompVis's keys: convert it with diffusers' {script})" if compvis else ""
    where = f"{checkpoint.path}: no diffusers UNet, which has {mark}{hint}"
    return MismatchError(where, [f"missing {mark}", *keys])
