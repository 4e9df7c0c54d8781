"""onnxruntime's CUDA provider: each network replayed as CUDA graphs, one per number of rows, between buffers that stay put.

onnxruntime records its graphs itself, on a stream of the network's own. That stream and torch's wait for each other, the host
for neither (releases before mid-2026 still make it wait at the end of a replay).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastgen.errors import FastgenError
from fastgen.signatures import Signature, Tensor

PROVIDER = "CUDAExecutionProvider"


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
class _Bound:
    """The buffers of one number of rows, and what onnxruntime needs to run between them."""

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
        self._bound: dict[int, _Bound] = {}

    def run(self, *inputs: Any) -> tuple[Any, ...]:
        """One forward of (B, ...) torch tensors, which `Engine.checked_rows` accepts; the outputs are tensors of their own."""
        rows, stream, current = len(inputs[0]), self._stream, self._current()
        if rows not in self._bound:
            self._bound[rows] = self._bind(rows)
        bound = self._bound[rows]
        current.wait_stream(stream)  # the buffers are free
        for buffer, values in zip(bound.inputs, inputs, strict=True):
            buffer.copy_(values, non_blocking=True)
        stream.wait_stream(current)
        self._session.run_with_iobinding(bound.binding, bound.options)
        current.wait_stream(stream)
        outputs = tuple(buffer.clone() for buffer in bound.outputs)
        stream.wait_stream(current)  # the next run, whoever asks for it, overwrites the buffers
        return outputs

    def _bind(self, rows: int) -> _Bound:
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
        options.add_run_config_entry("gpu_graph_id", str(len(self._bound) + 1))  # a graph per number of rows
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return _Bound(inputs, outputs, binding, options)

    def _buffer(self, tensor: Tensor, rows: int) -> Any:
        import torch

        return torch.zeros(tensor.with_batch(rows), dtype=getattr(torch, tensor.dtype), device=self._device)
