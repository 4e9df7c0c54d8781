"""Engine ort on CUDA: each network replays CUDA graphs, one per number of rows, between buffers at fixed addresses.

In fp16 (the default where the bundle has it) or fp32, not in bf16, for which onnxruntime's CUDA provider lacks operators
(Resize, and in older releases convolutions).

onnxruntime records the graphs itself, on a stream per network. That stream and torch's wait for each other, but the host does
not wait (with releases before mid-2026 it does, at the end of a replay).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastgen.engines import has_distribution
from fastgen.engines.base import announce
from fastgen.engines.ort.session import OrtEngine
from fastgen.engines.torch_base import TorchEngine
from fastgen.errors import FastgenError, InputError
from fastgen.files.installing import hint
from fastgen.models.bundle import graph_name
from fastgen.models.signatures import Signature, TensorSpec, network_dtype
from fastgen.sampling import streams

if TYPE_CHECKING:
    from fastgen.models.bundle import Bundle

PROVIDER = "CUDAExecutionProvider"


class CudaEngine(OrtEngine, TorchEngine):
    """On a GPU, on torch tensors."""

    dtypes = ("fp16", "fp32")
    static_shapes = True  # a graph is recorded per number of rows
    _library_errors = Exception  # onnxruntime's share no base class

    def __init__(
        self, source: Bundle, *, device: str | None = None, dtype: str | None = None, threads: int | None = None
    ) -> None:
        _check_gpu_build()
        self.open_device(device or "cuda", threads, ("cuda",))
        self.set_source(source, threads)
        if dtype not in (None, *self.dtypes):
            raise InputError(f"engine ort executes {', '.join(self.dtypes)} on cuda, not {dtype}")
        self.dtype = dtype or ("fp16" if self._has_fp16() else "fp32")
        if dtype is None and self.dtype == "fp32":
            announce(
                "engine ort runs in fp32: the bundle has no fp16 graphs; `fastgen export MODEL --dtype fp16` adds them"
            )
        self._runners: dict[str, Runner] = {}

    def run(self, network: str, *inputs: Any) -> tuple[Any, ...]:
        self.checked_rows(network, inputs)
        if network not in self._runners:
            self._runners[network] = self._runner(network)
        return self._runners[network].run(*inputs)

    def release_memory(self) -> None:
        """onnxruntime's arenas go with their sessions, which are opened again when they are needed."""
        self._torch.cuda.synchronize(self.device)
        self._runners.clear()
        super().release_memory()

    def _has_fp16(self) -> bool:
        """Whether the bundle was exported with fp16 graphs."""
        graphs = {n: graph_name(n, d) for n in self.signatures if (d := network_dtype(n, "fp16")) != "fp32"}
        return all(graph in self._bundle.files for graph in graphs.values())

    def _runner(self, network: str) -> Runner:
        """The text encoder finds its end tokens on the host, so it is not recorded; it runs once per prompt only."""
        torch, device = self._torch, self._torch.device(self.device)
        stream, whole = streams.stream(self.device, streams.onnxruntime(network)), network != "text_encoder"
        provider = provider_options(device.index or 0, stream.cuda_stream, graphs=whole)
        session = open_session(self.graph(network), self.session_options(), provider, whole=whole)
        return Runner(session, self.signatures[network], self.device, stream, lambda: torch.cuda.current_stream(device))


def provider_options(device_id: int, stream: int, graphs: bool) -> dict[str, str]:
    """Options of the CUDA provider: see https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html."""
    return {
        "device_id": str(device_id),
        "user_compute_stream": str(stream),
        "enable_cuda_graph": "1" if graphs else "0",
        "cudnn_conv_algo_search": "HEURISTIC",  # EXHAUSTIVE times kernels in each process: other bytes in the next one
        "cudnn_conv_use_max_workspace": "1",  # the fast algorithms for tensor cores need it
        "prefer_nhwc": "0",  # GroupNorm is exported on (B, groups, pixels): a transpose on both sides of each convolution
        "use_tf32": "0",  # fp32 is fp32
        "arena_extend_strategy": "kSameAsRequested",  # torch allocates from the same card
    }


def open_session(path: str, options: Any, provider: dict[str, str], *, whole: bool) -> Any:
    """A session on the CUDA provider alone. `whole`: every node must run there, as a recorded graph demands.

    Raises FastgenError when the provider cannot be loaded, or leaves a node to the CPU.
    """
    import onnxruntime as ort

    if whole:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = ort.InferenceSession(path, options, providers=[(PROVIDER, provider)])
    except Exception as error:  # onnxruntime's exceptions share no public base class
        raise FastgenError(f"{path}: onnxruntime {ort.__version__} cannot run it on CUDA: {error}") from error
    if PROVIDER not in session.get_providers():  # it has fallen back to the CPU, with a warning
        raise FastgenError(
            f"onnxruntime {ort.__version__} cannot load its CUDA provider (CUDA or cuDNN libraries are missing or of another "
            'version than it was built for); `fastgen doctor` says which, pip install "onnxruntime-gpu[cuda,cudnn]" brings them'
        )
    return session


@dataclass(frozen=True)
class _Buffers:
    """The buffers of one number of rows, and onnxruntime's binding and options for a run between them."""

    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    binding: Any
    options: Any


class Runner:
    """One network. `stream`: where onnxruntime runs it; `current`: gives the stream that the caller's tensors live on."""

    def __init__(
        self, session: Any, signature: Signature, device: str, stream: Any, current: Callable[[], Any]
    ) -> None:
        self._session, self._signature, self._device = session, signature, device
        self._stream, self._current = stream, current
        self._buffers: dict[int, _Buffers] = {}

    def run(self, *inputs: Any) -> tuple[Any, ...]:
        """One forward of (B, ...) torch tensors that `Engine.checked_rows` accepts; the outputs are new tensors."""
        rows, stream, current = len(inputs[0]), self._stream, self._current()
        if rows not in self._buffers:
            self._buffers[rows] = self._bind(rows)
        buffers = self._buffers[rows]
        current.wait_stream(stream)  # the buffers are free
        for buffer, values in zip(buffers.inputs, inputs, strict=True):
            buffer.copy_(values, non_blocking=True)
        stream.wait_stream(current)
        self._session.run_with_iobinding(buffers.binding, buffers.options)
        current.wait_stream(stream)
        outputs = tuple(buffer.clone() for buffer in buffers.outputs)
        stream.wait_stream(current)  # the next run overwrites the buffers
        return outputs

    def _bind(self, rows: int) -> _Buffers:
        import onnxruntime as ort

        binding, kind, _, index = self._session.io_binding(), *self._device.partition(":")
        inputs = tuple(self._buffer(tensor, rows) for tensor in self._signature.inputs)
        outputs = tuple(self._buffer(tensor, rows) for tensor in self._signature.outputs)
        for tensors, buffers, bind in (
            (self._signature.inputs, inputs, binding.bind_input),
            (self._signature.outputs, outputs, binding.bind_output),
        ):
            for tensor, buffer in zip(tensors, buffers, strict=True):
                dtype = np.dtype(tensor.dtype).type
                bind(tensor.name, kind, int(index or 0), dtype, tuple(buffer.shape), buffer.data_ptr())
        options = ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(len(self._buffers) + 1))  # a graph per number of rows
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return _Buffers(inputs, outputs, binding, options)

    def _buffer(self, tensor: TensorSpec, rows: int) -> Any:
        import torch

        return torch.zeros(tensor.with_batch(rows), dtype=getattr(torch, tensor.dtype), device=self._device)


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
