"""The precision of a TensorRT network and of its plan, checked layer by layer.

There are two checks. The parsed network is strongly typed: TensorRT must execute its types, and the bindings tell them exactly.
The inspector's report on the finished plan names, in words, the types and kernels that the compiler chose.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from fastgen.errors import FastgenError, Say
from fastgen.models.signatures import EIGHT_BITS

# -> trt.DataType of what products are typed; in eight bits it is the type after DequantizeLinear.
TYPES = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16", "int8": "HALF", "fp8": "HALF"}
QUANTISED_TYPES = {"int8": "INT8", "fp8": "FP8"}  # -> trt.DataType before DequantizeLinear
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
    "int8": re.compile(r"(?<!u)int8|(?<![a-z\d])i8", re.I),
    "fp8": re.compile(r"fp8|e4m3", re.I),
}
_ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


class Products(NamedTuple):
    """ONNX names of a network's convolutions and matrix products: those of the fp32 island, and those in eight bits."""

    islands: set[str]
    quantised: set[str]


def check_network(trt: Any, network: Any, dtype: str, what: str) -> Products:
    """FastgenError unless every convolution and matrix product of the network is typed `dtype`, but for the time embedding.

    In eight bits products are typed fp16, and FastgenError is raised unless at least one has both inputs from DequantizeLinear,
    and every DequantizeLinear is for such a product.
    """
    expected, exact = getattr(trt.DataType, TYPES[dtype]), trt.DataType.FLOAT
    products = {getattr(trt.LayerType, name) for name in PRODUCTS}
    inputs = [network.get_input(i).name for i in range(network.num_inputs)]
    origins = {name: {name} for name in inputs}  # tensor -> the network's inputs that it is computed from
    islands, offenders = set(), []
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    for layer in layers:
        tensors = [t for j in range(layer.num_inputs) if (t := layer.get_input(j)) is not None]
        origin = set().union(*(origins.get(t.name, ()) for t in tensors))
        origins |= {layer.get_output(j).name: origin for j in range(layer.num_outputs)}
        if layer.type not in products or tensors[0].dtype == expected:
            continue
        if tensors[0].dtype == exact and origin <= {ISLAND_INPUT}:
            islands |= _names(layer)
        else:
            offenders.append(f"{layer.name} ({layer.type.name.lower()}) is {tensors[0].dtype.name}")
    _refuse(offenders, f"{what}: the graph does not compute in {dtype}")
    return Products(islands, _quantised(trt, layers, dtype, what) if dtype in EIGHT_BITS else set())


def _quantised(trt: Any, layers: Sequence[Any], dtype: str, what: str) -> set[str]:
    """The products that have both inputs from DequantizeLinear."""
    kinds, expected = trt.LayerType, getattr(trt.DataType, QUANTISED_TYPES[dtype])
    products = {getattr(kinds, name) for name in PRODUCTS}
    restored: dict[str, set[str]] = {}  # tensor -> the DequantizeLinear layers that it comes from, reshaped at most
    found: set[str] = set()
    used: set[str] = set()
    for layer in layers:
        tensors = [t for j in range(layer.num_inputs) if (t := layer.get_input(j)) is not None]
        if layer.type == kinds.DEQUANTIZE and tensors[0].dtype == expected:
            restored[layer.get_output(0).name] = {layer.name}
        elif layer.type == kinds.SHUFFLE:
            restored[layer.get_output(0).name] = restored.get(tensors[0].name, set())
        elif layer.type in products:
            sources = [restored.get(t.name, set()) for t in tensors[:2]]  # constant weights in fp16 are no input
            if len(sources) == 2 and all(sources):
                found |= _names(layer)
                used |= sources[0] | sources[1]
    unused = sorted(set().union(*restored.values()) - used)
    _refuse(unused, f"{what}: the graph has pairs around no layer in {dtype}")
    if not found:
        raise FastgenError(f"{what}: the graph has no layer in {dtype}")
    return found


def _names(layer: Any) -> set[str]:
    return {layer.name, *_ONNX_NODE.findall(layer.metadata)}


def check_layers(
    report: str, dtype: str, islands: Collection[str], what: str, say: Say, quantised: Collection[str] = ()
) -> None:
    """FastgenError when the inspector's report shows a product that executes another precision than `dtype`.

    `islands`: ONNX names whose products may be fp32. `quantised`: those that may be in eight bits, while others are fp16; `say`
    gets a line with their number, and FastgenError is raised where none is. `say` gets a line where the report has no
    precisions at all.
    """
    try:
        entries = json.loads(report, strict=False)["Layers"]  # it holds raw separators
    except (ValueError, KeyError, TypeError):
        raise FastgenError(f"{what}: TensorRT's inspector gives no JSON of layers: {report[:80]!r}") from None
    products = [entry for entry in entries if isinstance(entry, dict) and _is_product(entry)]
    executed = [(entry, precisions(entry)) for entry in products]
    if not any(types for _, types in executed):
        say(f"{what}: TensorRT's inspector tells no precisions; only the network's own types were checked")
    around = "fp16" if dtype in EIGHT_BITS else dtype
    offenders = [
        f"{str(entry.get('Name'))[:80]} ({entry.get('LayerType')}) executes {', '.join(sorted(types))}"
        for entry, types in executed
        if _offends(types, around)
        and not (types == {"fp32"} and _names_any(entry, islands))
        and not (dtype in types and _names_any(entry, quantised))
    ]
    _refuse(offenders, f"{what}: the plan does not execute {dtype}")
    told = [types for entry, types in executed if types and _names_any(entry, quantised)]
    if dtype in EIGHT_BITS and told:
        lower = sum(dtype in types for types in told)
        if not lower:
            raise FastgenError(f"{what}: the plan executes none of its {len(told)} quantised layers in {dtype}")
        say(f"{what}: {lower} of {len(told)} quantised layers execute {dtype}")


def precisions(entry: Mapping[str, Any]) -> set[str]:
    """Which of fp32, tf32, fp16, bf16, int8 and fp8 an entry of the report mentions, for its tensors, weights and kernel."""
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
