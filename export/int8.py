"""Graphs in eight bits: a network's fp32 ONNX graph with QuantizeLinear and DequantizeLinear around the layers that bear it.

onnxruntime's quantiser calibrates and writes them: inputs are unsigned, with a scale and a zero point per tensor, since most
come out of SiLU or GELU, which are hardly ever below zero; weights are signed, with a scale per output channel. `sensitivity`
chooses the layers.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from msgspec import to_builtins
from torch import nn

from export.calibration import Rows, Span, cropped, stratified
from export.quantisation import Layer, Quantisation, quantisation_name
from export.rewrite import SubpixelUpsample, fuse_attention, is_upsample_conv
from export.sensitivity import UNSIGNED, Rounding, sensitivities
from fastgen.engines.ort.session import fused_name
from fastgen.errors import FastgenError, one_line
from fastgen.files.folders import scratch_folder
from fastgen.files.jsonfiles import write_json
from fastgen.models.bundle import graph_name
from fastgen.models.signatures import Signature

SENSITIVITY_ROWS = 4
CALIBRATION_ROWS = 64
LATENT = 16  # pixels of a side, of the decoder's latents in the table of sensitivities
OPERATORS = ("Conv", "MatMul", "Gemm")


def layer_table(
    module: nn.Module,
    network: str,
    rows: Rows,
    spans: Mapping[str, Span],
    nodes: Collection[str],
    rounding: Rounding = UNSIGNED,
) -> list[Layer]:
    """The layers of a network with what eight bits change in each, see `sensitivities`; `quantised` are those that have `nodes`
    in its graph. `rows`: what the network sees while it makes images."""
    measured = stratified(rows, SENSITIVITY_ROWS)
    if network == "vae_decoder":
        measured = cropped(measured, LATENT)
    table = sensitivities(module, measured, spans, rounding=rounding)
    return [Layer(layer.name, layer.error, layer.products, layer.name in nodes) for layer in table]


def write_int8(
    network: str,
    signature: Signature,
    rows: Rows,
    fp32: Path,
    folder: Path,
    found: Quantisation,
    nodes: Mapping[str, Sequence[str]],
) -> None:
    """Write a network's graph with the layers in eight bits that `found` says, made from the graph `fp32`, and the table of
    layers, below `folder`. `rows`: what the network sees while it makes images; `nodes`: see `layer_nodes`.

    Raises FastgenError when onnxruntime cannot quantise the graph, or no layer is to be.
    """
    names = [node for layer in found.layers if layer.quantised for node in nodes[layer.name]]
    if not names:
        raise FastgenError(
            f"{network}: none of its {len(found.layers)} layers bears eight bits; use --dtype bf16 or fp16"
        )
    path = folder / graph_name(network, "int8")
    path.parent.mkdir(parents=True, exist_ok=True)
    _quantise(fp32, path, signature, stratified(rows, CALIBRATION_ROWS), names)
    write_json(folder / quantisation_name(network), to_builtins(found))


def layer_nodes(module: nn.Module, graph: Path, dtype: type[np.floating] = np.float32) -> dict[str, list[str]]:
    """Layer -> names of the nodes that compute with its weights in `dtype`.

    The weights' bytes tell, as the exporter renames and transposes some; four nodes compute the convolution of
    an upsampler (`rewrite.SubpixelUpsample`)."""
    model = onnx.load(graph)
    by_weight: dict[str, list[str]] = {}
    hashes = {i.name: _digest(onnx.numpy_helper.to_array(i)) for i in model.graph.initializer if len(i.dims) > 1}
    for node in model.graph.node:
        if node.op_type in OPERATORS and node.input[1] in hashes:
            by_weight.setdefault(hashes[node.input[1]], []).append(node.name)
    found: dict[str, list[str]] = {}
    for name, weights in _weights(module):
        for weight in (each.astype(dtype) for each in weights):
            for digest in {_digest(weight), _digest(weight.T)} if weight.ndim == 2 else {_digest(weight)}:
                found.setdefault(name, []).extend(by_weight.get(digest, []))
    return {name: list(dict.fromkeys(nodes)) for name, nodes in found.items() if nodes}


def _weights(module: nn.Module) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Layer -> its weights, as they may be in a graph."""
    upsamplers = {f"{name}.conv": child for name, child in module.named_modules() if is_upsample_conv(child)}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            weights = [layer.weight.detach().cpu().numpy()]
            if name in upsamplers:
                weights += [b.numpy() for n, b in SubpixelUpsample(layer).named_buffers() if n.startswith("weight")]  # type: ignore[arg-type]
            yield name, weights


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(f"{values.shape}".encode() + np.ascontiguousarray(values).tobytes()).hexdigest()


def _quantise(fp32: Path, path: Path, signature: Signature, rows: Rows, nodes: Sequence[str]) -> None:
    """Write `path`, its weights `path`.data, and the graph with onnxruntime's attention beside them."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    options = {
        "WeightSymmetric": True,
        "QuantizeBias": False,
        "OpTypesToExcludeOutputQuantization": list(OPERATORS),  # sums and norms get them unrounded
    }
    with scratch_folder(path) as scratch, _quiet():
        target = scratch / path.name
        try:
            quantize_static(
                fp32,
                target,
                _Reader(signature, rows),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
                nodes_to_quantize=list(nodes),
                op_types_to_quantize=list(OPERATORS),
                use_external_data_format=True,
                extra_options=options,
            )
        except Exception as error:  # onnxruntime's exceptions share no public base class
            raise FastgenError(f"{fp32}: onnxruntime cannot quantise it: {one_line(str(error), 200)}") from error
        model = ir.load(target)
        ir.save(model, path, external_data=f"{path.name}.data")
    model = ir.load(path)
    if fuse_attention(model):
        ir.save(model, path.with_name(fused_name(path.name)))


class _Reader:
    """Calibration rows, as onnxruntime reads them."""

    def __init__(self, signature: Signature, rows: Rows) -> None:
        names = [tensor.name for tensor in signature.inputs]
        self._rows = iter([dict(zip(names, row, strict=True)) for row in rows])

    def get_next(self) -> Mapping[str, np.ndarray] | None:
        """The next row, None at the end."""
        return next(self._rows, None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the quantiser's advice on the root logger."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
