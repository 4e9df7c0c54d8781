"""Exact rewrites of OpenVINO graphs: the same function up to rounding, in forms that its CPU kernels run faster.

All work on a model that was just read (`openvino.Core.read_model`), in place; its inputs are in the order of the signature.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

VERSION = 5  # of these rewrites: part of the address of what was compiled with them
TIMESTEP, CONDITION = 1, 2  # places among the UNet's inputs: of the timestep, and of the first condition
MIN_PIXELS = 64 * 64  # smaller images are normalised faster in OpenVINO's own way
TILE = 32  # values of bf16 in a row of an AMX tile
DEQUANTISATION = ("Convert", "Subtract", "Multiply")
LAYOUT = ("Reshape", "Transpose", "Unsqueeze", "Squeeze")


def join_quantisation(model: Any) -> None:
    """Make one FakeQuantize of each pair of QuantizeLinear and DequantizeLinear, as in OpenVINO's own graphs in eight bits.

    The ONNX reader makes FakeQuantize, Convert, Convert, Subtract and Multiply of a pair. OpenVINO 2026.4 moves the last two
    past other operations, and then computes convolutions behind a `concat` wrong on a CPU with VNNI and without AMX.
    """
    from openvino import opset13

    for node in model.get_ordered_ops():
        if node.get_type_name() != "FakeQuantize":
            continue
        last, scale = node, None
        offset: Any = 0.0
        while (following := _consumer(last)) is not None and following.get_type_name() in DEQUANTISATION:
            last = following
            if last.get_type_name() == "Subtract":
                offset = _constant_through_converts(last.input_value(1).get_node())
            if last.get_type_name() == "Multiply":
                scale = _constant_through_converts(last.input_value(1).get_node())
                break
        lowest, highest = (_constant(node.input_value(i).get_node()) for i in (3, 4))
        if scale is None or offset is None or lowest is None or highest is None:
            raise ValueError(f"{node.get_friendly_name()}: its scale and zero point are no constants")
        ends = [opset13.constant(np.asarray((end - offset) * scale, np.float32)) for end in (lowest, highest)]
        levels = node.get_attributes()["levels"]
        _replace(last.output(0), opset13.fake_quantize(node.input_value(0), *ends, *ends, levels))


def multiply_weights(model: Any) -> None:
    """Make fp32 constants of 8-bit weights and their scales, so that they are multiplied in floating point.

    A CPU without VNNI adds two products of 8 bits in 16, and they overflow (relative error .32 instead of .05). OpenVINO 2026.4
    makes these constants too where it has to, but with two streams it loses some of them in one load of three.
    """
    from openvino import opset13

    for node in model.get_ordered_ops():
        if node.get_type_name() != "Multiply":
            continue
        integers, offset = node.input_value(0), np.zeros(1, np.float32)
        if integers.get_node().get_type_name() == "Subtract":
            integers, offset = integers.get_node().input_values()
            offset = _converted(offset)
        weights, scale = _converted(integers), _converted(node.input_value(1))
        if integers.get_node().get_type_name() == "Convert" and not any(x is None for x in (weights, offset, scale)):
            _replace(node.output(0), opset13.constant((weights.astype(np.float32) - offset) * scale))


def _converted(output: Any) -> Any:
    """The values of a constant, converted or reshaped, as this output has them; None of anything else."""
    values = _constant_through_converts(output.get_node())
    return None if values is None else values.reshape(list(output.get_shape()))


def _constant_through_converts(node: Any) -> np.ndarray | None:
    while node.get_type_name() in ("Convert", "Reshape"):
        node = node.input_value(0).get_node()
    return _constant(node)


def share_rows(unet: Any) -> bool:
    """Make a UNet take half as many rows of sample and timestep as of the condition, for guidance: what does not depend on the
    condition is computed once, and doubled where it meets what does. Before the shapes are fixed.

    False, with no row shared, where shapes are computed from the sample, which would be those of half the rows.
    """
    from openvino import opset13

    _scale_before_layouts(unet)
    parameters = unet.get_parameters()
    both = _reached(parameters[CONDITION:])
    either = _reached(parameters[:CONDITION])
    either |= {p.get_friendly_name() for p in parameters[:CONDITION]}
    nodes = unet.get_ordered_ops()
    for node in reversed(nodes):  # layouts stay with the attention that they are fused into
        name, layout = node.get_friendly_name(), node.get_type_name() in LAYOUT
        if layout and name in either - both and _consumed_by(node, both):
            both.add(name)
    frontier = [
        port
        for node in nodes
        if node.get_friendly_name() in both and node.get_type_name() != "ShapeOf"
        for port in node.inputs()
        if port.get_source_output().get_node().get_friendly_name() in either - both
    ]
    if any(not port.get_source_output().get_element_type().is_real() for port in frontier):
        return False
    doubled: dict[Any, Any] = {}
    for port in frontier:
        value = port.get_source_output()
        if value not in doubled:
            doubled[value] = opset13.concat([value, value], 0)
        port.replace_source_output(doubled[value].output(0))
    return True


def _reached(starts: Sequence[Any]) -> set[str]:
    """Names of the nodes that depend on one of these."""
    found: set[str] = set()
    front = list(starts)
    for node in front:
        for consumer in (port.get_node() for output in node.outputs() for port in output.get_target_inputs()):
            if consumer.get_friendly_name() not in found:
                found.add(consumer.get_friendly_name())
                front.append(consumer)
    return found


def _scale_before_layouts(model: Any) -> None:
    """Multiply by a number before changes of layout, not behind them: attention scales its queries so.

    OpenVINO does that too, but not across the `concat` that doubles rows, except of a single row, which it broadcasts. In bf16
    the queries would be rounded once or twice, depending on the number of rows.
    """
    from openvino import opset13

    for node in model.get_ordered_ops():
        if node.get_type_name() != "Multiply":
            continue
        scaled, factor = node.input_values()
        first, value = None, scaled
        while value.get_node().get_type_name() in LAYOUT and len(value.get_target_inputs()) == 1:
            first = value.get_node()
            value = first.input_value(0)
        if first is not None and factor.get_node().get_type_name() == "Constant" and not list(factor.get_shape()):
            first.input(0).replace_source_output(opset13.multiply(value, factor).output(0))
            _replace(node.output(0), scaled.get_node())


def _consumed_by(node: Any, names: set[str]) -> bool:
    return all(port.get_node().get_friendly_name() in names for port in node.output(0).get_target_inputs())


def normalise_channels_last(model: Any) -> None:
    """Group normalisation from the moments of single channels, where the images are large. With fixed shapes.

    As exported, (B, G, C / G * H * W) is normalised, for which OpenVINO turns its channels-last images to channels-first and
    back: a tenth of the time of a VAE decoder. A group's variance is the mean over its channels of their own variance and
    of the squared distance of their mean from the group's (the law of total variance), so large means do no harm.
    """
    from openvino import opset13 as op

    for mvn, x, normalised in _group_norms(model):
        (batch, channels, height, width), groups = x.get_shape(), mvn.get_output_shape(0)[1]
        if height * width < MIN_PIXELS:
            continue
        pixels, members = op.constant(np.array([2, 3])), op.constant(np.array([2]))
        grouped = op.constant(np.array([batch, groups, channels // groups]))
        single = op.constant(np.array([batch, channels, 1, 1]))
        mean = op.reduce_mean(x, pixels, True)  # (B, C, 1, 1)
        deviation = op.subtract(x, mean)
        variance = op.reduce_mean(op.multiply(deviation, deviation), pixels, True)  # (B, C, 1, 1)
        mean = op.reshape(mean, grouped, False)
        group_mean = op.reduce_mean(mean, members, True)  # (B, G, 1)
        distance = op.subtract(mean, group_mean)
        total = op.add(op.reshape(variance, grouped, False), op.multiply(distance, distance))
        eps = op.constant(np.float32(mvn.get_attributes()["eps"]))
        factor = op.divide(op.constant(np.float32(1)), op.sqrt(op.add(op.reduce_mean(total, members, True), eps)))
        shift, scale = (op.reshape(op.broadcast(y, grouped), single, False) for y in (group_mean, factor))
        _replace(normalised, op.multiply(op.subtract(x, shift), scale))


def _group_norms(model: Any) -> Iterator[tuple[Any, Any, Any]]:
    """The MVN of each group normalisation, the images (B, C, H, W) it normalises, and the output that holds them again."""
    for mvn in model.get_ordered_ops():
        if mvn.get_type_name() != "MVN" or mvn.input_value(0).get_node().get_type_name() != "Reshape":
            continue
        x = mvn.input_value(0).get_node().input_value(0)
        before, after = list(x.get_shape()), list(mvn.get_output_shape(0))
        back = _after_nothing(mvn)
        if back is None or back.get_type_name() != "Reshape" or list(back.get_output_shape(0)) != before:
            continue
        if len(before) == 4 and len(after) == 3 and before[0] == after[0] and _axes(mvn) == [2]:
            yield mvn, x, back.output(0)


def _after_nothing(node: Any) -> Any | None:
    """The next node that changes the values of this one, where a single one takes them."""
    found = _consumer(node)
    while found is not None and _changes_nothing(found):
        found = _consumer(found)
    return found


def _consumer(node: Any) -> Any | None:
    """The only node that takes a node's values, or None; shapes do not count."""
    nodes = [port.get_node() for port in node.output(0).get_target_inputs()]
    nodes = [node for node in nodes if node.get_type_name() != "ShapeOf"]
    return nodes[0] if len(nodes) == 1 else None


