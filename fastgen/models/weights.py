"""Weights: reading files of tensors, loading them strictly, the hash of a module."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.errors import InputError
from fastgen.models.tensor_files import check_regular, read_safetensors

PICKLES = (".pth", ".pt", ".ckpt", ".bin")
LISTED = 10


def read_state(path: Path, allow_pickle: bool = False) -> Mapping[str, Any]:
    """Name -> tensor from a .safetensors file, or from a PyTorch pickle with `allow_pickle` (tensors and plain containers
    only; `torch.save(state_dict)` or `torch.save({"model": state_dict})`), on the CPU.

    Raises InputError for a file that cannot be read, a pickle without permission, and another kind of file.
    """
    if path.suffix not in (".safetensors", *PICKLES):
        raise InputError(f"{path}: expected a .safetensors file or one of {', '.join(PICKLES)}")
    if not path.is_file():
        raise InputError(f"{path}: no such file, expected weights")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    content = unpickle(path, allow_pickle)
    state = content.get("model", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping):
        raise InputError(f'{path}: holds a {type(state).__name__}, expected {{"model": state_dict}}')
    return state


def load_state(module: nn.Module, state: Mapping[str, Any], path: Path, kind: str) -> None:
    """Load weights that fit exactly; raises as `check_state` does."""
    check_state(module.state_dict(), state, path, kind)
    module.load_state_dict(state)


def check_state(expected: Mapping[str, Tensor], state: Mapping[str, Any], path: Path, kind: str) -> None:
    """InputError, which names the first ten, where weights are missing, unexpected, of the wrong shape or not finite. `kind`:
    what the message calls the module that they are for."""
    wrong = _mismatches(expected, state)
    if wrong:
        first = f" (the first {LISTED} listed)" if len(wrong) > LISTED else ""
        raise InputError(f"{path}: {len(wrong)} weights do not match {kind}{first}: {'; '.join(wrong[:LISTED])}")


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over the names, shapes, dtypes and values of a module's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        array = value.detach().cpu().contiguous().numpy()
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def unpickle(path: Path, allow_pickle: bool) -> Any:
    """The content of a `torch.save` file, tensors and plain containers only, on the CPU. Raises InputError without
    `allow_pickle`, and for a file that holds anything else or cannot be read."""
    import pickle

    if not allow_pickle:
        raise InputError(f"{path}: is a PyTorch pickle; if you trust where it came from, read it with --allow-pickle")
    check_regular(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(
            f"{path}: refused: it is damaged or holds more than tensors and plain containers, such as a whole module; "
            "save its state dict alone: torch.save(module.state_dict(), FILE)"
        ) from None
    except Exception as error:  # damaged pickles raise anything: https://docs.python.org/3/library/pickle.html
        raise InputError(f"{path}: not a readable PyTorch checkpoint ({type(error).__name__})") from None


def _mismatches(expected: Mapping[str, Tensor], state: Mapping[str, Any]) -> list[str]:
    wrong = []
    for key, tensor in expected.items():
        value = state.get(key)
        if value is None:
            wrong.append(f"{key} is missing")
        elif not isinstance(value, Tensor):
            wrong.append(f"{key} is a {type(value).__name__}, expected a tensor")
        elif value.shape != tensor.shape:
            wrong.append(f"{key} is {tuple(value.shape)}, expected {tuple(tensor.shape)}")
        elif tensor.is_floating_point() and not value.is_floating_point():
            wrong.append(f"{key} has dtype {str(value.dtype).removeprefix('torch.')}, expected {str(tensor.dtype)[6:]}")
        elif not torch.isfinite(value).all():
            wrong.append(f"{key} holds NaN or infinity")
    return wrong + [f"{key} is unexpected" for key in state if key not in expected]
