"""The ONNX graph of a network, traced once: torch takes seconds or minutes for a trace, and a copy is the same bytes."""

from __future__ import annotations

import enum
import hashlib
import shutil
import types
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from msgspec import Struct

PLAIN = (str, bytes, int, float, complex, bool, type(None), enum.Enum, torch.dtype, torch.device, torch.Size, Path)
CODE = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType)
# Of a config: the folder that it was read from, and the names of what it left out, in no order. No graph holds them.
IGNORED = {"_name_or_path", "name_or_path", "_use_default_values"}


def digest(module: Any, signature: Any, name: str, dtype: str) -> str:
    """SHA-256 of all that `export_onnx` makes a graph from: the classes, attributes, weights and buffers of `module` and of its
    parts, the signature, the file's name and the precision. What cannot be described is never the same twice.
    """
    found = hashlib.sha256()
    _describe((module, signature, name, dtype), found.update, {})
    return found.hexdigest()


def _describe(value: Any, tell: Callable[[bytes], object], seen: dict[int, tuple[int, Any]]) -> None:
    if isinstance(value, PLAIN):
        return _word(f"{type(value).__qualname__} {value!r}", tell)
    if id(value) in seen:
        return _word(f"the {seen[id(value)][0]}th", tell)
    seen[id(value)] = len(seen), value  # kept, so that no other object gets its id
    if isinstance(value, CODE):
        _word(f"{getattr(value, '__module__', '')} {getattr(value, '__qualname__', value.__name__)}", tell)
        if isinstance(value, types.FunctionType):
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            _describe_all((value.__code__, value.__defaults__, value.__kwdefaults__, *cells), tell, seen)
        return None
    _word(f"{type(value).__module__}.{type(value).__qualname__}", tell)
    if isinstance(value, torch.Tensor):
        _word(f"{value.dtype} {tuple(value.shape)} {value.requires_grad}", tell)
        tell(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, types.CodeType):
        _describe_all((value.co_code, value.co_names, value.co_consts), tell, seen)
    elif isinstance(value, list | tuple):
        _describe_all(value, tell, seen)
    elif isinstance(value, set | frozenset):
        _describe_all(sorted(value, key=repr), tell, seen)
    elif isinstance(value, types.MethodType):
        _describe_all((value.__func__, value.__self__), tell, seen)
    elif isinstance(value, partial):
        _describe_all((value.func, value.args, value.keywords), tell, seen)
    elif isinstance(value, Struct):
        _describe_all([getattr(value, field) for field in value.__struct_fields__], tell, seen)
    elif isinstance(value, Mapping) or hasattr(value, "__dict__"):
        if isinstance(value, torch.nn.Module):
            _describe(type(value).forward, tell, seen)
        items = [*(value.items() if isinstance(value, Mapping) else ()), *getattr(value, "__dict__", {}).items()]
        _describe_all([item for item in items if item[0] not in IGNORED], tell, seen)
    else:
        _word(f"{value!r} {uuid.uuid4()}", tell)
    return None


def _describe_all(values: Any, tell: Callable[[bytes], object], seen: dict[int, tuple[int, Any]]) -> None:
    _word(str(len(values)), tell)
    for value in values:
        _describe(value, tell, seen)


def _word(text: str, tell: Callable[[bytes], object]) -> None:
    tell(f"{len(text)} {text}\n".encode())


def copying(trace: Callable[..., None], kept: Callable[[str, Callable[[Path], None]], Path]) -> Callable[..., None]:
    """`trace`, which is `export_onnx`, for which `kept(name, fill)` keeps a folder of every graph that it has made."""

    def export_onnx(module: Any, signature: Any, path: Path, dtype: str = "fp32") -> None:
        name = digest(module, signature, path.name, dtype)
        folder = kept(name, lambda folder: trace(module, signature, folder / path.name, dtype))
        shutil.copytree(folder, path.parent, dirs_exist_ok=True)

    return export_onnx
