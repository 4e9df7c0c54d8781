"""What warming a model up has measured, kept in the cache: the next server on this machine is ready without measuring again."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from fastgen import __version__
from fastgen.engines.machine import cpu
from fastgen.errors import InputError
from fastgen.files.cachedir import cache_folder
from fastgen.files.hashes import sha256_json
from fastgen.files.jsonfiles import write_json
from fastgen.files.records import Record, builtins, read_record
from fastgen.files.temporary import remove_leftovers
from fastgen.serving.messages import Costs
from fastgen.serving.warm import CPU_SIZES, GPU_SIZES, Warm, warm_of

if TYPE_CHECKING:
    from pathlib import Path

    from fastgen.generate.runner import ModelRunner

FORMAT: Literal[1] = 1
FOLDER = "serving"  # in the cache folder
LOCK = "timing.lock"  # whoever times a model holds it, so that nobody else does at the same time

Images = Annotated[int, Meta(ge=1, le=4096)]
Seconds = tuple[tuple[Images, Annotated[float, Meta(ge=0, le=1e6)]], ...]  # by images in a step


class Remembered(Record, frozen=True):
    """The file of one model on one engine: the fields of `warm.Warm`. `key`: see `key_of`."""

    format: Literal[1]
    key: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    guided: Seconds
    plain: Seconds
    decode: Seconds
    slots: Images
    exact: bool

    def __post_init__(self) -> None:
        if not self.plain or not self.decode:
            raise InputError("plain, decode: found no size, expected some")


def key_of(pipeline: ModelRunner, guided: bool, exact: bool, threads: int | None) -> str:
    """Hex SHA-256 of everything that the measurements depend on: the model, engine, libraries and hardware."""
    engine, processor = pipeline.engine, cpu()
    libraries = [[name, str(getattr(sys.modules.get(name), "__version__", None))] for name in engine.packages]
    model = [pipeline.spec.sha256, pipeline.spec.checkpoint, guided, exact]
    hardware = [engine.device, _card(engine.device), processor.name, *processor.isa, processor.cores]
    sizes = [GPU_SIZES, CPU_SIZES, str(engine.buckets(True)), str(engine.buckets(False))]
    settings = [engine.name, engine.dtype, pipeline.graphs, threads, os.environ.get("OMP_NUM_THREADS")]
    return sha256_json([FORMAT, __version__, model, settings, libraries, hardware, sizes])


class Memory:
    """The files of what was measured. Raises InputError where the cache cannot be used."""

    def __init__(self) -> None:
        self.folder = cache_folder(FOLDER)

    @property
    def writable(self) -> bool:
        """Whether files can be added: not on a disk that can only be read."""
        return os.access(self.folder, os.W_OK)

    def file(self, key: str) -> Path:
        """Where the measurements of this key are."""
        return self.folder / f"{key}.json"

    def recall(self, key: str) -> Warm | None:
        """What was remembered under this key; None where there is nothing. Raises InputError for a file that is damaged."""
        path = self.file(key)
        if not os.path.lexists(path):
            return None
        try:
            found = read_record(path, Remembered)
            if found.key != key:
                raise InputError(f"{path}: key: found that of another model")
        except InputError as error:
            raise InputError(f"{error}; delete the file, and it is measured again") from None
        return warm_of(Costs(dict(found.guided), dict(found.plain), dict(found.decode)), found.slots, found.exact)

    def remember(self, key: str, warm: Warm) -> None:
        """Keep these measurements. Raises FastgenError where the cache cannot be written."""
        found = warm.costs
        guided, plain, decode = (tuple(points.items()) for points in (found.guided, found.plain, found.decode))
        record = Remembered(FORMAT, key, guided, plain, decode, warm.slots, warm.exact)
        remove_leftovers(self.folder)
        write_json(self.file(key), builtins(record))

    def timed_alone(self) -> AbstractContextManager[Any]:
        """Waits until no other process of this cache times a model."""
        from filelock import FileLock

        return FileLock(self.folder / LOCK)


def _card(device: str) -> str | None:
    """The name of a GPU."""
    if not device.startswith("cuda"):
        return None
    import torch

    return torch.cuda.get_device_name(device)
