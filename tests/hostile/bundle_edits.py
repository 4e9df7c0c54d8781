"""Edits of the bundle in a workspace, by somebody who computes the hashes and the digest again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attacks import REMOVE

from fastgen.files.hashes import sha256_file
from fastgen.models.bundle_record import sealed

RECORD = "bundle/bundle.json"
Edit = Callable[[Path], object]


def reseal(workspace: Path) -> None:
    """Compute the digest of bundle.json again."""
    file = workspace / RECORD
    value = json.loads(file.read_text())
    if isinstance(value, dict):
        file.write_text(json.dumps(sealed(value)))


def rehash(workspace: Path) -> None:
    """Compute the hashes of all files again, and the digest over them."""
    file = workspace / RECORD
    value = json.loads(file.read_text())
    for name in value["files"]:
        path = workspace / "bundle" / name
        if path.is_file():
            value["files"][name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    file.write_text(json.dumps(sealed(value)))


def then(*edits: Callable[[Path], object]) -> Callable[[Path], object]:
    def run(workspace: Path) -> None:
        for edit in edits:
            edit(workspace)

    return run


def set_path(where: str, value: Any) -> Callable[[Path], object]:
    def edit(workspace: Path) -> None:
        file = workspace / RECORD
        content = json.loads(file.read_text())
        if not where:
            file.write_text(json.dumps(value))
            return
        head, _, rest = where.partition(".")
        if head == "files" and rest:
            name, _, last = rest.replace("~onnx.", "~onnx|").replace("~npz.", "~npz|").partition("|")
            steps = ["files", name.replace("~", "."), *([last] if last else [])]
        else:
            steps = where.split(".")
        inner = content
        for step in steps[:-1]:
            inner = inner[int(step)] if isinstance(inner, list) else inner.setdefault(step, {})
        last = int(steps[-1]) if isinstance(inner, list) else steps[-1]
        if value is REMOVE:
            del inner[last]
        else:
            inner[last] = value
        file.write_text(json.dumps(content))

    return edit


def forged(*edits: Edit) -> Edit:
    """These edits, after which all hashes agree with the files."""
    return then(*edits, rehash)


def write(name: str, data: bytes) -> Edit:
    return lambda workspace: (workspace / "bundle" / name).write_bytes(data)


def replace(name: str, old: bytes, new: bytes) -> Edit:
    """Replace bytes of a file by as many others."""
    assert len(old) == len(new)

    def edit(workspace: Path) -> None:
        data = (workspace / "bundle" / name).read_bytes()
        assert old in data
        (workspace / "bundle" / name).write_bytes(data.replace(old, new))

    return edit


def cut(name: str, share: float) -> Edit:
    """Keep this share of a file."""

    def edit(workspace: Path) -> None:
        path = workspace / "bundle" / name
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])

    return edit


def copy(source: str, target: str) -> Edit:
    return lambda workspace: (workspace / "bundle" / target).write_bytes((workspace / "bundle" / source).read_bytes())


def link(name: str, target: str) -> Edit:
    """Put a symlink in the place of a file or folder, which is kept under the name `moved` in the workspace."""

    def edit(workspace: Path) -> None:
        path = workspace / "bundle" / name
        path.rename(workspace / "moved")
        path.symlink_to(target)

    return edit
