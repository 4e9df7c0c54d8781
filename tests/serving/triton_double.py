"""A double of `triton_python_backend_utils`, the module that Triton gives its Python models: what fastgen calls of it."""

from __future__ import annotations

import threading
import types
from typing import Any

import numpy as np

FINAL = 1


class Tensor:
    def __init__(self, name: str, values: np.ndarray) -> None:
        assert isinstance(values, np.ndarray)
        self._name, self._values = name, values

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._values


class TritonError:
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        assert isinstance(message, str)
        self.message, self.code = message, code


class TritonModelException(Exception):
    pass


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor] | None = None, error: TritonError | None = None) -> None:
        self.tensors = {tensor.name(): tensor.as_numpy() for tensor in output_tensors or ()}
        self.error = error


class InferenceResponseSender:
    """Keeps the responses. Nothing may be sent after the final flag, as in Triton."""

    def __init__(self) -> None:
        self.responses: list[InferenceResponse] = []
        self.done, self.cancelled = threading.Event(), False

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        assert not self.done.is_set(), "a response after the final one"
        assert response is not None or flags
        if response is not None:
            self.responses.append(response)
        if flags == FINAL:
            self.done.set()

    def is_cancelled(self) -> bool:
        return self.cancelled


class InferenceRequest:
    def __init__(self, **fields: Any) -> None:
        self._tensors = [Tensor(name, _array(value)) for name, value in fields.items()]
        self.sender = InferenceResponseSender()

    def inputs(self) -> list[Tensor]:
        return self._tensors

    def get_response_sender(self) -> InferenceResponseSender:
        return self.sender


def make_module() -> types.ModuleType:
    module = types.ModuleType("triton_python_backend_utils")
    for kind in (Tensor, TritonError, TritonModelException, InferenceResponse, InferenceRequest):
        setattr(module, kind.__name__, kind)
    module.TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL  # type: ignore[attr-defined]
    return module


def _array(value: Any) -> np.ndarray:
    """A tensor as Triton hands it over: texts are objects of bytes."""
    values = value if isinstance(value, list) else [value]
    if isinstance(values[0], str | bytes):
        return np.array([v.encode() if isinstance(v, str) else v for v in values], np.object_)
    return np.array(values, np.float64 if isinstance(values[0], float) else np.int64)
