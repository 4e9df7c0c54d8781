"""onnxruntime on the bundle's ONNX graphs (CPU, fp32), those with its own attention operator where the bundle has them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fastgen.engines import base
from fastgen.errors import FastgenError, InputError

if TYPE_CHECKING:
    from fastgen.bundle import Bundle

FUSED = "model.ort.onnx"  # MultiHeadAttention instead of matrix products and a softmax over all pairs of pixels


class Engine(base.Engine):
    name = "ort"
    source_kind = "bundle"
    packages = ("onnxruntime",)
    install = 'pip install "fastgen-diffusion[cpu]"'
    dtypes = ("fp32",)

    def __init__(
        self, source: Bundle, *, device: str | None = None, dtype: str | None = None, threads: int | None = None
    ) -> None:
        if device not in (None, "cpu"):
            raise InputError(f"engine ort runs on cpu, not {device}")
        self.xp = np
        self.device = "cpu"
        self.dtype = base.choose_dtype(Engine, dtype, "fp32")
        self.signatures = source.spec.signatures
        self._bundle, self._threads = source, threads
        self._sessions: dict[str, Any] = {}

    def run(self, network: str, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        if network not in self._sessions:
            self._sessions[network] = self._open(network)
        names = [t.name for t in self.signatures[network].inputs]
        return tuple(self._sessions[network].run(None, dict(zip(names, inputs, strict=True))))

    def _open(self, network: str) -> Any:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3
        if self._threads:
            options.intra_op_num_threads = self._threads
        path = self._bundle.network(network)  # verifies the weights, which both graphs share
        if (fused := f"{network}/{FUSED}") in self._bundle.files:
            path = self._bundle.file(fused)
        try:
            return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no public base class
            raise FastgenError(f"{path}: onnxruntime {ort.__version__} cannot load it: {error}") from error

    def array(self, values: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(values)

    def numpy(self, values: np.ndarray) -> np.ndarray:
        return values