def _changes_nothing(node: Any) -> bool:
    """A product with ones or a sum with zeros, of which the exporter makes the scale and bias of an instance norm."""
    neutral = {"Multiply": 1.0, "Add": 0.0}.get(node.get_type_name())
    values = [_constant(v.get_node()) for v in node.input_values()]
    return neutral is not None and any(value is not None and bool((value == neutral).all()) for value in values)


def _constant(node: Any) -> np.ndarray | None:
    """The values of a constant, reshaped or not."""
    if node.get_type_name() == "Reshape":
        return _constant(node.input_value(0).get_node())
    return np.asarray(node.get_data()) if node.get_type_name() == "Constant" else None


def _axes(mvn: Any) -> list[int]:
    axes = _constant(mvn.input_value(1).get_node())
    return [] if axes is None else [int(axis) % 3 for axis in axes.reshape(-1)]


def interleave_channels_last(model: Any) -> None:
    """Depth to space of four stacked images (B, C, h, w), as `export.rewrite.SubpixelUpsample` interleaves them, so that whole
    pixels are copied: their channels lie side by side in memory."""
    from openvino import opset13

    for node in model.get_ordered_ops():
        if node.get_type_name() != "DepthToSpace" or node.get_attributes()["mode"].lower() != "depth_first":
            continue
        stack = node.input_value(0).get_node()
        stack = stack.input_value(0).get_node() if stack.get_type_name() == "Reshape" else stack
        phases = [value.get_node() for value in stack.input_values()]
        if stack.get_type_name() == "Concat" and stack.get_attributes()["axis"] == 2 and all(map(_adds_axis_2, phases)):
            joined = opset13.concat(
                [phase.input_value(0) for phase in phases], 1
            )  # (B, 4 * C, h, w), one after another
            _replace(
                node.output(0), opset13.depth_to_space(joined, "blocks_first", node.get_attributes()["block_size"])
            )


