"""Eight bits as TensorRT takes them: 8-bit integers or E4M3 floats, symmetric around 0, with a scale in fp16.

int8 has a scale per output channel of the weights. fp8 has one scale for all weights, as its numbers reach over 18 powers of
two: in `iclevr-64` scales per channel made the UNet's predicted error larger, .091 instead of .070, and the decoder's smaller,
.026 instead of .031. Inputs are scaled by the largest magnitude that calibration saw. The clipping with the least squared error
was measured too, and was no better.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from export.calibration import Span
from export.sensitivity import Rounding, round_weights

LEAST = float(np.finfo(np.float16).smallest_subnormal)


@dataclass(frozen=True)
class Format:
    """A format of eight bits.

    `largest`: its largest number. `per_channel`: whether each output channel of a layer's weights has a scale of its own.
    `multiple`: divides the numbers of channels of its layers. `rounding`: its emulation in torch.
    """

    name: str
    largest: int
    type: ir.DataType
    per_channel: bool
    multiple: int
    rounding: Rounding

    def fits(self, layer: nn.Module) -> bool:
        """Whether TensorRT has kernels in this format for a convolution or linear layer of so many channels."""
        return all(size % self.multiple == 0 for size in layer.weight.shape[:2])  # type: ignore[index]

    def scale(self, magnitude: np.ndarray | float) -> np.ndarray:
        """The scale in fp16 for numbers of at most this magnitude, rounded up, so that nothing is cut off."""
        exact = np.maximum(np.asarray(magnitude, np.float32) / self.largest, LEAST)
        near = exact.astype(np.float16)
        return np.where(near < exact, np.nextafter(near, np.float16(np.inf)), near).astype(np.float16)

    def quantised(self, values: np.ndarray, scale: np.ndarray) -> ir.TensorProtocol:
        """values / scale in this format; `scale` has their axes, or none."""
        exact = np.clip(values.astype(np.float32) / scale.astype(np.float32), -self.largest, self.largest)
        kind = np.int8 if self.type == ir.DataType.INT8 else ml_dtypes.float8_e4m3fn
        return ir.tensor(np.rint(exact).astype(kind) if kind is np.int8 else exact.astype(kind), self.type)

    def zero(self, shape: tuple[int, ...] = ()) -> ir.TensorProtocol:
        """The zero point, which QuantizeLinear takes its type from."""
        return self.quantised(np.zeros(shape), np.ones((), np.float16))


def _integer_inputs(x: Tensor, span: Span) -> Tensor:
    scale = _magnitude(span) / 127
    return (x / scale).round().clamp(-127, 127) * scale


def _float_weights(weight: Tensor) -> Tensor:
    return _float(weight, float(weight.abs().max().clamp_min(1e-20)))


def _float_inputs(x: Tensor, span: Span) -> Tensor:
    return _float(x, _magnitude(span))


def _float(x: Tensor, magnitude: float) -> Tensor:
    scale = magnitude / 448
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) * scale


def _magnitude(span: Span) -> float:
    return max(-span[0], span[1], 1e-20)


FORMATS = {
    "int8": Format("int8", 127, ir.DataType.INT8, True, 1, Rounding(round_weights, _integer_inputs)),
    "fp8": Format("fp8", 448, ir.DataType.FLOAT8E4M3FN, False, 16, Rounding(_float_weights, _float_inputs)),
}
