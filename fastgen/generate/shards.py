"""A job split over several processes, GPUs or machines: every n-th batch each, and one manifest in the end."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from fastgen.errors import FastgenError, InputError
from fastgen.files.jsonfiles import read_json, write_json

MERGE_LOCK = ".merge.lock"
T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count`, counted from 1."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.count:
            raise InputError(f"shard is {self}, expected I/N with 1 <= I <= N, such as 1/4")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Shard:
        """`I/N` -> Shard. Raises InputError."""
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if not match:
            raise InputError(f"shard is {text!r}, expected I/N, such as 1/4")
        return cls(int(match[1]), int(match[2]))

    def part(self, items: Sequence[T]) -> list[T]:
        """Every count-th item: all parts together are all items, once each."""
        return list(items[self.index - 1 :: self.count])

    def file(self, out: Path) -> Path:
        """Where this part leaves its record until all parts are there."""
        return out / f"shard-{self.index}-of-{self.count}.json"


def save_part(out: Path, shard: Shard, lines: Sequence[Any], run: dict[str, Any] | None) -> None:
    """Record a finished part: its (position in the job, manifest line) pairs in request order, and its timing."""
    write_json(shard.file(out), {"lines": list(lines), "run": run})


class JobParts(NamedTuple):
    """All parts of a job together: the (position, line) pairs of its manifest in order, and the timing of each run."""

    lines: list[Any]
    runs: list[dict[str, Any]]


@contextmanager
def whole_job(out: Path, shard: Shard) -> Iterator[JobParts | None]:
    """All parts, for the process that merges them; None while some are missing, or when another process has merged them."""
    from filelock import FileLock

    with FileLock(out / MERGE_LOCK):
        paths = [Shard(index, shard.count).file(out) for index in range(1, shard.count + 1)]
        parts = [read_json(path) for path in paths] if all(path.exists() for path in paths) else None
        if parts is None:
            if not any(path.exists() for path in paths):  # another process has merged them
                remove_parts(out)
            yield None
        else:
            lines = sorted((line for part in parts for line in part["lines"]), key=lambda pair: pair[0])
            yield JobParts(lines, [part["run"] for part in parts if part["run"]])


def remove_parts(out: Path) -> None:
    """Delete the files of the parts, once the manifest is written."""
    for path in (*out.glob("shard-*-of-*.json"), out / MERGE_LOCK):
        path.unlink(missing_ok=True)


def parse_devices(text: str) -> list[str]:
    """`0,1` or `cuda:0,cuda:1` -> device names. Raises InputError."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise InputError(f"devices is {text!r}, expected a list such as 0,1")
    return [f"cuda:{name}" if name.isdecimal() else name for name in names]


def run_on_devices(arguments: Sequence[str], devices: Sequence[str]) -> None:
    """Run `fastgen ARGUMENTS` on all devices at the same time, a shard each.

    Raises FastgenError when one of them fails, after all have ended; their images stay, and the same command continues.
    """
    processes = []
    for index, device in enumerate(devices, start=1):
        part = ["--device", device, "--shard", f"{index}/{len(devices)}"]
        processes.append(subprocess.Popen([sys.executable, "-m", "fastgen", *arguments, *part]))
    try:
        codes = [process.wait() for process in processes]
    except KeyboardInterrupt:
        for process in processes:  # they were interrupted too: let them finish their files
            process.wait()
        raise
    failed = [f"{device} (exit code {code})" for device, code in zip(devices, codes, strict=True) if code]
    if failed:
        raise FastgenError(f"failed on {', '.join(failed)}; the same command continues with what is missing")
