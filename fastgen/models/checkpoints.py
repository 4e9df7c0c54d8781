"""Checkpoints: folders that are written complete or not at all, with hashes that show damage.

step-000500/  model.safetensors  ema.safetensors  optimizer.safetensors  state.json (step, job, SHA-256 of the files)
best/         ema.safetensors  state.json: the averaged weights with the lowest loss
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgen.errors import FastgenError, InputError
from fastgen.files.folders import new_folder, remove_folder
from fastgen.files.hashes import sha256_file
from fastgen.files.jsonfiles import write_json
from fastgen.files.records import Count, Record, Sha256, read_record
from fastgen.files.temporary import remove_leftovers

STATE, BEST = "state.json", "best"
_NAME = re.compile(r"step-(\d{6,})")

PartName = Annotated[str, Meta(pattern=r"^[a-z0-9_][a-z0-9_.\-]{0,99}$")]  # of a file: model, ema, ema-0.999
Tensors = Mapping[str, Tensor]


class StateFile(Record, frozen=True):
    """state.json: steps done, what training adds, and the SHA-256 of each part's file."""

    step: Count
    extra: dict[str, Any]
    sha256: Annotated[dict[PartName, Sha256], Meta(min_length=1, max_length=64)]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose files were verified."""

    folder: Path
    step: int  # optimiser steps done
    extra: Mapping[str, Any]
    sha256: Mapping[str, str]  # part -> of its file

    @property
    def parts(self) -> Collection[str]:
        """What it holds: "model", "ema", "optimizer", ..."""
        return self.sha256.keys()

    def load(self, part: str) -> dict[str, Tensor]:
        """The tensors of a part. Raises InputError where the checkpoint lacks it, or its file is none."""
        if part not in self.sha256:
            raise InputError(f"{self.folder / STATE}: sha256: holds {', '.join(self.sha256)}, expected {part} too")
        file = self.folder / f"{part}.safetensors"
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: cannot be read: {error}") from None


def save(parent: Path, step: int, parts: Mapping[str, Tensors], extra: Mapping[str, Any], limit: int) -> Path:
    """Write `parent/step-NNNNNN`, and delete all but the newest `limit` checkpoints (0: delete none).

    Raises FastgenError when the disk refuses; the older checkpoints are untouched then.
    """
    target = parent / f"step-{step:06d}"
    _write(target, step, parts, extra)
    keep_newest(parent, limit)
    return target


def keep_newest(parent: Path, limit: int) -> None:
    """Delete all but the newest `limit` checkpoints of steps (0: delete none). Raises FastgenError when the disk refuses."""
    for old in _folders(parent)[limit:] if limit else ():
        remove_folder(old)


def save_best(parent: Path, step: int, weights: Tensors, extra: Mapping[str, Any]) -> None:
    """Write `parent/best` in place of an earlier one. Raises FastgenError when the disk refuses."""
    _write(parent / BEST, step, {"ema": weights}, extra)


def _write(target: Path, step: int, parts: Mapping[str, Tensors], extra: Mapping[str, Any]) -> None:
    """`target` may exist: an earlier best, a damaged one, or one of a run that continued from an older checkpoint."""
    with new_folder(target, existing="replace") as folder:
        try:
            hashes = {name: _write_part(folder / f"{name}.safetensors", tensors) for name, tensors in parts.items()}
        except SafetensorError as error:
            raise FastgenError(f"{target}: cannot be written: {error}") from None
        write_json(folder / STATE, {"step": step, "extra": dict(extra), "sha256": hashes})


def latest(parent: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is intact; `warn` gets a line for each damaged one."""
    remove_leftovers(parent)
    for folder in _folders(parent):
        problem, checkpoint = _verify(folder)
        if checkpoint is not None:
            return checkpoint
        warn(f"warning: {folder}: {problem}; using the checkpoint before it")
    return None


def best(parent: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The averaged weights with the lowest loss; `warn` gets a line where they are damaged."""
    if not (parent / BEST).is_dir():
        return None
    problem, checkpoint = _verify(parent / BEST)
    if checkpoint is None:
        warn(f"warning: {parent / BEST}: {problem}; beginning without it")
    return checkpoint


def read(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`. Raises InputError when there is none, or when it is damaged."""
    if not folder.is_dir():
        steps = ", ".join(other.name for other in reversed(_folders(folder.parent))) or "none"
        raise InputError(f"{folder}: no such checkpoint; there are: {steps}")
    problem, checkpoint = _verify(folder)
    if checkpoint is None:
        raise InputError(f"{folder}: {problem}")
    return checkpoint


def _verify(folder: Path) -> tuple[str, Checkpoint | None]:
    try:
        state = read_record(folder / STATE, StateFile)
        match = _NAME.fullmatch(folder.name)
        if match and int(match[1]) != state.step:
            return f"{STATE}: step: found {state.step}, expected {int(match[1])}, as the folder's name says", None
        for name, expected in state.sha256.items():
            if sha256_file(folder / f"{name}.safetensors") != expected:
                return f"{name}.safetensors is damaged (SHA-256 differs)", None
    except InputError as error:
        return str(error).removeprefix(f"{folder}/"), None
    except OSError as error:
        return f"{Path(str(error.filename)).name}: {error.strerror}", None
    return "", Checkpoint(folder, state.step, state.extra, state.sha256)


def _folders(parent: Path) -> list[Path]:
    """The checkpoints of steps, the newest first."""
    numbered = [(int(match[1]), folder) for folder in parent.glob("step-*") if (match := _NAME.fullmatch(folder.name))]
    return [folder for _, folder in sorted(numbered, reverse=True)]


def _write_part(file: Path, tensors: Tensors) -> str:
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, file)
    return sha256_file(file)
