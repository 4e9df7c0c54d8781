"""The parts of a job that several processes share, and merging them without a lock.

A process that ends its part writes a record of it. Whoever then sees the records of all parts writes the files of the whole
job, each by one rename, and removes the records. Several processes may do so at the same time, and any of them may be killed:
they write the same bytes, and each run has an id, by which job.json holds its timing once. A part whose record is gone stands
in the manifest, which is written before a record is removed.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastgen.errors import InputError
from fastgen.files.hashes import sha256_json
from fastgen.files.jsonfiles import MAX_DATA_BYTES, brief
from fastgen.files.names import MANIFEST, MERGE_LOCK, PART_NAME
from fastgen.files.records import Count, Record, Sha256, builtins
from fastgen.files.store import Store
from fastgen.generate.job_record import BUNDLE, RunId, Timing, without_bundle
from fastgen.generate.shards import Shard

if TYPE_CHECKING:
    from fastgen.engines.batches import Batch

Lines = Sequence[dict[str, Any]]  # of a manifest: one for each image of the job, in order


class Part(Record, frozen=True):
    """A part that is finished. `job`: SHA-256 of the job's identity. `lines`: positions in the job, and manifest lines.
    `runs`: the timing of each run that generated images of it."""

    job: Sha256
    shard: str
    lines: tuple[tuple[Count, dict[str, Any]], ...]
    runs: dict[RunId, Timing]


@dataclass(frozen=True)
class JobParts:
    """The records of a job's parts in its folder `store`, for the process that generates part `shard`, and completes the
    manifest `lines` of its images."""

    store: Store
    shard: Shard
    job: str
    batches: Sequence[Batch]
    lines: Lines

    @classmethod
    def of(
        cls, store: Store, shard: Shard, identity: Mapping[str, Any], batches: Sequence[Batch], lines: Lines
    ) -> JobParts:
        """Raises InputError for a part or a manifest that is there already and not of this job."""
        parts = cls(store, shard, _digest(identity), batches, lines)
        parts.whole()
        return parts

    @property
    def positions(self) -> list[int]:
        """The positions of this part's images in the job."""
        return self._positions(self.shard)

    def _positions(self, shard: Shard) -> list[int]:
        return [i for batch in shard.part(self.batches) for i in range(batch.start, batch.stop)]

    def save(self, runs: Mapping[str, Timing]) -> None:
        """Record that this part is finished, and the `runs` that generated images. Without such a run, a record that is there
        stays as it is, and where the job is merged none is made."""
        lines = tuple((i, self.lines[i]) for i in self.positions)
        if runs:
            earlier = self._read(self.shard)
            runs = {**(earlier.runs if earlier else {}), **runs}
            self.store.write_json(self.shard.record, builtins(Part(self.job, str(self.shard), lines, dict(runs))))
        elif not self.store.exists(MANIFEST):
            self.store.write_new_json(self.shard.record, builtins(Part(self.job, str(self.shard), lines, {})))

    def whole(self) -> Lines | None:
        """The manifest of the whole job; None while parts are missing. Raises InputError for a record that is not of this job,
        part or images, and for a manifest that is not of this job."""
        shards = [Shard(index, self.shard.count) for index in range(1, self.shard.count + 1)]
        parts = {shard: self._read(shard) for shard in shards}
        lines = list(self.lines)
        for shard, part in parts.items():
            if part is not None and shard != self.shard:
                for position, line in part.lines:
                    lines[position] = line
        missing = [shard for shard, part in parts.items() if part is None and shard != self.shard]
        if missing:
            merged = self._merged()  # read after the records: it is written before the first of them is removed
            if merged is None:
                return None
            for position in (positions := [i for shard in missing for i in self._positions(shard)]):
                lines[position] = merged[position]
            images = [lines[i]["image_name"] for i in positions if "error" not in lines[i]]
            if len(self.store.present(images)) < len(images):
                return None
        return lines

    def _read(self, shard: Shard) -> Part | None:
        """The record of a part; None where it is not there, or is removed at this moment."""
        store, name, help_text = self.store, shard.record, f"delete it, and run --shard {shard} again"
        path = store.place(name)
        if store.is_link(name):
            raise InputError(f"{path}: is a symlink, expected a part's record; {help_text}")
        if not store.exists(name):
            return None
        try:
            part = store.read_record(name, Part)
        except InputError as error:
            if not store.exists(name):  # another process has merged the parts meanwhile
                return None
            raise InputError(f"{error}; {help_text}") from None
        for field, found, expected in (("job", part.job, self.job), ("shard", part.shard, str(shard))):
            if found != expected:
                raise InputError(f"{path}: {field}: found {brief(found)}, expected {brief(expected)}; {help_text}")
        positions = self._positions(shard)
        if len(part.lines) != len(positions):
            counts = f"found {len(part.lines)} images, expected {len(positions)}"
            raise InputError(f"{path}: lines: {counts}; {help_text}")
        for row, ((place, line), position) in enumerate(zip(part.lines, positions, strict=True)):
            if place != position:
                raise InputError(f"{path}: lines[{row}]: found position {place}, expected {position}; {help_text}")
            _check_line(f"{path}: lines[{row}]", line, self.lines[position], help_text)
        return part

    def _merged(self) -> list[dict[str, Any]] | None:
        """The lines of the manifest, where the job is merged already."""
        path, help_text = self.store.place(MANIFEST), "delete it, and run all shards again"
        if not self.store.exists(MANIFEST):
            return None
        lines = self.store.read_jsonl(MANIFEST, limit=MAX_DATA_BYTES)
        if len(lines) != len(self.lines):
            raise InputError(f"{path}: found {len(lines)} images, expected {len(self.lines)}; {help_text}")
        for (number, line), expected in zip(lines, self.lines, strict=True):
            place = f"{path}: line {number}"
            if not isinstance(line, dict):
                raise InputError(f"{place}: found {brief(line)}, expected an object; {help_text}")
            _check_line(place, line, expected, help_text)
        return [line for _, line in lines]


