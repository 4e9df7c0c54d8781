"""TensorRT plans: their cache key, and opening one; for those that build plans and those that run them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastgen.engines.cache.artifacts import Artifact, Recipe
from fastgen.engines.trt.platform import Platform
from fastgen.engines.trt.product import Product
from fastgen.errors import FastgenError, InputError
from fastgen.models.bundle import plan_graph
from fastgen.models.signatures import Signature, network_dtype

if TYPE_CHECKING:
    from fastgen.models.bundle import Bundle

FORMAT = 1  # of what the builder does: raise it when plans change although no field of the recipe does
PLAN, LAYERS = "engine.plan", "layers.json"
BUILDER = ("optimization_level", "workspace_gib")  # fields of a recipe that any runner accepts
CAPABILITIES = "compute_capabilities"  # field of a recipe: those that a plan runs on, such as "8.6 8.9"
DTYPES = {"float32": "FLOAT", "int64": "INT64"}  # of a signature -> trt.DataType


def make_recipe(
    bundle: Bundle,
    network: str,
    rows: int | None,
    dtype: str,
    product: Product,
    bound: Mapping[str, str | float | None],
) -> Recipe:
    """Cache key of a plan for up to `rows` rows. `dtype`: the engine's, while some networks stay fp32. `bound`: fields of the
    library, hardware and build; None matches anything. Raises InputError when the bundle has no graph in this precision."""
    executed = network_dtype(network, dtype)
    graph = bundle.network(network, plan_graph(executed), product.option).relative_to(bundle.folder).as_posix()
    weights = [file.sha256 for name, file in sorted(bundle.files.items()) if name.startswith(f"{graph}.")]
    shapes = {t.name: ",".join(map(str, t.shape)) for t in bundle.spec.signatures[network].inputs}
    fields: dict[str, Any] = {
        "network": network,
        "batch": rows,
        "dtype": executed,
        "graph_sha256": bundle.files[graph].sha256,
        "weights_sha256": hashlib.sha256("".join(weights).encode()).hexdigest(),
        "shapes": "; ".join(f"{name} {shape}" for name, shape in shapes.items()),
        "format": FORMAT,
    }
    return Recipe(product.engine, fields | dict(bound))


def read_verified(artifact: Artifact, name: str) -> bytes:
    """A file's bytes, verified after they are read. Raises InputError as `Artifact.file` does."""
    path = artifact.folder / name
    data = path.read_bytes() if path.is_file() else b""
    if name not in artifact.files or hashlib.sha256(data).hexdigest() != artifact.files[name].sha256:
        artifact.file(name)
        raise InputError(f"{path}: changed while it was read; try again")
    return data


def open_engine(platform: Platform, plan: Any, what: str, signature: Signature) -> Any:
    """Deserialise a plan; its inputs and outputs are checked.

    Raises FastgenError when TensorRT refuses it, or it does not have the signature's tensors.
    """
    with platform.gpu.active():
        engine = platform.runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise platform.failure(f"{what}: the plan cannot be loaded")
        _check_tensors(platform.trt, engine, what, signature)
    return engine


def open_context(platform: Platform, engine: Any, how: Any, what: str, signature: Signature, rows: int) -> Any:
    """An execution context without device memory, for inputs of `rows` rows. `how`: the allocation strategy USER_MANAGED, or a
    runtime config that says so.

    Raises FastgenError when TensorRT refuses, or the plan's outputs have other shapes than the signature's.
    """
    with platform.gpu.active():
        context = engine.create_execution_context(how)
        if context is None:
            raise platform.failure(f"{what}: no execution context")
        context.nvtx_verbosity = platform.trt.ProfilingVerbosity.NONE  # otherwise each layer costs the host time
        for tensor in signature.inputs:
            if not context.set_input_shape(tensor.name, tensor.with_batch(rows)):
                raise platform.failure(f"{what}: the plan does not take {tensor.name} {tensor.with_batch(rows)}")
        for tensor in signature.outputs:
            shape, expected = tuple(context.get_tensor_shape(tensor.name)), tensor.with_batch(rows)
            if shape != expected:
                raise FastgenError(f"{what}: {tensor.name} is {shape} in the plan, expected {expected}")
    return context


def _check_tensors(trt: Any, engine: Any, what: str, signature: Signature) -> None:
    """FastgenError unless the plan has the signature's inputs and outputs, in its dtypes."""
    expected = {t.name: (trt.TensorIOMode.INPUT, t) for t in signature.inputs}
    expected |= {t.name: (trt.TensorIOMode.OUTPUT, t) for t in signature.outputs}
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    if set(names) != set(expected):
        raise FastgenError(f"{what}: the plan has the tensors {', '.join(names)}, expected {', '.join(expected)}")
    for name, (mode, tensor) in expected.items():
        dtype = getattr(trt.DataType, DTYPES[tensor.dtype])
        there = engine.get_tensor_mode(name), engine.get_tensor_dtype(name)
        if there != (mode, dtype):
            raise FastgenError(f"{what}: {name} is {there[0]}, {there[1]} in the plan, expected {mode}, {dtype}")
