"""onnxruntime on a bundle's ONNX graphs: on a CPU by this engine, on CUDA by `cuda.CudaEngine`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fastgen.engines import has_distribution
from fastgen.engines.machine import cpu, has_int8
from fastgen.engines.ort.cuda import PROVIDER, CudaEngine
from fastgen.engines.ort.session import OrtEngine, failure
from fastgen.errors import InputError
from fastgen.models.bundle_record import AGAIN

if TYPE_CHECKING:
    from fastgen.models.bundle import Bundle


class Engine(OrtEngine):
    """On a CPU, in fp32 or int8, on NumPy arrays."""

    dtypes = ("fp32", "fp16", "int8")  # fp16 on CUDA, int8 on a CPU
    lowered_graphs = ("fp16", "int8")
    batch_invariant = True
    splits = True

    @classmethod
    def open(
        cls, source: Bundle, *, device: str | None = None, dtype: str | None = None, threads: int | None = None
    ) -> OrtEngine:
        """The engine for this device, by default for the GPU where onnxruntime's CUDA build and torch see one."""
        device = device or default_device()
        kind = CudaEngine if device.startswith("cuda") else cls
        return kind(source, device=device, dtype=dtype, threads=threads)

    def __init__(
        self, source: Bundle, *, device: str | None = None, dtype: str | None = None, threads: int | None = None
    ) -> None:
        if device not in (None, "cpu"):
            raise InputError(f"device {device!r}: engine ort runs on cpu, cuda, cuda:N")
        if dtype not in (None, "fp32", "int8"):
            raise InputError(f"engine ort executes fp32 and int8 on cpu, not {dtype}")
        self.xp, self.device, self.dtype = np, "cpu", dtype or "fp32"
        self.set_source(source, threads)
        self._sessions: dict[str, tuple[Any, str]] = {}

    def run(self, network: str, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        rows = self.checked_rows(network, inputs)
        if network not in self._sessions:
            self._sessions[network] = self._session(network)
        session, path = self._sessions[network]
        signature = self.signatures[network]
        feed = {tensor.name: value for tensor, value in zip(signature.inputs, inputs, strict=True)}
        try:
            values = tuple(session.run([tensor.name for tensor in signature.outputs], feed))
        except Exception as error:  # onnxruntime's exceptions share no public base class
            raise failure(path, "run", error) from None
        for value, tensor in zip(values, signature.outputs, strict=True):
            if value.shape != tensor.with_batch(rows):
                found = f"{tensor.name} is {value.shape}, expected {tensor.with_batch(rows)}"
                raise InputError(f"{path}: {found}; {AGAIN}")
        return values

    def array(self, values: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(values)

    def numpy(self, values: np.ndarray) -> np.ndarray:
        return values

    def _session(self, network: str) -> tuple[Any, str]:
        """A session, and the path of its graph."""
        import onnxruntime as ort

        path = self.graph(network)
        try:
            options = self.session_options()
            if self.executed(network) == "int8" and not has_int8(cpu()):  # sums of products in 16 bits would overflow
                options.add_session_config_entry("session.x64quantprecision", "1")
            return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]), path
        except Exception as error:  # onnxruntime's exceptions share no public base class
            raise failure(path, "load", error) from None


def default_device() -> str:
    """The GPU where onnxruntime's CUDA build and torch see one, else the CPU."""
    import onnxruntime as ort

    if PROVIDER not in getattr(ort, "get_available_providers", list)() or not has_distribution("torch"):
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