def new_run_id() -> str:
    """A random id: of a run whose timing is recorded."""
    return secrets.token_hex(8)


def read_parts(store: Store, identity: Mapping[str, Any]) -> dict[str, Part]:
    """File name -> record of this job's parts that are there, of any number of parts. Other files are left out."""
    parts = {name: _part(store, name) for name in sorted(store.names("shard-")) if PART_NAME.fullmatch(name)}
    return {name: part for name, part in parts.items() if part is not None and part.job == _digest(identity)}


def remove_parts(store: Store, parts: Mapping[str, Part]) -> None:
    """Delete these records, but for one that its process has written anew since; and the lock that older versions made for the
    merge."""
    for name, part in parts.items():
        if _part(store, name) == part:
            store.delete(name)
    store.delete_empty(MERGE_LOCK)


def all_runs(parts: Iterable[Part], runs: Mapping[str, Timing]) -> dict[str, Timing]:
    """The runs of parts, and `runs`."""
    return {**{run: timing for part in parts for run, timing in part.runs.items()}, **runs}


def _digest(identity: Mapping[str, Any]) -> str:
    return sha256_json(without_bundle(identity))


def _part(store: Store, name: str) -> Part | None:
    """The record of a part; None for another file."""
    try:
        return None if store.is_link(name) else store.read_record(name, Part)
    except InputError:
        return None


def _check_line(place: str, line: Mapping[str, Any], expected: Mapping[str, Any], help_text: str) -> None:
    """InputError for a manifest line that is not of the image that has the line `expected`."""
    for key in sorted(expected.keys() | line.keys()):
        there, here = line.get(key), expected.get(key)
        if key == "error":
            there, here = (None, None) if isinstance(there, str | None) else (there, "text")
        if there != here and key not in (BUNDLE, "similarity"):  # which another machine may round in another way
            raise InputError(f"{place}: {key}: found {brief(there)}, expected {brief(here)}; {help_text}")
