"""Arrays in .npy files: mapped into memory, after their header was compared with what the file must hold."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastgen.errors import InputError

MAX_HEADER = 10_000  # bytes
_SHAPE = re.compile(r"\(((?:\d{1,15}, ?)*)(\d{1,15})?,?\)")
_HEADER = re.compile(
    r"\{'descr': '([<>|=]?[a-zA-Z]\d{0,3})', 'fortran_order': (False|True), 'shape': (\([\d, ]{0,400}\)), \} *\n?"
)


def map_array(path: Path, dtype: str, shape: Sequence[int | None], remedy: str) -> np.ndarray:
    """A read-only memory map of an array of this dtype and shape (None: any length), in C order.

    Raises InputError for a file that is missing, too short or too long for its header, or holds another kind of array; nothing
    in it is unpickled or evaluated. `remedy`: what the user can do.
    """
    expected = np.dtype(dtype)
    try:
        with open(path, "rb") as file:
            descr, order, found, offset = _header(file.read(MAX_HEADER))
        size = path.stat().st_size
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read as an array: {problem}; {remedy}") from None
    words = f"expected {expected} {_words(shape)}"
    fits = len(found) == len(shape) and all(w is None or w == f for f, w in zip(found, shape, strict=True))
    if np.dtype(descr) != expected or not fits or order == "True":
        raise InputError(f"{path}: {np.dtype(descr)} {_words(found)}, {words}; {remedy}")
    if size != offset + expected.itemsize * math.prod(found):
        raise InputError(f"{path}: {size} bytes are too few or too many for {expected} {_words(found)}; {remedy}")
    if 0 in found:
        return np.zeros(found, expected)
    return np.memmap(path, expected, "r", offset, tuple(found))


def _header(data: bytes) -> tuple[str, str, list[int], int]:
    """(dtype, whether in Fortran's order, shape, offset of the values). ValueError for what NumPy does not write."""
    if data[:6] != b"\x93NUMPY" or len(data) < 12 or data[6] not in (1, 2, 3):
        raise ValueError("it is no .npy file")
    width = 2 if data[6] == 1 else 4
    size = int.from_bytes(data[8 : 8 + width], "little")
    offset = 8 + width + size
    match = _HEADER.fullmatch(data[8 + width : offset].decode("latin-1"))
    if match is None or len(data) < offset or not _SHAPE.fullmatch(match[3]):
        raise ValueError("its header is malformed, or too long")
    try:
        np.dtype(match[1])
    except TypeError:
        raise ValueError(f"{match[1]} is no dtype") from None
    return match[1], match[2], [int(number) for number in re.findall(r"\d+", match[3])], offset


def _words(shape: Sequence[int | None]) -> str:
    return f"({', '.join('any' if n is None else str(n) for n in shape)}{',' if len(shape) == 1 else ''})"