def _adds_axis_2(node: Any) -> bool:
    if node.get_type_name() not in ("Unsqueeze", "Reshape"):
        return False
    before, after = node.input_value(0).get_shape(), node.get_output_shape(0)
    return list(after) == [*before[:2], 1, *before[2:]]


def pad_products(model: Any) -> None:
    """Pad small products (B, N, K) @ (K, M) with zeros, to a K at which AMX multiplies any number of rows B * N. With fixed
    shapes.

    A CPU with AMX multiplies bf16 in tiles, but in vector instructions where there is one row and K is no multiple of `TILE`,
    or where there are at most 16 rows and K and M are at most `TILE`. Both add the same products in another order, hence the
    bits of an image would depend on how many images there are.
    """
    from openvino import opset13 as op

    for node in model.get_ordered_ops():
        if node.get_type_name() != "MatMul" or node.get_attributes()["transpose_a"]:
            continue
        *rows, columns = node.input_value(0).get_shape()
        weight, per_image = _converted(node.input_value(1)), np.prod(rows[1:])  # converted where it is stored in fp16
        if weight is None or weight.ndim != 2:
            continue
        missing = -columns % TILE if per_image == 1 else 0
        if per_image <= 16 and columns <= TILE and node.get_output_shape(0)[-1] <= TILE:
            missing = 2 * TILE - columns
        if missing:
            padding = ((0, 0), (0, missing)) if node.get_attributes()["transpose_b"] else ((0, missing), (0, 0))
            zeros = op.constant(np.zeros((*rows, missing), np.float32))
            node.input(0).replace_source_output(op.concat([node.input_value(0), zeros], len(rows)).output(0))
            node.input(1).replace_source_output(op.constant(np.pad(weight.astype(np.float32), padding)).output(0))
    model.validate_nodes_and_infer_types()


