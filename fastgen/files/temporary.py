"""Names of temporary files and folders, which tell the process that writes them, and removing those of dead processes.

A name is `.TARGET.fastgen-MACHINE-PID-START-RANDOM.tmp`: no other program makes such names, and a process is known by its
machine (with its space of process ids), its id, and the time at which it started, as ids are used again.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import socket
from collections.abc import Collection
from contextlib import suppress
from functools import cache
from pathlib import Path

LONGEST = 150  # bytes of a target's name that stand in the temporary name; of a longer one its hash does
_NAME = re.compile(r"\.(.+)\.fastgen-([0-9a-f]{8})-(\d{1,10})-(\d{1,20})-[0-9a-f]{8}\.tmp", re.DOTALL)


def temporary_path(target: Path) -> Path:
    """A new name beside `target`, for what this process will rename to it."""
    pid = os.getpid()
    writer = f"{_machine()}-{pid}-{_start_of(pid) or 0}-{secrets.token_hex(4)}"
    return target.with_name(f".{_label(target.name)}.fastgen-{writer}.tmp")


def remove_leftovers(folder: Path, targets: Collection[str] | None = None, *, any_machine: bool = False) -> None:
    """Remove the temporary files and folders in `folder` of processes that were killed on this machine, for targets of these
    names (None: of any). What a live process writes, what another machine wrote, and every other file stay.

    `any_machine`: what another machine wrote is removed too, whether its process lives or not.
    """
    labels = None if targets is None else {_label(name) for name in targets}
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in list(entries):
            match = _NAME.fullmatch(entry.name)
            if match is None or (labels is not None and match[1] not in labels):
                continue
            elsewhere = any_machine and match[2] != _machine()
            if not (elsewhere or _is_dead(*match.group(2, 3, 4))):
                continue
            with suppress(FileNotFoundError):  # another process removes it too
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                elif entry.is_file(follow_symlinks=False):
                    os.unlink(entry.path)


def temporary_targets(folder: Path) -> set[str]:
    """The names of the targets of all temporary files and folders in `folder`."""
    with suppress(FileNotFoundError, NotADirectoryError):
        return {match[1] for name in os.listdir(folder) if (match := _NAME.fullmatch(name))}
    return set()


def is_temporary(name: str) -> bool:
    """Whether `temporary_path` makes such names."""
    return _NAME.fullmatch(name) is not None


def target_of(name: str) -> str:
    """The target's name in a temporary name; another name as it is."""
    match = _NAME.fullmatch(name)
    return match[1] if match else name


def _label(name: str) -> str:
    data = os.fsencode(name)
    return name if len(data) <= LONGEST else hashlib.sha256(data).hexdigest()


def _is_dead(machine: str, pid: str, start: str) -> bool:
    """Whether the process does not run any more; False for one of another machine, which nobody here knows."""
    if machine != _machine():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # it runs, under another user
        pass
    now = _start_of(int(pid))
    return now is not None and str(now) != start


@cache
def _machine() -> str:
    """Of the host's name and, on Linux, of the space of process ids: two containers may share a folder and a name."""
    space = ""
    with suppress(OSError, AttributeError):
        space = os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(f"{socket.gethostname()}\0{space}".encode()).hexdigest()[:8]


def _start_of(pid: int) -> int | None:
    """When a process started, in clock ticks since the machine did; None where the system does not say."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    return int(text.rpartition(b")")[2].split()[19])  # the name of the program, in brackets, may hold anything
