"""The base class of engines whose arrays are torch tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fastgen.engines import base
from fastgen.engines.fp32 import exact_fp32
from fastgen.errors import InputError

if TYPE_CHECKING:
    from fastgen.engines.doctor.diagnosis import Machine, Problem

# Words of errors, other than torch's OutOfMemoryError, that mean that memory ran out.
OUT_OF_MEMORY = (
    "out of memory",
    "not enough memory",  # torch on a CPU
    "can't allocate memory",  # the same
    "status_alloc_failed",
    "unable to find an engine",  # cuDNN, when none of its algorithms gets the workspace that it needs
    "failed to allocate memory",  # onnxruntime
)


class TorchEngine(base.Engine):
    """An engine on torch tensors of one device."""

    _library_errors: ClassVar[type[Exception]] = RuntimeError  # what its library raises, whatever is wrong

    @classmethod
    def library_problems(cls, machine: Machine) -> Iterator[Problem]:
        from fastgen.engines.doctor.diagnosis import torch_problems

        return torch_problems(machine)

    def open_device(self, device: str | None, threads: int | None, kinds: tuple[str, ...] = ("cpu", "cuda")) -> None:
        """Sets `xp` and `device` (by default the GPU if there is one); InputError for a device that is not there."""
        import torch

        self._torch = torch
        self.xp = torch
        self.device = check_device(self.name, device or ("cuda" if torch.cuda.is_available() else kinds[0]), kinds)
        if self.device.startswith("cuda"):
            self.decode_pixels = 2**20  # 16 images of 256 px fill any GPU
        if threads:
            torch.set_num_threads(threads)

    def array(self, values: np.ndarray) -> Any:
        """On a GPU the copy is queued, from pinned memory: the host does not wait for what is queued before it."""
        tensor = self._torch.from_numpy(np.ascontiguousarray(values))
        if not self.device.startswith("cuda"):
            return tensor
        with self._torch.cuda.device(self.device):  # pinning makes a CUDA context on the current device, if it has none
            return tensor.pin_memory().to(self.device, non_blocking=True)

    def numpy(self, values: Any) -> np.ndarray:
        return values.cpu().numpy()

    def precisely(self, network: str) -> AbstractContextManager[Any]:
        """The context in which torch must run this network: fp32 networks without rounding to TF32 or bf16."""
        return exact_fp32() if self.executed(network) == "fp32" else nullcontext()

    def is_out_of_memory(self, error: BaseException) -> bool:
        return is_out_of_memory(error, self._library_errors)

    def synchronize(self) -> None:
        if self.device.startswith("cuda"):
            self._torch.cuda.synchronize(self.device)

    def release_memory(self) -> None:
        if self.device.startswith("cuda"):
            self._torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException, library_errors: type[Exception] = RuntimeError) -> bool:
    """Whether memory ran out, on a GPU or on the host, by the error's class or, for `library_errors`, its words."""
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, library_errors) and any(words in text for words in OUT_OF_MEMORY)


def check_device(engine: str, device: str, kinds: tuple[str, ...] = ("cpu", "cuda")) -> str:
    """`device`, if it is of one of the kinds and torch sees it; InputError otherwise."""
    import torch

    kind, _, index = device.partition(":")
    if kind not in kinds or (index and (kind != "cuda" or not index.isdecimal())) or device.endswith(":"):
        choices = [*(k for k in kinds if k != "cuda"), *(("cuda", "cuda:N") if "cuda" in kinds else ())]
        raise InputError(f"device {device!r}: engine {engine} runs on {', '.join(choices)}")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        gpus = f"{torch.cuda.device_count()} CUDA GPUs" if torch.cuda.is_available() else "no CUDA GPU"
        raise InputError(f"device {device}: torch {torch.__version__} sees {gpus} here")
    return device
