"""onnxruntime on the bundle's ONNX graphs, those with its own attention operator where the bundle has them.

On the CPU in fp32, on NumPy arrays. On CUDA in fp16 (the default where the bundle has it) or fp32, on torch tensors; not in
bf16, for which onnxruntime's CUDA provider lacks operators (Resize, and in older releases convolutions).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from fastgen import streams
from fastgen.bundle import graph_name
from fastgen.engines import has_distribution
from fastgen.engines.base import announce
from fastgen.engines.base_ort_cuda import PROVIDER, Runner, open_session, provider_options
from fastgen.engines.base_torch import TorchEngine
from fastgen.errors import FastgenError, InputError
from fastgen.installing import Install, hint
from fastgen.signatures import network_dtype

if TYPE_CHECKING:
    from pathlib import Path

    from fastgen.bundle import Bundle
    from fastgen.doctor.diagnosis import Machine, Problem

DTYPES = {"cpu": ("fp32",), "cuda": ("fp16", "fp32")}


def fused_name(graph: str) -> str:
    """`model.onnx` -> `model.ort.onnx`: the same graph and weights with onnxruntime's MultiHeadAttention, instead of matrix
    products and a softmax over all pairs of pixels."""
    return graph.removesuffix(".onnx") + ".ort.onnx"


FUSED = fused_name("model.onnx")


class Engine(TorchEngine):
    name = "ort"
    source_kind = "bundle"
    packages = ("onnxruntime",)
    install = Install("cpu")
    dtypes = ("fp32", "fp16")
    _library_errors = Exception  # onnxruntime's share no base class

    def __init__(
        self, source: Bundle, *, device: str | None = None, dtype: str | None = None, threads: int | None = None
    ) -> None:
        self.signatures = source.spec.signatures
        self._bundle, self._threads = source, threads
        self._runners: dict[str, Any] = {}
        self._on_gpu = (device or default_device()).startswith("cuda")
        if self._on_gpu:
            _check_gpu_build()
            self.open_device(device or "cuda", threads, ("cuda",))
            self.static_shapes = True  # type: ignore[misc]  # a graph is recorded per number of rows
        elif device not in (None, "cpu"):
            raise InputError(f"device {device!r}: engine ort runs on cpu, cuda, cuda:N")
        else:
            self.xp, self.device = np, "cpu"
        kind = "cuda" if self._on_gpu else "cpu"
        if dtype is not None and dtype not in DTYPES[kind]:
            raise InputError(f"engine ort executes {', '.join(DTYPES[kind])} on {kind}, not {dtype}")
        self.dtype = dtype or ("fp16" if self._on_gpu and self._has_fp16() else "fp32")
        if self._on_gpu and dtype is None and self.dtype == "fp32":
            announce(
                "engine ort runs in fp32: the bundle has no fp16 graphs; `fastgen export MODEL --dtype fp16` adds them"
            )

    @classmethod
    def library_problems(cls, machine: Machine) -> Iterator[Problem]:
        from fastgen.doctor.diagnosis import onnxruntime_problems

        return onnxruntime_problems(machine)

    @classmethod
    def priority(cls, folder: Path, device: str | None) -> int:
        """The first on a GPU that needs nothing built, the last on a CPU."""
        on_gpu = device.startswith("cuda") if device else has_distribution("onnxruntime-gpu")
        return 3 if on_gpu else 1

    def _has_fp16(self) -> bool:
        """Whether the bundle was exported with fp16 graphs, the default on a GPU."""
        graphs = {n: graph_name(n, d) for n in self.signatures if (d := network_dtype(n, "fp16")) != "fp32"}
        return all(graph in self._bundle.files for graph in graphs.values())

    def run(self, network: str, *inputs: Any) -> tuple[Any, ...]:
        self.checked_rows(network, inputs)
        if network not in self._runners:
            self._runners[network] = self._open_cuda(network) if self._on_gpu else self._open_cpu(network)
        if self._on_gpu:
            return self._runners[network].run(*inputs)
        names = [t.name for t in self.signatures[network].inputs]
        return tuple(self._runners[network].run(None, dict(zip(names, inputs, strict=True))))

    def _open_cpu(self, network: str) -> Any:
        import onnxruntime as ort

        path = self._graph(network)
        try:
            return ort.InferenceSession(path, self._options(), providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no public base class
            raise FastgenError(f"{path}: onnxruntime {ort.__version__} cannot load it: {error}") from error

    def _open_cuda(self, network: str) -> Runner:
        """The text encoder finds its end tokens on the host: it is not recorded, which matters little once per prompt."""
        torch, device = self._torch, self._torch.device(self.device)
        stream, whole = streams.stream(self.device, streams.onnxruntime(network)), network != "text_encoder"
        provider = provider_options(device.index or 0, stream.cuda_stream, graphs=whole)
        session = open_session(self._graph(network), self._options(), provider, whole=whole)
        return Runner(session, self.signatures[network], self.device, stream, lambda: torch.cuda.current_stream(device))

    def _options(self) -> Any:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3
        if self._threads:
            options.intra_op_num_threads = self._threads
        return options

    def _graph(self, network: str) -> str:
        path = self._bundle.network(network, self.executed(network))  # verifies the weights, which both graphs share
        fused = f"{network}/{fused_name(path.name)}"
        return str(self._bundle.file(fused) if fused in self._bundle.files else path)

    def is_out_of_memory(self, error: BaseException) -> bool:
        return super().is_out_of_memory(error) if self._on_gpu else isinstance(error, MemoryError)

    def release_memory(self) -> None:
        """onnxruntime's arenas go with their sessions, which are opened again when they are needed."""
        if self._on_gpu:
            self._torch.cuda.synchronize(self.device)
            self._runners.clear()
            super().release_memory()

    def array(self, values: np.ndarray) -> Any:
        return super().array(values) if self._on_gpu else np.ascontiguousarray(values)

    def numpy(self, values: Any) -> np.ndarray:
        return super().numpy(values) if self._on_gpu else values


def default_device() -> str:
    """The GPU where onnxruntime's CUDA build and torch see one, else the CPU."""
    import onnxruntime as ort

    if PROVIDER not in getattr(ort, "get_available_providers", list)() or not has_distribution("torch"):
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _check_gpu_build() -> None:
    """InputError, with the commands that help, when onnxruntime here has no CUDA provider, or torch is missing."""
    import onnxruntime as ort

    if not has_distribution("torch"):
        raise InputError(f"engine ort on CUDA needs torch, not installed here: {hint('cuda')}")
    if PROVIDER in getattr(ort, "get_available_providers", list)():
        return
    if has_distribution("onnxruntime") and has_distribution("onnxruntime-gpu"):
        raise InputError(
            "onnxruntime and onnxruntime-gpu are both installed and share one folder, so that CUDA is lost: "
            "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"
        )
    raise InputError(
        "this onnxruntime is built for the CPU alone: pip uninstall -y onnxruntime && pip install onnxruntime-gpu"
    )
