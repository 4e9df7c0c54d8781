"""Deleting compiled engines that are of no use any more, each under its lock."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastgen.engines.cache import artifacts
from fastgen.engines.cache.artifacts import Artifact, DamagedFolder, Recipe
from fastgen.engines.cache.listing import folder_bytes, library_fields, short_version, size_text
from fastgen.engines.doctor.libraries import distributions
from fastgen.errors import InputError
from fastgen.files.jsonfiles import brief

DAY = 86400.0


@dataclass(frozen=True)
class Deletion:
    """A folder that `collect` deletes, or would delete, and why."""

    folder: Path
    what: str
    why: str
    bytes: int


@dataclass(frozen=True)
class Selection:
    """What `collect` deletes. By default: leftovers of killed builds, damaged artifacts, and those of another version of a
    library than the installed one. `damaged` also verifies the hash of every file."""

    everything: bool = False
    damaged: bool = False
    unused_days: float | None = None
    max_bytes: int | None = None

    @property
    def default(self) -> bool:
        return not (self.everything or self.damaged) and self.unused_days is None and self.max_bytes is None


def collect(
    selection: Selection, engine: str | None = None, *, dry_run: bool = False, now: float | None = None
) -> Iterator[tuple[Deletion, bool]]:
    """Delete what is selected, of one engine or all; yields each with True, or False where another process is building it.
    With `dry_run` nothing is deleted."""
    sound, damaged = artifacts.scan(engine)
    time_now = time.time() if now is None else now
    if selection.default or selection.everything:
        for folder in artifacts.leftovers(engine):  # it is locked until the next turn
            deletion = Deletion(folder, folder.parent.name, "left by a build that was killed", folder_bytes(folder))
            if not dry_run:
                shutil.rmtree(folder, ignore_errors=True)
            yield deletion, dry_run or not folder.exists()
    for deletion in list(_choose(selection, sound, damaged, time_now)):
        yield deletion, dry_run or artifacts.remove(deletion.folder)


def _choose(
    selection: Selection, sound: Sequence[Artifact], damaged: Sequence[DamagedFolder], now: float
) -> Iterator[Deletion]:
    if selection.default or selection.everything or selection.damaged:
        yield from (Deletion(bad.folder, bad.engine, bad.reason, folder_bytes(bad.folder)) for bad in damaged)
    versions = distributions() if selection.default else {}
    rest = []
    for artifact in sound:
        if reason := _reason(selection, artifact, versions, now):
            yield _deletion(artifact, reason)
        else:
            rest.append(artifact)
    if selection.max_bytes is None:
        return
    total = sum(artifact.bytes for artifact in rest)
    for artifact in sorted(rest, key=lambda a: a.last_used):
        if total <= selection.max_bytes:
            return
        yield _deletion(artifact, f"used longest ago, and more than {size_text(selection.max_bytes)} in all")
        total -= artifact.bytes


def _reason(selection: Selection, artifact: Artifact, versions: Mapping[str, str], now: float) -> str | None:
    """Why an artifact is deleted, whatever the others are; None when it stays."""
    if selection.everything:
        return "--all"
    if selection.default:
        return outdated(artifact.recipe, versions) or _truncated(artifact)
    if selection.damaged:
        try:
            artifact.verify()
        except InputError as error:
            return str(error)
    unused = (now - artifact.last_used) / DAY
    if selection.unused_days is not None and unused > selection.unused_days:
        return f"not used for {unused:.0f} days"
    return None


def _deletion(artifact: Artifact, why: str) -> Deletion:
    return Deletion(artifact.folder, f"{artifact.recipe.engine}: {artifact.recipe}", why, artifact.bytes)


def outdated(recipe: Recipe, installed: Mapping[str, str]) -> str | None:
    """The library of the recipe whose installed version is another one, in words; None when all that are installed agree."""
    for name in library_fields(recipe):
        here = [v for d, v in installed.items() if re.fullmatch(rf"{re.escape(name)}(-cu\d+)?(-bindings)?", d)]
        there = str(recipe.fields[name])
        if here and not any(_same_version(there, version) for version in here):
            return f"made by {name} {short_version(there)}, {short_version(here[0])} is installed"
    return None


def _same_version(one: str, other: str) -> bool:
    """Equal, or one names the build too: `2026.4.1` and `2026.4.1-22982-e213a1`."""
    short, long = sorted((one, other), key=len)
    return long == short or (long.startswith(short) and long[len(short)] in "+-.")


def _truncated(artifact: Artifact) -> str | None:
    """The file whose size is not the recorded one."""
    for name, listed in artifact.files.items():
        path = artifact.folder / name
        if not path.is_file() or path.stat().st_size != listed.bytes:
            return f"{name} is missing or truncated"
    return None


def parse_size(text: str) -> int:
    """`5GB`, `500 MB`, `2GiB` or a number of bytes -> bytes. Raises InputError otherwise."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?)(I?)B?", text.strip().upper(), re.ASCII)
    if match is None:
        raise InputError(f"--max-size: found {brief(text)}, expected a number and a unit, such as 5GB, 500MB or 2GiB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2] or " "))
