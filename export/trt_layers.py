"""The precision of a TensorRT network and of its plan, checked layer by layer.

There are two checks. The parsed network is strongly typed: TensorRT must execute its types, and the bindings tell them exactly.
The inspector's report on the finished plan names, in words, the types and kernels that the compiler chose.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from fastgen.errors import FastgenError, Say

TYPES = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}  # -> trt.DataType
PRODUCTS = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY", "EINSUM")  # trt.LayerType
ISLAND_INPUT = "timestep"  # what is computed from it alone may stay fp32 (fastgen.models.precision)
SHOWN = 5  # layers that an error names

# The inspector's words, of TensorRT 10 and 11: LayerType "gemm", "CaskConvolution", "correlation" (a fused convolution), ...;
# datatypes "Half", "Row major linear FP16 format"; TacticName "sm80_xmma_gemm_f16f16_f16f32_f32_..."
_PRODUCT = re.compile(
    r"conv(?!ert)|deconv|gemm|matmul|matrixmultiply|correlation|fullyconnected|mha|attention|fprop", re.I
)
_WORDS = {
    "bf16": re.compile(r"bf16|bfloat16", re.I),
    "fp16": re.compile(r"fp16|half|(?<!b)f16|(?<!b)float16", re.I),
    "tf32": re.compile(r"tf32", re.I),
    "fp32": re.compile(r"fp32|float(?!16)|(?<!t)f32", re.I),
}
_ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


def check_network(trt: Any, network: Any, dtype: str, what: str) -> set[str]:
    """FastgenError unless every convolution and matrix product of the network is typed `dtype`, but for the time embedding.

    Returns the ONNX names of the products of that fp32 island.
    """
    expected, exact = getattr(trt.DataType, TYPES[dtype]), trt.DataType.FLOAT
    products = {getattr(trt.LayerType, name) for name in PRODUCTS}
    inputs = [network.get_input(i).name for i in range(network.num_inputs)]
    origins = {name: {name} for name in inputs}  # tensor -> the network's inputs that it is computed from
    islands, offenders = set(), []
    for layer in (network.get_layer(i) for i in range(network.num_layers)):
        tensors = [t for j in range(layer.num_inputs) if (t := layer.get_input(j)) is not None]
        origin = set().union(*(origins.get(t.name, ()) for t in tensors))
        origins |= {layer.get_output(j).name: origin for j in range(layer.num_outputs)}
        if layer.type not in products or tensors[0].dtype == expected:
            continue
        if tensors[0].dtype == exact and origin <= {ISLAND_INPUT}:
            islands |= {layer.name, *_ONNX_NODE.findall(layer.metadata)}
        else:
            offenders.append(f"{layer.name} ({layer.type.name.lower()}) is {tensors[0].dtype.name}")
    _refuse(offenders, f"{what}: the graph does not compute in {dtype}")
    return islands


def check_layers(report: str, dtype: str, islands: Collection[str], what: str, say: Say) -> None:
    """FastgenError when the inspector's report shows a product that executes another precision than `dtype`.

    `islands`: ONNX names whose products may be fp32. `say` gets a line where the report has no precisions at all.
    """
    try:
        entries = json.loads(report, strict=False)["Layers"]  # it holds raw separators
    except (ValueError, KeyError, TypeError):
        raise FastgenError(f"{what}: TensorRT's inspector gives no JSON of layers: {report[:80]!r}") from None
    products = [entry for entry in entries if isinstance(entry, dict) and _is_product(entry)]
    executed = [(entry, precisions(entry)) for entry in products]
    if not any(types for _, types in executed):
        say(f"{what}: TensorRT's inspector tells no precisions; only the network's own types were checked")
    offenders = [
        f"{str(entry.get('Name'))[:80]} ({entry.get('LayerType')}) executes {', '.join(sorted(types))}"
        for entry, types in executed
        if _offends(types, dtype) and not (types == {"fp32"} and _names_any(entry, islands))
    ]
    _refuse(offenders, f"{what}: the plan does not execute {dtype}")


def precisions(entry: Mapping[str, Any]) -> set[str]:
    """Which of fp32, tf32, fp16, bf16 an entry of the report mentions for its inputs, outputs, weights and kernel."""
    tensors = [t for key in ("Inputs", "Outputs") for t in entry.get(key) or () if isinstance(t, dict)]
    weights = entry.get("Weights")
    words = [str(t.get("Format/Datatype", t.get("Datatype", ""))) for t in tensors]
    words += [str(weights.get("Type", "")) if isinstance(weights, dict) else "", str(entry.get("TacticName", ""))]
    return {name for name, pattern in _WORDS.items() if any(pattern.search(text) for text in words)}


def _offends(types: set[str], dtype: str) -> bool:
    """In fp16 and bf16 a product accumulates in fp32 and may have an fp32 neighbour fused to it, but is never fp32 alone."""
    return bool(types - {"fp32"}) if dtype == "fp32" else bool(types) and dtype not in types


def _is_product(entry: Mapping[str, Any]) -> bool:
    kind = str(entry.get("LayerType", ""))
    return kind != "Reformat" and _PRODUCT.search(f"{kind} {entry.get('TacticName', '')}") is not None


def _names_any(entry: Mapping[str, Any], names: Collection[str]) -> bool:
    return not set(_ONNX_NODE.findall(str(entry.get("Metadata", "")))).isdisjoint(names) or entry.get("Name") in names


def _refuse(offenders: list[str], problem: str) -> None:
    if offenders:
        more = f", ... ({len(offenders)} in all)" if len(offenders) > SHOWN else ""
        raise FastgenError(f"{problem}: {'; '.join(offenders[:SHOWN])}{more}")
