"""OpenVINO on the bundle's ONNX graphs: bf16 where the CPU has it, one static-shape compilation per batch size, cached."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fastgen.cachedir import cache_dir
from fastgen.engines import base
from fastgen.errors import InputError

if TYPE_CHECKING:
    from fastgen.bundle import Bundle

_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}


class Engine(base.Engine):
    name = "openvino"
    source_kind = "bundle"
    packages = ("openvino",)
    install = 'pip install "fastgen-diffusion[cpu]"'
    dtypes = ("bf16", "fp32", "fp16")
    static_shapes = True

    def __init__(
        self, source: Bundle, *, device: str | None = None, dtype: str | None = None, threads: int | None = None
    ) -> None:
        import openvino

        if device not in (None, "cpu"):
            raise InputError(f"engine openvino runs on cpu, not {device}")
        self.xp = np
        self.device = "cpu"
        self._core = openvino.Core()
        capabilities = self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        self.dtype = base.choose_dtype(Engine, dtype, "bf16" if "BF16" in capabilities else "fp32")
        if _HINTS[self.dtype].upper() not in ("F32", *(c.upper().replace("FP", "F") for c in capabilities)):
            raise InputError(f"engine openvino: this CPU has no {self.dtype}; it has {', '.join(capabilities)}")
        self.signatures = source.spec.signatures
        self._bundle, self._threads = source, threads
        self._requests: dict[tuple[str, int], Any] = {}

    def run(self, network: str, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        key = (network, len(inputs[0]))
        if key not in self._requests:
            self._requests[key] = self._compile(*key)
        request = self._requests[key]
        request.infer(inputs, share_inputs=True)
        return tuple(np.array(tensor.data) for tensor in request.output_tensors)

    def _compile(self, network: str, batch: int) -> Any:
        path = self._bundle.network(network)
        model = self._core.read_model(path)
        model.reshape({t.name: t.with_batch(batch) for t in self.signatures[network].inputs})
        config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": _HINTS[self.dtype], "PERFORMANCE_HINT": "LATENCY"}
        config["CACHE_DIR"] = str(cache_dir() / "openvino")
        if self._threads:
            config["INFERENCE_NUM_THREADS"] = self._threads
        return self._core.compile_model(model, "CPU", config).create_infer_request()

    def array(self, values: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(values)

    def numpy(self, values: np.ndarray) -> np.ndarray:
        return values
