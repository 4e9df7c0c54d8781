"""OpenVINO on the bundle's ONNX graphs: bf16 where the CPU has it, one static-shape compilation per batch size.

Nothing is cached on disk: compiling takes about a second per network, and reading back a compiled model, which would have
to be verified first, saves less than half of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

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
        self._requests: dict[tuple[str, int], tuple[Any, Any]] = {}

    def run(self, network: str, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        key = (network, len(inputs[0]))
        if key not in self._requests:
            self._requests[key] = self._compile(*key)
        embedding, request = self._requests[key]
        if embedding is not None:
            embedding.infer(inputs, share_inputs=True)
            inputs = (*_without_timestep(inputs), *(tensor.data for tensor in embedding.output_tensors))
        request.infer(inputs, share_inputs=True)
        return tuple(np.array(tensor.data) for tensor in request.output_tensors)

    def _compile(self, network: str, batch: int) -> tuple[Any, Any]:
        """Infer requests of the time embedding (None where it is not apart) and of the network."""
        path = self._bundle.network(network)
        model = self._core.read_model(path)
        model.reshape({t.name: t.with_batch(batch) for t in self.signatures[network].inputs})
        embedding = None
        if network == "unet" and self.dtype != "fp32":
            embedding = self._request(_time_embedding(model), "fp32")
            _take_embedding(model)
        return embedding, self._request(model, self.dtype)

    def _request(self, model: Any, dtype: str) -> Any:
        config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": _HINTS[dtype], "PERFORMANCE_HINT": "LATENCY"}
        if self._threads:
            config["INFERENCE_NUM_THREADS"] = self._threads
        return self._core.compile_model(model, "CPU", config).create_infer_request()

    def array(self, values: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(values)

    def numpy(self, values: np.ndarray) -> np.ndarray:
        return values


TIMESTEP = 1  # its place among the UNet's inputs


def _without_timestep(inputs: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
    return (*inputs[:TIMESTEP], *inputs[TIMESTEP + 1 :])


def _time_embedding(unet: Any) -> Any:
    """The part of a UNet between its timestep and the first matrix products, as a model with the UNet's inputs.

    It is executed in fp32: in bf16 the timestep 999 is 1000, which costs more accuracy than all the rest together.
    """
    import openvino

    return openvino.Model(list(_embedded(unet)), unet.get_parameters(), "time_embedding")


def _take_embedding(unet: Any) -> None:
    """Make a UNet take what `_time_embedding` computes, behind its other inputs, instead of the timestep."""
    import openvino

    timestep = unet.get_parameters()[TIMESTEP]
    for output, consumers in _embedded(unet).items():
        parameter = openvino.opset13.parameter(output.get_shape(), np.float32)
        for consumer in consumers:
            consumer.replace_source_output(parameter.output(0))
        unet.add_parameters([parameter])
    unet.remove_parameter(timestep)
    unet.validate_nodes_and_infer_types()


def _embedded(unet: Any) -> dict[Any, list[Any]]:
    """What is computed from the timestep without a matrix product -> the inputs of the matrix products that take it."""
    found: dict[Any, list[Any]] = {}
    reached, front = set(), [unet.get_parameters()[TIMESTEP].output(0)]
    for output in front:
        for consumer in output.get_target_inputs():
            node = consumer.get_node()
            if node.get_type_name() == "MatMul":
                found.setdefault(output, []).append(consumer)
            elif node.get_friendly_name() not in reached:
                reached.add(node.get_friendly_name())
                front += node.outputs()
    return found
