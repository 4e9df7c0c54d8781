"""Which layers of a network suffer from eight bits: a table, and the choice of those that stay in higher precision.

Every layer's own error, with weights and inputs rounded to eight bits, is measured on real rows. The gradient
carries it to the network's output: take a random sign vector v, and the derivative of v * output with respect to the layer's
output. The square of its product with the layer's error is, on average over v, the square of the error that this layer alone
would cause in the output (to first order). So a table costs a few forward and backward passes, however many layers there are.
Errors of different layers are taken as independent: their squares add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.calibration import Rows, Span, layers
from export.quantisation import Layer

PROBES = 4  # sign vectors per row
LEVELS = 127
LEAST_SHARE = 2e-4  # of the network's products: a smaller layer costs more to quantise than it saves


def round_weights(weight: Tensor) -> Tensor:
    """Weights (O, ...) rounded to the 255 multiples of a 127th of each output channel's largest magnitude."""
    scale = weight.abs().amax(tuple(range(1, weight.ndim)), keepdim=True).clamp_min(1e-20) / LEVELS
    return (weight / scale).round() * scale


def round_inputs(x: Tensor, span: Span) -> Tensor:
    """x rounded to 256 equidistant numbers between the ends of `span`, of which 0 is one."""
    scale = max(span[1] - span[0], 1e-20) / 255
    zero = round(-span[0] / scale)
    return ((x / scale).round().clamp(-zero, 255 - zero)) * scale


class Rounding(NamedTuple):
    """How a format of eight bits rounds a layer's weights, and its inputs, whose span is known."""

    weights: Callable[[Tensor], Tensor]
    inputs: Callable[[Tensor, Span], Tensor]


UNSIGNED = Rounding(round_weights, round_inputs)  # onnxruntime's quantiser, for CPUs


def sensitivities(
    module: nn.Module, rows: Rows, spans: Mapping[str, Span], seed: int = 0, rounding: Rounding = UNSIGNED
) -> list[Layer]:
    """The table of a network's convolutions and linear layers in the order in which they run, with all of them `quantised`.

    `rows`: inputs, of which each is run on its own, so that memory does not grow with their number. `spans`: of the layers'
    inputs, see `calibration.Calibration`.
    """
    squares = dict.fromkeys(spans, 0.0)
    products = dict.fromkeys(spans, 0.0)
    energy, signs = 0.0, torch.Generator().manual_seed(seed)
    for row in rows:
        probe = _Probe(layers(module), spans, rounding)
        with probe, torch.enable_grad():
            output = _first(module(*(torch.from_numpy(x) for x in row)))
            energy += float(output.detach().double().square().sum())
            for _ in range(PROBES):
                sign = torch.randint(0, 2, output.shape, generator=signs).to(output.dtype) * 2 - 1
                for name, dot in probe.derivatives((sign * output).sum()).items():
                    squares[name] += dot**2 / PROBES
        for name, count in probe.products.items():
            products[name] += count
    total = sum(products.values())
    return [
        Layer(name, math.sqrt(squares[name] / max(energy, 1e-30)), products[name] / total, True) for name in squares
    ]


def chosen(table: Sequence[Layer], budget: float) -> list[Layer]:
    """The table with `quantised` decided, of those that can be: layers with the most error for the products that they save stay
    in higher precision, until the others together change the output by at most `budget` (relative L2). So do layers of next to
    no products."""
    worth = [layer for layer in table if layer.quantised and layer.products >= LEAST_SHARE]
    worth.sort(key=lambda layer: layer.error**2 / layer.products)
    total, quantised = 0.0, set()
    for layer in worth:
        if total + layer.error**2 <= budget**2:
            total += layer.error**2
            quantised.add(layer.name)
    return [Layer(layer.name, layer.error, layer.products, layer.name in quantised) for layer in table]


def predicted_error(table: Sequence[Layer]) -> float:
    """What the quantised layers together change in the network's output, relative L2."""
    return math.sqrt(sum(layer.error**2 for layer in table if layer.quantised))


class _Probe:
    """Hooks that keep, for each layer that runs, its output and its error of quantisation."""

    def __init__(self, layers: Mapping[str, Any], spans: Mapping[str, Span], rounding: Rounding) -> None:
        self._layers, self._spans, self._rounding = layers, spans, rounding
        self._outputs: list[tuple[str, Tensor, Tensor]] = []
        self._zero = torch.zeros((), requires_grad=True)  # added to every output: all of them get a derivative
        self.products: dict[str, float] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> _Probe:
        for name, layer in self._layers.items():
            if name in self._spans:
                self._handles.append(layer.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._outputs.clear()

    def derivatives(self, value: Tensor) -> dict[str, float]:
        """Layer -> the derivative of `value` along the layer's error."""
        outputs = [output for _, output, _ in self._outputs]
        found: dict[str, float] = {}
        grads = torch.autograd.grad(value, outputs, retain_graph=True, allow_unused=True)
        for (name, _, error), grad in zip(self._outputs, grads, strict=True):
            found[name] = found.get(name, 0.0) + (0.0 if grad is None else float((grad * error).sum()))
        return found

    def _hook(self, name: str) -> Any:
        def hook(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            with torch.no_grad():
                error = quantised_output(layer, inputs[0], self._spans[name], self._rounding) - output
            output = output + self._zero
            self._outputs.append((name, output, error))
            count = float(layer.weight.numel()) * output.numel() / output.shape[1 if output.ndim == 4 else -1]
            self.products[name] = self.products.get(name, 0.0) + count
            return output

        return hook


def quantised_output(layer: nn.Conv2d | nn.Linear, x: Tensor, span: Span, rounding: Rounding = UNSIGNED) -> Tensor:
    """The layer's output with inputs and weights in eight bits."""
    weight, x = rounding.weights(layer.weight.detach()), rounding.inputs(x.detach(), span)
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, layer.bias)
    return layer._conv_forward(x, weight, layer.bias)


@contextmanager
def eight_bits(
    module: nn.Module, table: Sequence[Layer], spans: Mapping[str, Span], rounding: Rounding = UNSIGNED
) -> Iterator[None]:
    """Within the block a network computes its `quantised` layers with inputs and weights in eight bits, as engines do."""
    found = layers(module)
    names = [layer.name for layer in table if layer.quantised]
    weights = {name: found[name].weight.data for name in names}
    handles = [found[name].register_forward_pre_hook(_round_first(spans[name], rounding)) for name in names]
    try:
        for name, weight in weights.items():
            found[name].weight.data = rounding.weights(weight)
        yield
    finally:
        for name, weight in weights.items():
            found[name].weight.data = weight
        for handle in handles:
            handle.remove()


def _round_first(span: Span, rounding: Rounding) -> Any:
    return lambda layer, inputs: (rounding.inputs(inputs[0], span), *inputs[1:])


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
