"""Checkpoint files of any kind -> one flat state dict of float32 tensors, with notes on what was left out or changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.errors import InputError, unknown
from fastgen.files.jsonfiles import read_json
from fastgen.models.tensor_files import read_safetensors
from fastgen.models.weight_choice import shard_files
from fastgen.models.weights import PICKLES, unpickle

WEIGHTS = "diffusion_pytorch_model"
FOLDER_FILES = tuple(WEIGHTS + end for end in (".safetensors", ".safetensors.index.json", ".fp16.safetensors", ".bin"))
WRAPPERS = {"module": "DataParallel or accelerate", "_orig_mod": "torch.compile"}  # key components they insert
UNET_MARK = "time_embedding.linear_1.weight"  # a key of every diffusers UNet
LISTED = 20


@dataclass(frozen=True)
class WeightFile:
    """A checkpoint in memory."""

    path: Path
    files: tuple[Path, ...]
    state: dict[str, Tensor]  # float32, on the CPU
    config: Mapping[str, Any] | None  # config.json of the folder
    key: str | None  # the caller's key, where it names no state dict: then it names the UNet inside `state`
    notes: tuple[str, ...]


def read_checkpoint(path: Path, *, key: str | None = None, allow_pickle: bool = False) -> WeightFile:
    """Read a folder that save_pretrained wrote, a .safetensors file, or a PyTorch pickle (with `allow_pickle`, and then nothing
    but tensors and plain containers). `key` names the state dict, where a pickle holds several.

    Raises InputError for a file that is missing, damaged, refused, without tensors, or with NaN or infinity in them.
    """
    config: Mapping[str, Any] | None = None
    files: tuple[Path, ...] = (path,)
    notes: list[str] = []
    if path.is_dir():
        folder = _unet_folder(path, notes)
        config, files = read_json(folder / "config.json"), _weight_files(folder)
    elif not path.is_file():
        raise InputError(f"{path}: not found, expected a folder or a file with a checkpoint")
    state: dict[str, Any] = {}
    for file in files:
        part, key = _read_file(file, key, allow_pickle, notes)
        state |= part
    return WeightFile(path, files, _plain(state, path, notes), config, key, tuple(notes))


def read_tensors(text: str, allow_pickle: bool = False) -> dict[str, Tensor]:
    """The tensors of `FILE[:KEY]`; raises as `read_checkpoint` does."""
    path, key = split_name(text)
    return read_checkpoint(Path(path), key=key, allow_pickle=allow_pickle).state


def split_name(text: str) -> tuple[str, str | None]:
    """`PATH_OR_ID[:PART]` -> (path or id, part); a path that exists is never split."""
    before, colon, after = text.rpartition(":")
    return (text, None) if Path(text).exists() or not (colon and before and after) else (before, after)


def _unet_folder(folder: Path, notes: list[str]) -> Path:
    if (folder / "model_index.json").is_file():
        raise InputError(f"{folder}: is a whole model folder already, which needs no import: `fastgen export {folder}`")
    if (folder / "config.json").is_file():
        return folder
    inside = sorted(f.parent for f in folder.glob("unet*/config.json"))
    if len(inside) == 1:
        notes.append(f"read from its folder {inside[0].name}/")
        return inside[0]
    if inside:
        raise InputError(f"{folder}: holds several networks; name one: {', '.join(map(str, inside))}")
    raise InputError(f"{folder}: config.json is missing, expected a folder that save_pretrained wrote")


def _weight_files(folder: Path) -> tuple[Path, ...]:
    for name in FOLDER_FILES:
        file = folder / name
        if file.is_file() and name.endswith(".json"):
            return shard_files(file)
        if file.is_file():
            return (file,)
    raise InputError(f"{folder}: holds no weights, expected one of {', '.join(FOLDER_FILES)}")


def _read_file(
    path: Path, key: str | None, allow_pickle: bool, notes: list[str]
) -> tuple[Mapping[str, Any], str | None]:
    if path.suffix == ".safetensors":
        return read_safetensors(path), key
    if path.suffix not in PICKLES:
        raise InputError(f"{path}: expected a folder, a .safetensors file or one of {', '.join(PICKLES)}")
    return _select(unpickle(path, allow_pickle), key, path, notes)


def _select(content: Any, key: str | None, path: Path, notes: list[str]) -> tuple[Mapping[str, Any], str | None]:
    """The state dict in the content of a pickle; and the key, where it names no state dict."""
    states = dict(_state_dicts(content))
    if not states:
        keys = f"a dict of {', '.join(map(str, list(content)[:LISTED]))}" if isinstance(content, Mapping) else None
        raise InputError(f"{path}: holds no state dict, but {keys or f'a {type(content).__name__}'}")
    if key in states:
        return states[key], None
    networks = [name for name, state in states.items() if any(str(k).endswith(UNET_MARK) for k in state)]
    candidates = networks if len(networks) == 1 else list(states)
    if len(candidates) == 1:
        if candidates[0]:
            notes.append(f"state dict read from its key {candidates[0]!r}")
        return states[candidates[0]], key
    if key is not None:
        raise unknown(f"state dict in {path}:", key, states)
    listed = ", ".join(f"{name} ({len(state)} entries)" for name, state in states.items())
    raise InputError(f"{path}: holds several state dicts, choose one with --key: {listed}")


def _state_dicts(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(dotted key, state dict) for the state dicts in nested dicts, without those of an optimiser."""
    if not isinstance(value, Mapping) or depth > 3 or not all(isinstance(k, str) for k in value):
        return
    inner = [pair for k, v in value.items() for pair in _state_dicts(v, f"{name}.{k}" if name else k, depth + 1)]
    if inner:
        yield from inner
    elif any(isinstance(v, Tensor) for v in value.values()) and (not name or any("." in k for k in value)):
        yield name, value


def _plain(state: Mapping[str, Any], path: Path, notes: list[str]) -> dict[str, Tensor]:
    """Float32 tensors under keys without wrappers."""
    if others := [k for k, v in state.items() if not isinstance(v, Tensor)]:
        notes.append(f"entries that are no tensors, left out: {', '.join(others[:LISTED])}")
    plain: dict[str, Tensor] = {}
    stored: Counter[str] = Counter()
    wrapped: Counter[str] = Counter()
    for key, tensor in state.items():
        if key in others:
            continue
        parts = key.split(".")
        wrapped.update(set(parts) & WRAPPERS.keys())
        name = ".".join(part for part in parts if part not in WRAPPERS)
        if name in plain:
            raise InputError(f"{path}: {name} occurs twice, the second time as {key}")
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            stored[str(tensor.dtype).removeprefix("torch.")] += 1
            tensor = tensor.float()
        plain[name] = tensor
    notes += [f"{n} keys: {part}. removed, which {WRAPPERS[part]} inserts" for part, n in wrapped.items()]
    notes += [f"{n} weights stored as {dtype}, converted to float32" for dtype, n in stored.items()]
    if broken := [k for k, v in plain.items() if v.is_floating_point() and not v.isfinite().all()]:
        raise InputError(f"{path}: NaN or infinity in {len(broken)} weights, such as {broken[0]}; take another one")
    return plain
