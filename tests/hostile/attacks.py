"""Attacks as data: what is broken in which file, the command that then runs, and a word that its refusal must hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECONDS = 20  # after which a command counts as hanging
LONGEST = 300  # characters of a refusal
SCRIPT = Path(__file__).with_name("fork_server.py")


class _Remove:
    """Instead of a value: the field is left out."""

    def __repr__(self) -> str:
        return "REMOVE"


REMOVE = _Remove()


@dataclass(frozen=True)
class Attack:
    """`edit` breaks the workspace, a folder with copies of what the test gives it; `argv` then runs there and must be refused.

    The refusal is one line, with `word` in it, and the exit code is `code`. The workspace is afterwards what it was before the
    command, to the byte.
    """

    name: str
    argv: Sequence[str]
    word: str
    edit: Callable[[Path], object] = lambda workspace: None
    code: int = 2
    env: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Outcome:
    code: int | None  # None: killed, as it took too long
    stdout: str
    stderr: str
    seconds: float


class ForkServer:
    """A process that runs commands in forks of itself, see fork_server.py."""

    def __init__(self, folder: Path, script: Path = SCRIPT) -> None:
        self.folder = folder
        self._process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(folder / "server.stderr", "w"),  # noqa: SIM115  # its own, for the life of the server
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[2]), str(SCRIPT.parent), *sys.path])},
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n", (folder / "server.stderr").read_text()

    def run(self, argv: Sequence[str], cwd: Path, env: Mapping[str, str], seconds: float = SECONDS) -> Outcome:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        files = {name: str(self.folder / name) for name in ("stdout", "stderr")}
        request = {"argv": list(argv), "cwd": str(cwd), "env": dict(env), "seconds": seconds, **files}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        texts = {name: Path(file).read_text(errors="replace") for name, file in files.items()}
        return Outcome(answer["code"], **texts, seconds=answer["seconds"])

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def check(attack: Attack, workspace: Path, server: ForkServer, cache: Path) -> None:
    """Run an attack in its workspace, and assert that it is refused as an `Attack` must be."""
    attack.edit(workspace)
    before = snapshot(workspace)
    outcome = server.run(attack.argv, workspace, {"FASTGEN_CACHE": str(cache), **attack.env})
    said = f"{attack.argv}\nexit code {outcome.code} after {outcome.seconds:.1f} s\n{outcome.stdout}{outcome.stderr}"
    assert outcome.code is not None, f"hangs: {said}"
    assert outcome.code == attack.code, said
    lines = outcome.stderr.splitlines()
    assert len(lines) == 1, said
    assert lines[0].startswith("fastgen: error: "), said
    assert len(lines[0]) <= LONGEST, f"{len(lines[0])} characters: {said}"
    assert attack.word in lines[0], f"no {attack.word!r}: {said}"
    assert not outcome.stdout, said
    assert snapshot(workspace) == before, f"changed {sorted(snapshot(workspace).items() ^ before.items())}: {said}"


def snapshot(folder: Path) -> dict[str, object]:
    """Every file, folder and link below a folder -> its content (None: a folder)."""
    entries: dict[str, object] = {}
    for parent, folders, files in os.walk(folder):
        for name in folders:
            entries[os.path.relpath(os.path.join(parent, name), folder)] = None
        for name in files:
            path = Path(parent, name)
            key = os.path.relpath(path, folder)
            if path.is_symlink():
                entries[key] = ("link", os.readlink(path))
            else:
                entries[key] = path.read_bytes() if path.is_file() else "special"
    return entries


def json_attacks(
    prefix: str, argv: Sequence[str], rows: Iterable[tuple[str, str, Any, str]], code: int = 2
) -> list[Attack]:
    """An attack for each row (file, field, value, word): the field, `a.b.0` with dots, gets the value; the field "" is all."""
    attacks = []
    for file, where, value, word in rows:
        shown = "REMOVE" if value is REMOVE else json.dumps(value)[:40]
        attacks.append(Attack(f"{prefix}:{file}:{where}={shown}", argv, word, set_field(file, where, value), code))
    return attacks


def set_field(file: str, where: str, value: Any) -> Callable[[Path], object]:
    """A function that sets a field of a JSON file in a workspace, or removes it."""

    def edit(workspace: Path) -> None:
        path = workspace / file
        content = json.loads(path.read_text()) if path.exists() and where else None
        if not where:
            content = value
        else:
            *parents, last = (int(part) if part.isdecimal() else part for part in where.split("."))
            inner = content
            for part in parents:
                inner = inner[part]
            if value is REMOVE:
                del inner[last]
            else:
                inner[last] = value
        path.write_text(json.dumps(content))

    return edit


def text_attacks(prefix: str, argv: Sequence[str], rows: Iterable[tuple[str, str | bytes, str]]) -> list[Attack]:
    """An attack for each row (file, content, word): the whole file gets the content."""

    def write(file: str, content: str | bytes) -> Callable[[Path], object]:
        data = content.encode() if isinstance(content, str) else content
        return lambda workspace: (workspace / file).write_bytes(data)

    return [
        Attack(f"{prefix}:{file}:{content[:40]!r}", argv, word, write(file, content)) for file, content, word in rows
    ]


def shown(length: int) -> Callable[[object], str | None]:
    """For pytest's `ids`: the last characters of a value; nothing of a function, whose address differs between processes."""
    return lambda value: None if callable(value) else str(value)[-length:]
