"""Safetensors files: their headers, and their tensors, which must be finite."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastgen.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says of a tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # of safetensors: F32, BF16, I64, ...

    @property
    def count(self) -> int:
        """Its number of values."""
        return math.prod(self.shape)


def read_headers(files: Iterable[Path]) -> dict[str, TensorInfo]:
    """Name -> header of all tensors in these files. Raises InputError for a file that is no safetensors file, or whose header
    is not true of it, and for a name that two files hold."""
    from safetensors import SafetensorError, safe_open

    headers: dict[str, TensorInfo] = {}
    for file in files:
        check_regular(file)
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118  # no mapping
                    if name in headers:
                        raise InputError(f"{file}: {name}: is in {headers[name].file.name} already")
                    part = opened.get_slice(name)
                    headers[name] = TensorInfo(file, tuple(part.get_shape()), str(part.get_dtype()))
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{file}: not a readable safetensors file: {error}") from None
    return headers


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Name -> tensor, on the CPU. Raises InputError for a file that cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_regular(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        raise InputError(f"{path}: not a readable safetensors file: {error}") from None


def check_regular(path: Path) -> None:
    """InputError for what is no file: to open a pipe would wait for its writer."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}, expected weights") from None
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: is a {'folder' if stat.S_ISDIR(mode) else 'pipe or a device'}, expected weights")
