"""A job split over several processes, GPUs or machines: every n-th batch each, and one manifest in the end."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from fastgen.engines.machine import gpus
from fastgen.engines.trt.platform import driver_cuda
from fastgen.errors import FastgenError, InputError
from fastgen.files.hashes import sha256_json
from fastgen.files.jsonfiles import brief, write_json
from fastgen.files.names import MERGE_LOCK, PART_NAME, check_device
from fastgen.files.records import Count, Record, Sha256, builtins, read_record
from fastgen.generate.job_record import BUNDLE, Timing, without_bundle

if TYPE_CHECKING:
    from fastgen.engines.batches import Batch

ERROR = b"fastgen: error: "  # begins the last line of a command that fails
T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count`, counted from 1."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.count:
            raise InputError(f"--shard: found {self}, expected I/N with 1 <= I <= N, such as 1/4")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Shard:
        """`I/N` -> Shard. Raises InputError."""
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text, re.ASCII)
        if not match:
            raise InputError(f"--shard: found {brief(text)}, expected I/N, such as 1/4")
        return cls(int(match[1]), int(match[2]))

    def part(self, items: Sequence[T]) -> list[T]:
        """Every count-th item: all parts together are all items, once each."""
        return list(items[self.index - 1 :: self.count])

    def file(self, out: Path) -> Path:
        """Where this part leaves its record until all parts are there."""
        return out / f"shard-{self.index}-of-{self.count}.json"


class Part(Record, frozen=True):
    """A part that is finished. `job`: SHA-256 of the job's identity. `lines`: positions in the job, and manifest lines."""

    job: Sha256
    shard: str
    lines: tuple[tuple[Count, dict[str, Any]], ...]
    run: Timing | None


class WholeJob(NamedTuple):
    """All parts of a job together: its manifest in order, and the timing of each run."""

    lines: list[dict[str, Any]]
    runs: list[Timing]


@dataclass(frozen=True)
class JobParts:
    """The records of a job's parts in its folder `out`. `positions`: of the images of part `shard`, whose manifest `lines` a
    run completes."""

    out: Path
    shard: Shard
    job: str
    batches: Sequence[Batch]
    lines: Sequence[dict[str, Any]]

    @classmethod
    def of(
        cls,
        out: Path,
        shard: Shard,
        identity: Mapping[str, Any],
        batches: Sequence[Batch],
        lines: Sequence[dict[str, Any]],
    ) -> JobParts:
        """Raises InputError for a part that is there already and not one of this job, and for a foreign file in the way."""
        parts = cls(out, shard, sha256_json(without_bundle(identity)), batches, lines)
        for index in range(1, shard.count + 1):
            if os.path.lexists(Shard(index, shard.count).file(out)):
                parts.read(index)
        lock = out / MERGE_LOCK
        if os.path.lexists(lock) and (lock.is_symlink() or not lock.is_file() or lock.stat().st_size):
            raise InputError(f"{lock}: is no lock of fastgen; move it away, or choose another --out")
        return parts

    @property
    def positions(self) -> list[int]:
        return self._positions(self.shard)

    def _positions(self, shard: Shard) -> list[int]:
        return [i for batch in shard.part(self.batches) for i in range(batch.start, batch.stop)]

    def save(self, run: Timing | None) -> None:
        """Record the part that is finished, and its timing."""
        lines = tuple((i, self.lines[i]) for i in self.positions)
        write_json(self.shard.file(self.out), builtins(Part(self.job, str(self.shard), lines, run)))

    def read(self, index: int) -> Part:
        """The record of part `index`. Raises InputError for one that is not of this job, part or images."""
        shard = Shard(index, self.shard.count)
        path = shard.file(self.out)
        help_text = f"delete it, and run --shard {shard} again"
        if path.is_symlink():
            raise InputError(f"{path}: is a symlink, expected a part's record; {help_text}")
        try:
            part = read_record(path, Part)
        except InputError as error:
            raise InputError(f"{error}; {help_text}") from None
        for field, found, expected in (("job", part.job, self.job), ("shard", part.shard, str(shard))):
            if found != expected:
                raise InputError(f"{path}: {field}: found {brief(found)}, expected {brief(expected)}; {help_text}")
        positions = self._positions(shard)
        if len(part.lines) != len(positions):
            counts = f"found {len(part.lines)} images, expected {len(positions)}"
            raise InputError(f"{path}: lines: {counts}; {help_text}")
        for row, ((place, line), position) in enumerate(zip(part.lines, positions, strict=True)):
            _check_line(f"{path}: lines[{row}]", place, line, position, self.lines[position], help_text)
        return part

    @contextmanager
    def whole(self) -> Iterator[WholeJob | None]:
        """All parts, for the process that merges them; None while some are missing, or when another process has merged them."""
        from filelock import FileLock

        with FileLock(self.out / MERGE_LOCK):
            numbers = range(1, self.shard.count + 1)
            there = [Shard(index, self.shard.count).file(self.out).exists() for index in numbers]
            if all(there):
                parts = [self.read(index) for index in numbers]
                lines = dict(pair for part in parts for pair in part.lines)
                yield WholeJob([lines[i] for i in range(len(self.lines))], [part.run for part in parts if part.run])
            else:
                if not any(there):  # another process has merged them
                    (self.out / MERGE_LOCK).unlink(missing_ok=True)
                yield None


