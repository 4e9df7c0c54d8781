"""Which part of a job a process generates, every n-th batch, and running a job's parts on several devices."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from fastgen.engines.machine import gpus
from fastgen.engines.trt.platform import driver_cuda
from fastgen.errors import FastgenError, InputError
from fastgen.files.jsonfiles import brief
from fastgen.files.names import check_device

ERROR = b"fastgen: error: "  # begins the last line of a command that fails
MAX_SHARDS = 999_999
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
        """`I/N`, with numbers up to MAX_SHARDS -> Shard. Raises InputError."""
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text, re.ASCII)
        if not match:
            raise InputError(f"--shard: found {brief(text)}, expected I/N, such as 1/4, or auto")
        return cls(int(match[1]), int(match[2]))

    def part(self, items: Sequence[T]) -> list[T]:
        """Every count-th item: all parts together are all items, once each."""
        return list(items[self.index - 1 :: self.count])

    @property
    def record(self) -> str:
        """The name of the file in which this part leaves its record until all parts are there."""
        return f"shard-{self.index}-of-{self.count}.json"


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
