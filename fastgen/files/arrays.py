"""Arrays of one dimension in an .npz file, each checked against the limits before it is inflated; nothing is unpickled."""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from fastgen.errors import InputError
from fastgen.files.jsonfiles import brief, read_bytes

MAX_MEMBERS = 10_000
_MAGIC = b"\x93NUMPY\x01\x00"  # version 1.0, as np.savez writes it
_HEADER = re.compile(rb"\{'descr': '([^']{2,20})', 'fortran_order': False, 'shape': \((\d{1,12}),\), \} *\n")


class ArrayFile:
    """An .npz file. `limit`: bytes that all of its arrays may have. `remedy`: what the user can do about a damaged one.

    Raises InputError for a file that is no zip archive, and for one whose directory promises more than the limit.
    """

    def __init__(self, path: Path, limit: int, remedy: str) -> None:
        self.path, self._remedy = path, remedy
        data = read_bytes(path, "an .npz file", limit)
        try:
            self._archive = zipfile.ZipFile(io.BytesIO(data))
        except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
            raise self._problem(f"is no .npz file: {error}") from None
        members = self._archive.infolist()
        if len(members) > MAX_MEMBERS:
            raise self._problem(f"holds {len(members):,} arrays, expected at most {MAX_MEMBERS:,}")
        if (total := sum(member.file_size for member in members)) > limit:
            size = f"{total / 2**20:,.0f} MiB, expected at most {limit / 2**20:,.0f} MiB"
            raise self._problem(f"its arrays have {size}")
        self._members = {member.filename: member for member in members}
        if len(self._members) < len(members):
            raise self._problem("holds an array twice")

    def read(self, name: str, dtype: Any) -> np.ndarray:
        """(N,) array of this name. Raises InputError where there is none, or one of another dtype or shape."""
        member = self._members.get(f"{name}.npy")
        if member is None:
            raise self._problem(f"has no array {brief(name)}")
        if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise self._problem(f"{name}: is encrypted, or compressed by another method than deflate")
        try:
            data = self._archive.read(member)
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError, NotImplementedError) as error:
            raise self._problem(f"{name}: cannot be inflated: {error}") from None
        return self._array(name, data, np.dtype(dtype).newbyteorder("<"))

    def _array(self, name: str, data: bytes, dtype: np.dtype) -> np.ndarray:
        size = int.from_bytes(data[len(_MAGIC) : len(_MAGIC) + 2], "little")
        start = len(_MAGIC) + 2 + size
        match = _HEADER.fullmatch(data[len(_MAGIC) + 2 : start])
        expected = f"one dimension of {dtype.str}"
        if not data.startswith(_MAGIC) or match is None:
            raise self._problem(f"{name}: found another kind of array, expected {expected}")
        if match[1].decode("latin-1") != dtype.str:
            raise self._problem(f"{name}: found {match[1].decode('latin-1')}, expected {expected}")
        if int(match[2]) * dtype.itemsize != len(data) - start:
            raise self._problem(f"{name}: found {len(data) - start} bytes, expected {int(match[2])} numbers")
        return np.frombuffer(data, dtype, offset=start)

    def _problem(self, what: str) -> InputError:
        return InputError(f"{self.path}: {what}; {self._remedy}")
