"""Kernels that TensorRT for RTX compiles on the card when a plan first runs at a shape: kept on disk for the next process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastgen.engines.base import announce
from fastgen.engines.machine import gpus
from fastgen.engines.trt.cache_files import private_file, read_hashed, write_hashed
from fastgen.engines.trt.platform import Platform, driver_cuda
from fastgen.errors import FastgenError

FOLDER = "kernels"


class RuntimeCache:
    """The kernels of all plans of one process, read from and written to a file per GPU, driver and TensorRT version.

    TensorRT refuses kernels of another environment itself. If two processes compile at the same time, the later one's file
    stays, and kernels that it lacks are compiled again.
    """

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self._path: Path | None = None
        self._kernels: Any = None  # an IRuntimeCache
        self._stored = b""

    def attach(self, runtime_config: Any, what: str) -> None:
        """Let contexts of an IRuntimeConfig use these kernels, and add to them."""
        if self._kernels is None:
            self._kernels = self._read(runtime_config)
        if not runtime_config.set_runtime_cache(self._kernels):
            raise self._platform.failure(f"{what}: the runtime cache is refused")

    def save(self) -> None:
        """Write the kernels, if there are new ones. If the disk refuses, that is announced: the next process compiles them."""
        from filelock import FileLock

        with self._platform.gpu.active():
            data = bytes(self._kernels.serialize())
        if data == self._stored:
            return
        path = self._file()
        try:
            with FileLock(path.with_name(f"{path.name}.lock")):
                write_hashed(path, data)
        except (FastgenError, OSError) as error:
            announce(f"the kernels that were compiled for this card are not kept: {error}")
        self._stored = data

    def _read(self, runtime_config: Any) -> Any:
        """An IRuntimeCache with the kernels of the file; a damaged file, or one that TensorRT refuses, is announced."""
        path = self._file()
        kernels = runtime_config.create_runtime_cache()
        data = read_hashed(path, lambda: announce(f"{path}: damaged; kernels are compiled anew"))
        if data and kernels.deserialize(data):
            self._stored = data
        elif data:
            self._platform.log.errors.clear()
            announce(f"{path}: {self._platform.product.title} does not accept these kernels; they are compiled anew")
        return kernels

    def _file(self) -> Path:
        """The file of this GPU, driver and TensorRT. Raises InputError when others could write to it, as its code is run."""
        if self._path is None:
            platform = self._platform
            driver = gpus()[1].version or "cuda {}.{}".format(*(driver_cuda() or (0, 0)))
            gpu = f"{platform.gpu.name} {platform.gpu.compute_capability}"
            self._path = private_file(FOLDER, f"{platform.product.engine} {platform.version} {gpu} {driver}", ".cache")
        return self._path