def widen_convolutions(model: Any) -> None:
    """Compute convolutions whose images are at most 2 x 2 as images of 3 x 3, of which the rest is dropped. With fixed shapes.

    As in `pad_products`: at that size a CPU with AMX takes its tiles or vector instructions, by the number of images.
    """
    from openvino import opset13 as op

    for node in model.get_ordered_ops():
        if node.get_type_name() != "Convolution" or max(size := list(node.get_output_shape(0))[2:]) > 2:
            continue
        given = node.get_attributes()
        strides, end = given["strides"], given["pads_end"]
        end = [p + s * (3 - n) for p, s, n in zip(end, strides, size, strict=True)]
        wide = op.convolution(*node.input_values(), strides, given["pads_begin"], end, given["dilations"])
        axes = list(range(2, 2 + len(size)))
        _replace(node.output(0), op.slice(wide, [0] * len(size), size, [1] * len(size), axes))


def time_embedding(unet: Any) -> Any:
    """The part of a UNet between its timestep and the first matrix products, as a model with the UNet's inputs; and the same of
    a condition that is one number per image.

    It is executed in fp32: in bf16 the timestep 999 is 1000, which costs more accuracy than all the rest together.
    """
    import openvino

    return openvino.Model(list(_embedded(unet)), unet.get_parameters(), "time_embedding")


def numbers(inputs: Sequence[Any]) -> list[int]:
    """The places of the timestep, and of other inputs that are one floating-point number per image, in a signature."""
    return [i for i, tensor in enumerate(inputs) if len(tensor.shape) == 1 and tensor.dtype == "float32"]


def take_embedding(unet: Any, places: Sequence[int]) -> None:
    """Make a UNet take what `time_embedding` computes, behind its other inputs, instead of those at `places`, see `numbers`."""
    import openvino

    parameters = unet.get_parameters()
    for output, consumers in _embedded(unet).items():
        parameter = openvino.opset13.parameter(output.get_shape(), np.float32)
        for consumer in consumers:
            consumer.replace_source_output(parameter.output(0))
        unet.add_parameters([parameter])
    for place in places:
        unet.remove_parameter(parameters[place])
    unet.validate_nodes_and_infer_types()


def _embedded(unet: Any) -> dict[Any, list[Any]]:
    """What is computed from the timestep, or another number per image, alone and without a matrix product -> the inputs of the
    matrix products, and of operations with other values, that take it."""
    parameters = unet.get_parameters()
    starts = [
        p for p in parameters if len(p.get_output_partial_shape(0)) == 1 and p.get_output_element_type(0).is_real()
    ]
    others = _reached([p for p in parameters if p not in starts]) | {p.get_friendly_name() for p in parameters}
    found: dict[Any, list[Any]] = {}
    reached, front = set(), [p.output(0) for p in starts]
    for output in front:
        for consumer in output.get_target_inputs():
            node = consumer.get_node()
            if node.get_type_name() == "MatMul" or node.get_friendly_name() in others:
                found.setdefault(output, []).append(consumer)
            elif node.get_friendly_name() not in reached:
                reached.add(node.get_friendly_name())
                front += node.outputs()
    return found


def _replace(output: Any, node: Any) -> None:
    """Let whoever takes `output` take the node's only output."""
    for port in output.get_target_inputs():
        port.replace_source_output(node.output(0))
