"""The folder that a job writes, on this machine's disk or in a bucket: one interface for both.

A file has a name relative to the folder, with `/` between its parts.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fastgen.files.folders import make_folder
from fastgen.files.jsonfiles import (
    MAX_BYTES,
    decode,
    json_bytes,
    parse_json_text,
    parse_jsonl_text,
    read_bytes,
    write_bytes,
    write_new,
)
from fastgen.files.names import safe_path
from fastgen.files.outputs import Kind, check_output, check_output_folder
from fastgen.files.png import text_chunk
from fastgen.files.records import to_record
from fastgen.files.temporary import remove_leftovers, temporary_targets

T = TypeVar("T")


class Store(ABC):
    """A folder of files, each of which appears whole. `str()` is the folder's place in messages.

    Methods that write raise FastgenError for a refusal of the system, in one line.
    """

    writers = 1  # files that are written at a time, at least

    def place(self, name: str) -> str:
        """A file's place in messages."""
        return f"{self}/{name}"

    @abstractmethod
    def check(self) -> None:
        """InputError unless the folder is there or can be made, as far as this is known before a file is written."""

    @abstractmethod
    def check_name(self, name: str) -> None:
        """InputError for the name of an image that cannot be written below the folder, or would leave it."""

    @abstractmethod
    def check_output(self, name: str, kind: Kind) -> None:
        """InputError unless the file can be written: its name is free, or the same kind of command wrote it earlier."""

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether there is a file of this name, or something else on a disk."""

    @abstractmethod
    def present(self, names: Sequence[str]) -> set[str]:
        """Those of the names for which `exists` is true; for thousands of names."""

    @abstractmethod
    def is_link(self, name: str) -> bool:
        """Whether the name is a symlink's."""

    @abstractmethod
    def names(self, start: str) -> list[str]:
        """Names of the files directly in the folder that begin with `start`."""

    @abstractmethod
    def read(self, name: str, expected: str = "a file", limit: int = MAX_BYTES) -> bytes:
        """A file's content, of at most `limit` bytes. InputError for a missing or unreadable file."""

    @abstractmethod
    def read_all(self, names: Sequence[str]) -> Iterator[bytes]:
        """The content of each file, in order."""

    @abstractmethod
    def text_chunks(self, names: Sequence[str], key: str) -> Iterator[str | None]:
        """For each file, in order, what `png.text_chunk` returns: a PNG's text before its pixels, which are not read."""

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Write a file so that its name holds the old content or all of the new, never a part; its folder is made."""

    @abstractmethod
    def write_new(self, name: str, data: bytes) -> bool:
        """As `write`, but False, and nothing is written, where the name is taken: of several processes one succeeds."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Delete a file; one that is not there is no error."""

    @abstractmethod
    def delete_empty(self, name: str) -> None:
        """Delete a file that has no content; another one stays."""

    @abstractmethod
    def clean(self, names: Collection[str], records: re.Pattern[str], *, any_machine: bool = False) -> None:
        """Delete the temporary files that killed processes of this machine left when they wrote files of these names, or files
        directly in the folder whose names match `records`. `any_machine`: see `remove_leftovers`."""

    def read_record(self, name: str, kind: type[T]) -> T:
        """The record in a JSON file. Raises InputError as `records.read_record` does."""
        text = decode(self.read(name, "a JSON file"), self.place(name))
        return to_record(parse_json_text(text, self.place(name)), kind, self.place(name))

    def read_jsonl(self, name: str, limit: int) -> list[tuple[int, Any]]:
        """As `jsonfiles.read_jsonl`."""
        return parse_jsonl_text(decode(self.read(name, "a JSON file", limit), self.place(name)), self.place(name))

    def write_json(self, name: str, value: Any, indent: int | None = 2) -> None:
        """Write what `jsonfiles.write_json` writes."""
        self.write(name, json_bytes(value, indent))

    def write_new_json(self, name: str, value: Any) -> bool:
        """As `jsonfiles.write_new_json`."""
        return self.write_new(name, json_bytes(value))


class Folder(Store):
    """A folder on the disk. It is made when its first file is written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def place(self, name: str) -> str:
        return os.path.join(self.path, name)  # joining Paths takes a third of the time to look at an image

    def check(self) -> None:
        check_output_folder(self.path)

    def check_name(self, name: str) -> None:
        safe_path(self.path, name)

    def check_output(self, name: str, kind: Kind) -> None:
        check_output(self.path / name, kind)

    def exists(self, name: str) -> bool:
        return os.path.lexists(self.place(name))

    def present(self, names: Sequence[str]) -> set[str]:
        return {name for name in names if self.exists(name)}

    def is_link(self, name: str) -> bool:
        return os.path.islink(self.place(name))

    def names(self, start: str) -> list[str]:
        if not self.path.is_dir():
            return []
        with os.scandir(self.path) as entries:
            return [entry.name for entry in entries if entry.name.startswith(start) and not entry.is_dir()]

    def read(self, name: str, expected: str = "a file", limit: int = MAX_BYTES) -> bytes:
        return read_bytes(self.path / name, expected, limit)

    def read_all(self, names: Sequence[str]) -> Iterator[bytes]:
        return ((self.path / name).read_bytes() for name in names)

    def text_chunks(self, names: Sequence[str], key: str) -> Iterator[str | None]:
        return (text_chunk(self.place(name), key) for name in names)

    def write(self, name: str, data: bytes) -> None:
        make_folder((self.path / name).parent)
        write_bytes(self.path / name, data)

    def write_new(self, name: str, data: bytes) -> bool:
        make_folder((self.path / name).parent)
        return write_new(self.path / name, data)

    def delete(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def delete_empty(self, name: str) -> None:
        file = self.path / name
        if file.is_file() and not file.is_symlink() and not file.stat().st_size:
            file.unlink(missing_ok=True)

    def clean(self, names: Collection[str], records: re.Pattern[str], *, any_machine: bool = False) -> None:
        targets = {self.path: set(filter(records.fullmatch, temporary_targets(self.path)))}
        for file in map(self.path.joinpath, names):
            targets.setdefault(file.parent, set()).add(file.name)
        for folder, labels in targets.items():
            remove_leftovers(folder, labels, any_machine=any_machine)
