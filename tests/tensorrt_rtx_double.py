"""A stand-in for the module `tensorrt_rtx`: the double of `tensorrt`, and what the other product has besides.

It is compared with the real bindings in test_trt_rtx_real.py. Its plans take a range of rows; a runtime cache holds a name
for each shape that was run, as if kernels had been compiled for it.
"""

from __future__ import annotations

import enum
import json
import math
import types
from typing import Any

import tensorrt_double as double
from tensorrt_double import BEHAVIOUR, ExecutionContextAllocationStrategy, complain, enumeration, record

VERSION, GPU, CAPABILITY = "1.7.1.116", "NVIDIA GeForce RTX Double", "8.9"

NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", [("STRONGLY_TYPED", 0)])
ComputeCapability = enumeration("ComputeCapability", "SM75", "SM80", "SM86", "SM89", "SM120", "SM121")
CudaGraphStrategy = enumeration("CudaGraphStrategy", "DISABLED", "WHOLE_GRAPH_CAPTURE")
DynamicShapesKernelSpecializationStrategy = enumeration(
    "DynamicShapesKernelSpecializationStrategy", "LAZY", "EAGER", "NONE"
)


class IBuilderConfig(double.IBuilderConfig):
    num_compute_capabilities: int = 0

    def set_compute_capability(self, compute_capability: Any, index: int) -> bool:
        record("IBuilderConfig.set_compute_capability", compute_capability, index)
        return index < self.num_compute_capabilities


class Builder(double.Builder):
    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()


class IRuntimeCache:
    def __init__(self) -> None:
        self.kernels: set[str] = set()

    def deserialize(self, blob: bytes) -> bool:
        record("IRuntimeCache.deserialize", len(blob))
        if not blob.startswith(VERSION.encode()):
            return False
        self.kernels |= set(json.loads(blob[len(VERSION) :]))
        return True

    def serialize(self) -> bytes:
        return VERSION.encode() + json.dumps(sorted(self.kernels)).encode()


class IRuntimeConfig:
    cuda_graph_strategy: Any = CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    dynamic_shapes_kernel_specialization_strategy: Any = DynamicShapesKernelSpecializationStrategy.LAZY

    def __init__(self) -> None:
        self.strategy, self.cache = ExecutionContextAllocationStrategy.STATIC, IRuntimeCache()

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> IRuntimeCache:
        record("IRuntimeConfig.create_runtime_cache")
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self.cache = cache
        return BEHAVIOUR.get("runtime_cache") != "fails"


class IExecutionContext(double.IExecutionContext):
    def __init__(self, engine: ICudaEngine, config: IRuntimeConfig) -> None:
        super().__init__(engine)
        self._config = config

    def update_device_memory_size_for_shapes(self) -> int:
        record("IExecutionContext.update_device_memory_size_for_shapes")
        return 1000 * math.prod(next(iter(self._shapes.values())))

    def set_device_memory(self, memory: int, size: int) -> None:
        record("IExecutionContext.set_device_memory", memory, size)
        assert size >= self.update_device_memory_size_for_shapes()
        self._memory = (memory, size)

    def execute_async_v3(self, stream_handle: int) -> bool:
        rows = next(iter(self._shapes.values()))[0]
        self._config.cache.kernels.add(f"{self._engine._plan['path']} {rows}")
        return super().execute_async_v3(stream_handle)


class ICudaEngine(double.ICudaEngine):
    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(self, runtime_config: IRuntimeConfig) -> IExecutionContext:  # type: ignore[override]
        config = runtime_config
        strategies = config.strategy, config.cuda_graph_strategy, config.dynamic_shapes_kernel_specialization_strategy
        record("ICudaEngine.create_execution_context", *strategies)
        return IExecutionContext(self, config)


class Runtime(double.Runtime):
    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        record("Runtime.deserialize_cuda_engine", len(serialized_engine))
        if BEHAVIOUR.get("deserialize") == "fails":
            complain(self._log, BEHAVIOUR["reason"])
            return None
        return ICudaEngine(json.loads(bytes(serialized_engine)))


OWN: dict[str, Any] = {
    "NetworkDefinitionCreationFlag": NetworkDefinitionCreationFlag,
    "ComputeCapability": ComputeCapability,
    "CudaGraphStrategy": CudaGraphStrategy,
    "DynamicShapesKernelSpecializationStrategy": DynamicShapesKernelSpecializationStrategy,
    "IBuilderConfig": IBuilderConfig,
    "Builder": Builder,
    "IRuntimeCache": IRuntimeCache,
    "IRuntimeConfig": IRuntimeConfig,
    "IExecutionContext": IExecutionContext,
    "ICudaEngine": ICudaEngine,
    "Runtime": Runtime,
}


def make_module() -> types.ModuleType:
    """A fresh module `tensorrt_rtx`; forgets what was recorded."""
    return double.make_module("tensorrt_rtx", VERSION, **OWN)
