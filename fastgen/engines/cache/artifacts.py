"""Compiled networks on disk: written completely or not at all, and verified before a runtime loads them.

`cache/engines/<engine>/<digest>/` holds the compiled files and `artifact.json`, which lists the recipe's fields and the size
and SHA-256 of every file. The digest is that of the recipe: another weight, library or GPU gives another folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from msgspec import Meta

from fastgen.errors import InputError, Say
from fastgen.files.cachedir import HINT, cache_folder, check_private
from fastgen.files.folders import new_folder
from fastgen.files.hashes import FileRecord, check_file, record_files
from fastgen.files.jsonfiles import brief, write_json
from fastgen.files.names import check_relative
from fastgen.files.records import MAX_COUNT, Name, Record
from fastgen.files.records import read_record as read_json_record
from fastgen.files.temporary import is_temporary, target_of
from fastgen.models.bundle import COMPILED, Bundle

FORMAT, RECORD = 1, "artifact.json"
FOLDER = "engines"  # in the cache folder
ROWS = ("batch", "least_rows", "best_rows")  # fields of a recipe that count rows
_ADDRESS = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Recipe:
    """Cache key of a compiled network. `fields`, JSON scalars, must name everything that the compiled files depend on: network,
    batch, dtype, the SHA-256 of graph and weights, library versions, GPU, ..."""

    engine: str
    fields: Mapping[str, str | int | float | bool | None]

    @property
    def digest(self) -> str:
        """Hex SHA-256 of engine and fields, which names the artifact's folder."""
        text = json.dumps([FORMAT, self.engine, dict(self.fields)], sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def folder(self) -> Path:
        return cache_folder(FOLDER, self.engine) / self.digest

    def __str__(self) -> str:
        """`unet, batch 8, fp16`"""
        network, batch, dtype = (self.fields.get(k) for k in ("network", "batch", "dtype"))
        return ", ".join(str(x) for x in (network, None if batch is None else f"batch {batch}", dtype) if x is not None)


@dataclass(frozen=True)
class Artifact:
    """A compiled network in the cache or in a bundle. `built`: date and time of its build, ISO 8601 in UTC."""

    folder: Path
    recipe: Recipe
    files: Mapping[str, FileRecord]  # by name
    build_seconds: float
    built: str

    def file(self, name: str) -> Path:
        """Path of a file, verified. Raises InputError unless its size and SHA-256 agree with the record."""
        path = self.folder / name
        if name not in self.files:
            raise InputError(f"{self.folder}: {name} is not listed in {RECORD}; {_help(self.recipe)}")
        check_file(path, self.files[name], RECORD, _help(self.recipe))
        return path

    def verify(self) -> None:
        """Verify every file. Raises InputError as `file` does."""
        for name in self.files:
            self.file(name)

    @property
    def bytes(self) -> int:
        return sum(f.bytes for f in self.files.values())

    @property
    def last_used(self) -> float:
        """Seconds since the epoch when it was last looked up."""
        return (self.folder / RECORD).stat().st_mtime


@dataclass(frozen=True)
class DamagedFolder:
    """A folder of the cache whose record cannot be read, or is writable by others; `reason` says which."""

    folder: Path
    reason: str

    @property
    def engine(self) -> str:
        return self.folder.parent.name


class ArtifactRecord(Record, frozen=True):
    """artifact.json. `fields`: of the recipe. `built`: ISO 8601."""

    format: Literal[1]
    engine: Annotated[str, Meta(pattern="^[a-z][a-z0-9-]{0,30}$")]
    fields: dict[Name, str | Annotated[int, Meta(ge=-MAX_COUNT, le=MAX_COUNT)] | float | bool | None]
    files: Annotated[dict[Name, FileRecord], Meta(max_length=10_000)]
    build_seconds: Annotated[float, Meta(ge=0, le=1e9)]
    built: Annotated[str, Meta(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+:\dZ-]{0,6}$")]

    def __post_init__(self) -> None:
        for name in self.files:
            check_relative(name, "files")
        for key in ROWS:
            rows = self.fields.get(key, 1)
            if rows is not None and (type(rows) is not int or rows < 1):
                raise InputError(f"fields.{key}: found {brief(rows)}, expected a number of rows or null")


def find(recipe: Recipe) -> Artifact | None:
    """The artifact of this recipe, None when it was never built. Its files are not verified yet: `Artifact.file` does that.

    Raises InputError when other users can write to the cache or to the artifact's folder, or its record is damaged.
    """
    folder = recipe.folder
    if not os.path.lexists(folder):
        return None
    artifact = _read(folder)
    with suppress(OSError):  # of a cache on a disk that cannot be written, where `gc` deletes nothing either
        os.utime(folder / RECORD)
    return artifact


def obtain(
    recipe: Recipe, make: Callable[[Path], None], say: Say = lambda line: None, *, say_built: bool = True
) -> Artifact:
    """The artifact of this recipe, verified. It is built when it is missing, and built again when it is damaged.

    `make(folder)` writes the compiled files into an empty folder. Of several processes one builds, and the others wait for it.
    What a killed build leaves is never loaded. `say` gets a line about damage and waiting, and with `say_built` about the
    beginning and end of a build. Raises FastgenError when the disk refuses.
    """
    with _lock(recipe, say):
        try:
            if (artifact := find(recipe)) is not None:
                artifact.verify()
                return artifact
        except InputError as error:
            say(f"{error}; building it again")
        return _build(recipe, make, say if say_built else lambda line: None)


class FieldDifference(NamedTuple):
    """A field whose value differs between an artifact (`there`) and a recipe (`here`)."""

    field: str
    there: Any
    here: Any

    def __str__(self) -> str:
        """`gpu is NVIDIA A100 there, NVIDIA H200 here`."""
        return f"{self.field} is {_short(self.there)} there, {_short(self.here)} here"


def differences(there: Recipe, here: Recipe) -> list[FieldDifference]:
    """The fields in which two recipes differ. A field that is None in `here` matches anything."""
    names = [name for name in dict.fromkeys([*here.fields, *there.fields]) if here.fields.get(name, "") is not None]
    pairs = [FieldDifference(name, there.fields.get(name), here.fields.get(name)) for name in names]
    return [pair for pair in pairs if pair.there != pair.here]


def ranked(recipe: Recipe, among: Iterable[Artifact]) -> list[tuple[Artifact, list[FieldDifference]]]:
    """The artifacts of a recipe's network, each with its differences from the recipe; the one with the fewest first."""
    network = recipe.fields.get("network")
    pairs = [(a, differences(a.recipe, recipe)) for a in among if a.recipe.fields.get("network") == network]
    return sorted(pairs, key=lambda pair: len(pair[1]))


def artifacts(engine: str | None = None) -> list[Artifact]:
    """All artifacts of the cache, or of one engine, by engine and address. A damaged record raises InputError."""
    return [_read(folder) for folder in _recorded(engine)]


def scan(engine: str | None = None) -> tuple[list[Artifact], list[DamagedFolder]]:
    """The artifacts of the cache, or of one engine, and the folders that are damaged or writable by others."""
    sound: list[Artifact] = []
    damaged: list[DamagedFolder] = []
    for folder in _recorded(engine):
        try:
            sound.append(_read(folder))
        except InputError as error:
            damaged.append(DamagedFolder(folder, str(error)))
    return sound, damaged


def remove(folder: Path) -> bool:
    """Delete an artifact's folder; False when another process holds its lock: it builds the artifact, or is about to load it.

    The record goes first, so that a folder whose deletion was interrupted is never loaded.
    """
    with _free(folder) as free:
        if free and folder.is_symlink():
            folder.unlink()
        elif free:
            (folder / RECORD).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
        return free


def leftovers(engine: str | None = None) -> Iterator[Path]:
    """Folders of killed builds: partial ones whose lock is free, and folders without a record.

    The lock is held until the next folder is asked for, so that nobody builds in this one.
    """
    for folder in _folders(engine):
        if not (_ADDRESS.fullmatch(target_of(folder.name)) and folder.is_dir()):
            continue
        if (folder / RECORD).exists() and not is_temporary(folder.name):
            continue
        with _free(folder) as free:
            if free:
                yield folder


def _recorded(engine: str | None) -> list[Path]:
    return [f for f in _folders(engine) if _ADDRESS.fullmatch(f.name) and os.path.lexists(f / RECORD)]


def _folders(engine: str | None) -> list[Path]:
    """What lies in the engines' folders, or in one engine's. InputError where other users can write to such a folder, or where
    it is a link: it is not looked into, and nothing is deleted there."""
    root = cache_folder(FOLDER)
    engines = [
        path for path in sorted(root.iterdir()) if not path.name.startswith(".") and path.name in (engine or path.name,)
    ]
    for path in engines:
        check_private(path)
    return [path for folder in engines for path in sorted(folder.iterdir())]


@contextmanager
def _free(folder: Path) -> Iterator[bool]:
    """Hold the lock of an artifact's folder, final or partial, within the block; yields False if another process holds it."""
    from filelock import FileLock, Timeout

    try:
        lock = FileLock(folder.with_name(f"{target_of(folder.name)}.lock")).acquire(timeout=0)
    except Timeout:
        yield False
        return
    with lock:
        yield True


def _build(recipe: Recipe, make: Callable[[Path], None], say: Say) -> Artifact:
    folder = recipe.folder
    say(f"building {recipe.engine}: {recipe}")
    start = time.perf_counter()
    with new_folder(folder, existing="replace") as partial:  # this process holds the lock
        partial.chmod(0o700)
        make(partial)
        seconds = time.perf_counter() - start
        write_record(partial, recipe, seconds)
        for path in partial.rglob("*"):  # whatever the umask is, and what libraries set
            path.chmod(0o700 if path.is_dir() else 0o600)
    say(f"built {recipe.engine}: {recipe} in {seconds:.1f} s")
    return _read(folder)


def _lock(recipe: Recipe, say: Say) -> AbstractContextManager[Any]:
    """Acquire the recipe's lock, for the block after it; the system releases the lock of a process that dies."""
    from filelock import FileLock, Timeout

    folder = recipe.folder
    lock = FileLock(folder.with_name(f"{recipe.digest}.lock"))
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        say(f"another process is building {recipe.engine}: {recipe}; waiting for it")
        return lock.acquire()
    except OSError as error:
        raise InputError(f"{lock.lock_file}: cannot be locked: {error.strerror or error}; {HINT}") from None


def _read(folder: Path) -> Artifact:
    """The artifact in a folder of the cache. InputError where other users can write to the folder or to a file of it."""
    check_private(folder.parent)
    check_private(folder)
    check_private(folder / RECORD, file=True)
    artifact = read_record(folder)
    for name in artifact.files:
        if (folder / name).exists() or (folder / name).is_symlink():  # `Artifact.file` says what is missing
            check_private(folder / name, file=True)
    return artifact


def write_record(folder: Path, recipe: Recipe, build_seconds: float) -> None:
    """Write the record of the files in `folder`; it is the last file of an artifact."""
    record = {
        "format": FORMAT,
        "engine": recipe.engine,
        "fields": dict(recipe.fields),
        "files": record_files(folder),
        "build_seconds": round(build_seconds, 3),
        "built": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(folder / RECORD, record)


def bundled(bundle: Bundle, engine: str = COMPILED) -> list[Artifact]:
    """The compiled networks of `engine` in a bundle, their records verified; `Artifact.file` verifies the other files.

    Raises InputError for a record that is missing, changed or malformed.
    """
    records = [name for name in bundle.files if name.startswith(f"{engine}/") and name.endswith(f"/{RECORD}")]
    return [read_record(bundle.file(name).parent) for name in records]


def read_record(folder: Path) -> Artifact:
    """The artifact in `folder`; its files are not verified. Raises InputError for a malformed record or another format."""
    try:
        record = read_json_record(folder / RECORD, ArtifactRecord)
    except InputError as error:
        raise InputError(f"{error}; run `fastgen engines gc`") from None
    recipe = Recipe(record.engine, record.fields)
    if (recipe.engine, recipe.digest) != (folder.parent.name, folder.name):
        raise InputError(f"{folder}: holds {recipe.engine}: {recipe}, made for other fields; {_help(recipe)}")
    return Artifact(folder, recipe, record.files, record.build_seconds, record.built)


def _help(recipe: Recipe) -> str:
    """The command that helps: it builds the network again, or deletes one that is built when it is first needed."""
    from fastgen.engines import engine_class, engine_names

    option = engine_class(recipe.engine).built_by if recipe.engine in engine_names() else None
    return f"run `fastgen export BUNDLE {option}` again" if option else "run `fastgen engines gc --damaged`"


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 and all(c in "0123456789abcdef" for c in text) else text
