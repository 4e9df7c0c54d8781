"""Opening a TensorRT product and a GPU, or an error that says why there is none; for builders (export/trt*.py) and engines.

One code path for TensorRT 10.13 and newer, 11.x included, and for TensorRT for RTX: networks are strongly typed, and nothing is
used that one of them lacks. The names used here and there are checked against the real bindings in
tests/export/test_trt_bindings.py.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from fastgen.engines.trt.product import TENSORRT, Product
from fastgen.errors import FastgenError, InputError, NotReadyError
from fastgen.sampling import streams


class DeviceMemoryError(FastgenError, MemoryError):
    """TensorRT ran out of GPU memory: a smaller batch might succeed."""


@dataclass(frozen=True)
class TrtDevice:
    """A CUDA device as torch names it; `memory` in bytes."""

    device: str
    name: str
    compute_capability: str
    memory: int

    def active(self) -> AbstractContextManager[Any]:
        """Within it, this is the thread's current CUDA device."""
        import torch

        return torch.cuda.device(self.device)

    @contextmanager
    def stream(self) -> Iterator[int]:
        """The handle of the current stream. For the default stream, on which TensorRT would synchronise the device, that of a
        side stream: it waits for the current one, which waits for it after the block."""
        import torch

        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            if current.cuda_stream != 0:
                yield current.cuda_stream
                return
            side = streams.stream(self.device, streams.TENSORRT)
            side.wait_stream(current)
            try:
                yield side.cuda_stream
            finally:
                current.wait_stream(side)  # what was queued uses the caller's tensors


@dataclass(frozen=True)
class TrtLibrary:
    """A TensorRT product's module; `log` collects what it reports as errors."""

    product: Product
    trt: Any
    log: Any

    @property
    def version(self) -> str:
        return str(self.trt.__version__)

    def failure(self, what: str) -> FastgenError:
        """An error of one line with TensorRT's messages since the last one; a DeviceMemoryError where memory ran out."""
        told = "; ".join(dict.fromkeys(self.log.errors)) or "no reason given"
        self.log.errors.clear()
        kind = DeviceMemoryError if re.search("out ?of ?memory", told, re.IGNORECASE) else FastgenError
        return kind(f"{what}: {self.product.title} {self.version}: {' '.join(told.split())}")

    def create(self, kind: Any, what: str, *arguments: Any) -> Any:
        """`kind(*arguments, log)`; an InputError with TensorRT's words where it gives a null pointer instead of an object."""
        try:
            return kind(*arguments, self.log)
        except (TypeError, RuntimeError) as error:  # pybind11's words for a null pointer
            told = "; ".join(dict.fromkeys(self.log.errors)) or str(error)
            self.log.errors.clear()
            driver = driver_cuda()
            state = f"the driver supports CUDA {_dotted(driver)}" if driver else "no NVIDIA driver was found"
            raise InputError(
                f"{self.product.title}'s {what} cannot be made: {' '.join(told.split())} ({state}; `fastgen doctor` tells more)"
            ) from None


@dataclass(frozen=True)
class Platform(TrtLibrary):
    """A product's module and runtime on a GPU."""

    runtime: Any
    gpu: TrtDevice

    @property
    def fields(self) -> dict[str, str]:
        """The fields of a recipe that bind a plan to this library and GPU."""
        return {
            self.product.module: self.version,
            "gpu": self.gpu.name,
            "compute_capability": self.gpu.compute_capability,
            "platform": f"{sys.platform} {platform.machine()}",
        }


def open_library(product: Product) -> TrtLibrary:
    """Import a product; InputError, with what helps, when it is missing, cannot be loaded, or is too old."""
    trt = import_module(product)
    return TrtLibrary(product, trt, _make_log(trt))


def open_platform(device: str | None = None, product: Product = TENSORRT) -> Platform:
    """Import a product, find the GPU, and make a runtime on it.

    Raises InputError, with what helps, for a missing or too old product, no GPU, or a driver that is too old for either.
    """
    gpu = open_gpu(device, product)
    if refusal := product.refusal(gpu.compute_capability):
        raise InputError(f"engine {product.engine} does not run on {gpu.name}: {refusal}; use engine {TENSORRT.engine}")
    library = open_library(product)
    needed, driver = _wheel_cuda(product), driver_cuda()
    if needed and driver and driver[0] < needed:
        raise InputError(
            f"the NVIDIA driver supports CUDA {_dotted(driver)}, the installed {product.title} {library.version} needs "
            f"{needed}: update the driver, or `pip install {product.wheel(driver[0])}`"
        )
    with gpu.active():
        runtime = library.create(library.trt.Runtime, "runtime")
    return Platform(product, library.trt, library.log, runtime, gpu)


def open_gpu(device: str | None, product: Product = TENSORRT) -> TrtDevice:
    """The CUDA device `cuda` or `cuda:N` (default: the current one); InputError that says why there is none."""
    import torch

    from fastgen.engines.torch_base import check_device

    if not torch.cuda.is_available():
        raise NotReadyError(f"engine {product.engine} needs an NVIDIA GPU: {_no_gpu(torch)}")
    name = check_device(product.engine, device or "cuda", ("cuda",))
    card = torch.cuda.get_device_properties(name)
    return TrtDevice(name, card.name, f"{card.major}.{card.minor}", card.total_memory)


def import_module(product: Product) -> Any:
    """The product's module; InputError, with the command, when it is missing, cannot be loaded, or is too old."""
    command = f"`pip install {wheel(product)}`"
    try:
        trt = importlib.import_module(product.module)
    except ModuleNotFoundError as missing:
        raise NotReadyError(f"engine {product.engine} needs {missing.name}, not installed here: {command}") from None
    except (ImportError, OSError) as error:
        raise NotReadyError(f"{product.module} is installed but cannot be loaded: {error}; {command}") from None
    version = getattr(trt, "__version__", "?")
    if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < product.minimum:
        oldest = _dotted(product.minimum)
        raise InputError(f"{product.title} is {version}, expected {oldest} or newer: {command} --upgrade")
    return trt


def wheel(product: Product) -> str:
    """The product's pip name that suits torch's CUDA, or the driver's where torch has none."""
    import torch

    cuda = torch.version.cuda or _dotted(driver_cuda() or (13, 0))
    return product.wheel(int(cuda.partition(".")[0]))


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the installed NVIDIA driver supports, such as (13, 0); None without a driver."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def _no_gpu(torch: Any) -> str:
    """Why torch sees no GPU, and what helps."""
    built, driver = torch.version.cuda, driver_cuda()
    if built is None:
        return f"torch {torch.__version__} is built without CUDA; install torch as https://pytorch.org/get-started says"
    if driver is None:
        return "no NVIDIA driver was found (libcuda cannot be loaded)"
    if driver[0] < int(built.partition(".")[0]):
        return (
            f"the driver supports CUDA {_dotted(driver)}, torch {torch.__version__} is built for {built}: update the driver, "
            f"or install a torch for CUDA {driver[0]}"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hint = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
    return f"the driver supports CUDA {_dotted(driver)}, but torch sees no device{hint}; `nvidia-smi` lists them"


def _wheel_cuda(product: Product) -> int | None:
    """The CUDA major in the name of the installed wheel; None for another kind of installation."""
    for major in (12, 13, 14):
        try:
            importlib.metadata.version(product.wheel(major))
            return major
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _make_log(trt: Any) -> Any:
    """A TensorRT logger with `errors`, a list of messages."""
    severities = (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR)

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # pybind11 insists
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in severities:
                self.errors.append(msg)

    return Log()


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