def _check_line(
    place: str, found: int, line: Mapping[str, Any], position: int, expected: Mapping[str, Any], help_text: str
) -> None:
    """InputError for a part's manifest line that is not of the image at `position`, which has the line `expected`."""
    if found != position:
        raise InputError(f"{place}: found position {found}, expected {position}; {help_text}")
    for key in sorted(expected.keys() | line.keys()):
        there, here = line.get(key), expected.get(key)
        if key == "error":
            there, here = (None, None) if isinstance(there, str | None) else (there, "text")
        if there != here and key not in (BUNDLE, "similarity"):  # which another machine may round in another way
            raise InputError(f"{place}: {key}: found {brief(there)}, expected {brief(here)}; {help_text}")


def remove_parts(out: Path, identity: Mapping[str, Any]) -> None:
    """Delete the records of this job's parts, once the manifest is written."""
    job = sha256_json(without_bundle(identity))
    for path in out.glob("shard-*-of-*.json"):
        if PART_NAME.fullmatch(path.name) and not path.is_symlink() and _job_of(path) == job:
            path.unlink(missing_ok=True)
    lock = out / MERGE_LOCK
    if lock.is_file() and not lock.is_symlink() and not lock.stat().st_size:
        lock.unlink(missing_ok=True)


def _job_of(path: Path) -> str | None:
    """The job of a part's record; None for another file."""
    try:
        return read_record(path, Part).job
    except InputError:
        return None


def parse_devices(text: str) -> list[str]:
    """`0,1` or `cuda:0,cuda:1` -> names of devices, no GPU twice. Raises InputError."""
    words = [word.strip() for word in text.split(",")]
    names = [check_device(f"cuda:{word}" if word.isdecimal() else word, f"--devices {brief(text)}") for word in words]
    gpus = ["cuda:0" if name == "cuda" else name for name in names if name.startswith("cuda")]  # the CPU has many cores
    twice = [name for name in gpus if gpus.count(name) > 1]
    if twice:
        raise InputError(f"--devices {brief(text)}: found {twice[-1]} twice, expected different GPUs, such as 0,1")
    return names


def run_on_devices(arguments: Sequence[str], devices: Sequence[str]) -> None:
    """Run `fastgen ARGUMENTS` on all devices at the same time, a shard each.

    Raises InputError for a GPU that is not there, and, with the first one's line, when all refuse the user's input;
    FastgenError when one fails, after all have ended; their images stay, and the same command continues.
    """
    _check_present(devices)
    processes = []
    for index, device in enumerate(devices, start=1):
        part = ["--device", device, "--shard", f"{index}/{len(devices)}"]
        command = [sys.executable, "-m", "fastgen", *arguments, *part]
        processes.append(subprocess.Popen(command, stderr=subprocess.PIPE))
    with ThreadPoolExecutor(len(processes)) as pool:
        forwarded = [pool.submit(_forward, process.stderr) for process in processes]
        try:
            codes = [process.wait() for process in processes]
        except KeyboardInterrupt:
            for process in processes:  # they were interrupted too: let them finish their files
                process.wait()
            raise
        errors = [future.result() for future in forwarded]
    if all(code == InputError.exit_code for code in codes):
        raise InputError(errors[0])
    failed = [
        f"{device} ({error or f'exit code {code}'})"
        for device, code, error in zip(devices, codes, errors, strict=True)
        if code
    ]
    if failed:
        raise FastgenError(f"failed on {', '.join(failed)}; the same command continues with what is missing")


def _check_present(devices: Sequence[str]) -> None:
    """InputError for a GPU that nvidia-smi does not list. Where it lists none, but a driver is there, as in some containers,
    torch says what there is when the device is opened."""
    numbers = [int(name.partition(":")[2] or 0) for name in devices if name.startswith("cuda")]
    if numbers:
        cards, _ = gpus()
        if max(numbers) >= len(cards) and (cards or driver_cuda() is None):
            found = f"found cuda:{max(numbers)}, and nvidia-smi lists {len(cards) or 'no'} GPUs"
            raise InputError(f"--devices: {found}; `fastgen doctor` says why")


def _forward(stream: Any) -> str:
    """Print what a process prints on stderr, as it comes, but for its error, which is returned."""
    error = b""
    while chunk := stream.read1():
        text, mark, rest = (error + chunk).partition(ERROR)
        error = mark + rest
        sys.stderr.write(text.decode(errors="replace"))
        sys.stderr.flush()
    return error.removeprefix(ERROR).decode(errors="replace").strip()
