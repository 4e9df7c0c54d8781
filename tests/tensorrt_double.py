"""A stand-in for the module `tensorrt` that records every call; its plans run on the CPU through onnxruntime.

Its classes, methods, parameters and enums are compared with the real bindings in test_trt_bindings.py. Its plans are JSON that
names the ONNX file, and reads and writes the very addresses that were bound.
"""

from __future__ import annotations

import ctypes
import enum
import importlib.machinery
import json
import math
import types
from pathlib import Path
from typing import Any

import numpy as np

VERSION, GPU, CAPABILITY = "10.13.3.9", "NVIDIA Double", "9.0"
NUMPY = {"FLOAT": np.float32, "INT64": np.int64}
CALLS: list[tuple[Any, ...]] = []  # (Class.method or Class.property, *arguments), in order
BEHAVIOUR: dict[str, Any] = {}  # what the next objects do wrong; see `behave`


def record(what: str, *arguments: Any) -> None:
    CALLS.append((what, *arguments))


def called(what: str) -> list[tuple[Any, ...]]:
    """The arguments of each recorded call of this name."""
    return [call[1:] for call in CALLS if call[0] == what]


def enumeration(name: str, *members: str) -> Any:
    return enum.Enum(name, list(members), start=0)


NetworkDefinitionCreationFlag = enum.IntEnum(
    "NetworkDefinitionCreationFlag", [("EXPLICIT_BATCH", 0), ("STRONGLY_TYPED", 1)]
)
ProfilingVerbosity = enumeration("ProfilingVerbosity", "LAYER_NAMES_ONLY", "DETAILED", "NONE")
LayerInformationFormat = enumeration("LayerInformationFormat", "ONELINE", "JSON")
MemoryPoolType = enumeration("MemoryPoolType", "WORKSPACE")
BuilderFlag = enumeration("BuilderFlag", "TF32")
DataType = enumeration("DataType", "FLOAT", "HALF", "BF16", "INT32", "INT64", "BOOL", "INT8", "FP8")
TensorIOMode = enumeration("TensorIOMode", "NONE", "INPUT", "OUTPUT")
ExecutionContextAllocationStrategy = enumeration("ExecutionContextAllocationStrategy", "STATIC", "USER_MANAGED")
LayerType = enumeration(
    "LayerType", "CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY", "EINSUM", "IDENTITY", "SHUFFLE", "DEQUANTIZE"
)


class ILogger:
    Severity = enumeration("Severity", "INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")

    def __init__(self) -> None:
        self.ready = True

    def log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError


def complain(log: ILogger, message: str) -> None:
    assert log.ready, "the logger's base class was not initialised"
    log.log(ILogger.Severity.INFO, "not an error")
    log.log(ILogger.Severity.ERROR, message)


class IProgressMonitor:
    def __init__(self) -> None:
        self.ready = True

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None: ...

    def step_complete(self, phase_name: str, step: int) -> bool:
        return True

    def phase_finish(self, phase_name: str) -> None: ...


class ITensor:
    def __init__(self, name: str, dtype: Any) -> None:
        self.name, self.dtype = name, dtype


class ILayer:
    def __init__(self, node: Any, types_: dict[str, Any]) -> None:
        kinds = {"Conv": LayerType.CONVOLUTION, "MatMul": LayerType.MATRIX_MULTIPLY, "Gemm": LayerType.MATRIX_MULTIPLY}
        kinds |= {"DequantizeLinear": LayerType.DEQUANTIZE, "Reshape": LayerType.SHUFFLE}
        self.name, self.type = node.name, kinds.get(node.op_type, LayerType.IDENTITY)
        self.metadata = f"[ONNX Layer: {node.name}]"
        self._inputs = [ITensor(name, types_.get(name)) if name else None for name in node.input]
        self._outputs = [ITensor(name, types_.get(name)) for name in node.output]
        self.num_inputs, self.num_outputs = len(self._inputs), len(self._outputs)

    def get_input(self, index: int) -> ITensor | None:
        return self._inputs[index]

    def get_output(self, index: int) -> ITensor:
        return self._outputs[index]


class INetworkDefinition:
    def __init__(self) -> None:
        self.path = ""
        self._inputs: list[ITensor] = []
        self._layers: list[ILayer] = []

    def load(self, path: str) -> None:
        import onnx

        model = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False))
        names = {1: "FLOAT", 10: "HALF", 16: "BF16", 7: "INT64", 6: "INT32", 9: "BOOL", 3: "INT8", 17: "FP8"}
        graph = model.graph
        values = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
        values |= {t.name: t.data_type for t in graph.initializer}
        kinds = {name: getattr(DataType, names[kind]) for name, kind in values.items() if kind in names}
        self.path = path
        self._inputs = [ITensor(v.name, kinds[v.name]) for v in graph.input]
        self._layers = [ILayer(node, kinds) for node in graph.node]

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def get_input(self, index: int) -> ITensor:
        return self._inputs[index]

    def get_layer(self, index: int) -> ILayer:
        return self._layers[index]

    def report(self) -> list[dict[str, Any]]:
        """What the inspector of TensorRT 10 says of such layers."""
        words = {DataType.FLOAT: "Float", DataType.HALF: "Half", DataType.BF16: "BFloat16"}
        words |= {DataType.INT8: "Int8", DataType.FP8: "FP8"}
        kinds = {LayerType.CONVOLUTION: "CaskConvolution", LayerType.MATRIX_MULTIPLY: "gemm"}

        fused = {  # into the layer that reads it: tensor -> the type before DequantizeLinear
            layer._outputs[0].name: layer._inputs[0].dtype
            for layer in self._layers
            if layer.type == LayerType.DEQUANTIZE
        }

        def tensors(found: list[ITensor | None]) -> list[dict[str, Any]]:
            kinds = [(t.name, fused.get(t.name, t.dtype)) for t in found if t is not None]
            return [{"Name": name, "Format/Datatype": words.get(kind, "Int64")} for name, kind in kinds]

        return [
            {
                "Name": f"{layer.name}_myl0_{i}",
                "LayerType": kinds.get(layer.type, "kgen"),
                "Inputs": tensors(layer._inputs),
                "Outputs": tensors(list(layer._outputs)),
                "Metadata": layer.metadata,
            }
            for i, layer in enumerate(self._layers)
        ]


class ParserError:
    def node_operator(self) -> str:
        return "GroupNormalization"

    def node_name(self) -> str:
        return "node_7"

    def desc(self) -> str:
        return "Assertion failed:\n  unsupported"


class OnnxParser:
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network, self._log = network, logger
        self.num_errors = 0

    def parse_from_file(self, model: str) -> bool:
        record("OnnxParser.parse_from_file", model)
        if BEHAVIOUR.get("parse") == "fails":
            self.num_errors = 2
            return False
        self._network.load(model)
        return True

    def get_error(self, index: int) -> ParserError:
        return ParserError()


class IOptimizationProfile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[Any]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        record("IOptimizationProfile.set_shape", input, min, opt, max)
        self.shapes[input] = [tuple(min), tuple(opt), tuple(max)]


class ITimingCache:
    def __init__(self, entries: set[str]) -> None:
        self.entries = entries

    def combine(self, input_cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self.entries |= input_cache.entries
        return True

    def serialize(self) -> bytes:
        return json.dumps([VERSION, *sorted(self.entries)]).encode()


class IBuilderConfig:
    def __init__(self) -> None:
        self.profiles: list[IOptimizationProfile] = []
        self._cache: Any = None

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and name != "profiles":
            record(f"IBuilderConfig.{name}", value)
        object.__setattr__(self, name, value)

    progress_monitor: Any = None
    builder_optimization_level: Any = 3
    profiling_verbosity: Any = ProfilingVerbosity.LAYER_NAMES_ONLY

    def clear_flag(self, flag: Any) -> None:
        record("IBuilderConfig.clear_flag", flag)

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        record("IBuilderConfig.set_memory_pool_limit", pool, pool_size)

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache | None:
        if not serialized_timing_cache:
            return ITimingCache(set())
        version, *entries = json.loads(serialized_timing_cache)
        return ITimingCache(set(entries)) if version == VERSION else None

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        record("IBuilderConfig.set_timing_cache", sorted(cache.entries), ignore_mismatch)
        self._cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache:
        return self._cache


class Builder:
    def __init__(self, logger: ILogger) -> None:
        record("Builder")
        self._log = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        record("Builder.create_network", flags)
        return INetworkDefinition()

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> bytes | None:
        record("Builder.build_serialized_network", network.path)
        if BEHAVIOUR.get("build") == "fails":
            complain(self._log, BEHAVIOUR["reason"])
            return None
        if not self._steps(config.progress_monitor):
            return None
        if (cache := config.get_timing_cache()) is not None:
            cache.entries.add(Path(network.path).name)
        plan = {"path": network.path, "shapes": config.profiles[0].shapes, "gpu": GPU, "report": network.report()}
        return json.dumps(plan | BEHAVIOUR.get("plan", {})).encode()

    def _steps(self, monitor: IProgressMonitor) -> bool:
        assert monitor.ready, "the monitor's base class was not initialised"
        monitor.phase_start("Building Engine", None, 2)
        monitor.phase_start("Timing kernels", "Building Engine", 4)
        for step in range(4):
            if not monitor.step_complete("Timing kernels", step):
                return False
        monitor.phase_finish("Timing kernels")
        going = monitor.step_complete("Building Engine", 0) and monitor.step_complete("Building Engine", 1)
        monitor.phase_finish("Building Engine")
        return going


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        if BEHAVIOUR.get("runtime") == "fails":
            complain(logger, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._log = logger

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        record("Runtime.deserialize_cuda_engine", len(serialized_engine))
        if BEHAVIOUR.get("deserialize") == "fails":
            complain(self._log, BEHAVIOUR["reason"])
            return None
        return ICudaEngine(json.loads(bytes(serialized_engine)))


class ICudaEngine:
    def __init__(self, plan: dict[str, Any]) -> None:
        import onnxruntime

        self._plan = plan
        self._session = onnxruntime.InferenceSession(plan["path"], providers=["CPUExecutionProvider"])
        kinds = {"tensor(float)": DataType.FLOAT, "tensor(int64)": DataType.INT64, "tensor(float16)": DataType.HALF}
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        self._tensors = {t.name: (mode, kinds[t.type]) for mode, group in ((1, inputs), (2, outputs)) for t in group}
        self.num_io_tensors = len(self._tensors)
        self.device_memory_size_v2 = 1000 * math.prod(next(iter(plan["shapes"].values()))[-1])

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return TensorIOMode(self._tensors[name][0])

    def get_tensor_dtype(self, name: str) -> Any:
        return self._tensors[name][1]

    def create_execution_context(self, strategy: Any = ExecutionContextAllocationStrategy.STATIC) -> IExecutionContext:
        record("ICudaEngine.create_execution_context", strategy)
        return IExecutionContext(self)

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector(self._plan)


class EngineInspector:
    def __init__(self, plan: dict[str, Any]) -> None:
        self._plan, self.execution_context = plan, None

    def get_engine_information(self, format: Any) -> str:
        assert format == LayerInformationFormat.JSON
        assert self.execution_context is not None, "datatypes are N/A without a context"
        return json.dumps({"Layers": self._plan["report"], "Bindings": []})


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine, self._memory = engine, (0, 0)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self.nvtx_verbosity: Any = ProfilingVerbosity.DETAILED

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = tuple(shape)
        least, _, most = self._engine._plan["shapes"][name]
        return all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        output = next(t for t in self._engine._session.get_outputs() if t.name == name)
        rows = next(iter(self._shapes.values()))[0]
        return tuple(rows if isinstance(axis, str) else axis for axis in output.shape)

    def set_device_memory(self, memory: int, size: int) -> None:
        record("IExecutionContext.set_device_memory", memory, size)
        assert size >= self._engine.device_memory_size_v2
        self._memory = (memory, size)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        record("IExecutionContext.set_tensor_address", name, memory)
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        record("IExecutionContext.execute_async_v3", stream_handle, self._memory)
        if BEHAVIOUR.get("execute") == "fails":
            return False
        inputs = {name: self._view(name, shape) for name, shape in self._shapes.items()}
        names = [name for name in self._engine._tensors if name not in inputs]
        for name, value in zip(names, self._engine._session.run(names, inputs), strict=True):
            self._view(name, value.shape)[...] = value
        return True

    def _view(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The memory at the address that was bound, as an array."""
        dtype = np.dtype(NUMPY[self._engine._tensors[name][1].name])
        size = math.prod(shape) * dtype.itemsize
        buffer = (ctypes.c_char * size).from_address(self._addresses[name])
        return np.ctypeslib.as_array(buffer).view(dtype).reshape(shape)


def make_module(name: str = "tensorrt", version: str = VERSION, **more: Any) -> types.ModuleType:
    """A fresh module with these classes and enums, and with `more` in their place; forgets what was recorded."""
    CALLS.clear()
    BEHAVIOUR.clear()
    module = types.ModuleType(name)
    module.__version__ = version  # type: ignore[attr-defined]
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    for key, value in (PUBLIC | more).items():
        setattr(module, key, value)
    return module


PUBLIC = {
    name: value for name, value in list(globals().items()) if isinstance(value, type) and name not in ("Path", "Any")
}
