"""config.pbtxt of the models in a Triton model repository, in protobuf's text format.

The fields are those of Triton's model_config.proto. A config does not name its model: Triton takes the folder's name, so a
folder can be renamed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from fastgen.models.condition import BATCH, Condition
from fastgen.models.signatures import Signature, TensorSpec

TYPES = {"float32": "TYPE_FP32", "int64": "TYPE_INT64"}
ONE = (1,)
# The whole model's inputs are fields of the HTTP API, in types that keep all their bits.
FIELDS: Mapping[str, tuple[str, Sequence[int]]] = {
    "n": ("TYPE_INT32", ONE),
    "seed": ("TYPE_INT64", ONE),
    "num_inference_steps": ("TYPE_INT32", ONE),
    "guidance_scale": ("TYPE_FP64", ONE),
    "guidance_interval": ("TYPE_INT32", (2,)),
    "scheduler": ("TYPE_STRING", ONE),
    "normalize": ("TYPE_STRING", ONE),
    "output_format": ("TYPE_STRING", ONE),
    "output_compression": ("TYPE_INT32", ONE),
    "deadline_s": ("TYPE_FP64", ONE),
}
OUTPUTS = {"image": ("TYPE_STRING", ONE), "seed": ("TYPE_INT64", ONE), "metadata": ("TYPE_STRING", ONE)}


def graph_config(signature: Signature, max_rows: int) -> str:
    """Config of a network's ONNX graph. Triton puts requests together, up to `max_rows` rows."""
    return _config(
        'backend: "onnxruntime"',
        f"max_batch_size: {max_rows}",
        _tensors("input", (_batched(tensor) for tensor in signature.inputs)),
        _tensors("output", (_batched(tensor) for tensor in signature.outputs)),
        "dynamic_batching { }",
    )


def plan_config(signature: Signature, rows: int) -> str:
    """Config of a TensorRT plan. It runs exactly `rows` rows, which are part of its dims."""

    def whole(tensor: TensorSpec) -> str:
        return _tensor(tensor.name, TYPES[tensor.dtype], tensor.with_batch(rows))

    return _config(
        'platform: "tensorrt_plan"',
        "max_batch_size: 0",
        _tensors("input", map(whole, signature.inputs)),
        _tensors("output", map(whole, signature.outputs)),
    )


def model_config(condition: Condition, parameters: Mapping[str, str]) -> str:
    """Config of the whole model, in Python. Every image of a request is a response of its own, sent when it is done."""
    fields = dict(FIELDS)
    if condition.kind.endswith("labels"):
        fields = {"labels": ("TYPE_STRING", (-1,)), **fields}
    if condition.text is not None:
        fields = {"prompt": ("TYPE_STRING", ONE), **fields}
    return _config(
        'backend: "python"',
        "max_batch_size: 0",
        "model_transaction_policy { decoupled: true }",
        _tensors("input", (_tensor(name, *field, "optional: true") for name, field in fields.items())),
        _tensors("output", (_tensor(name, *output) for name, output in OUTPUTS.items())),
        "instance_group [ { count: 1 } ]",
        *(f'parameters {{ key: "{name}" value {{ string_value: "{value}" }} }}' for name, value in parameters.items()),
    )


def _batched(tensor: TensorSpec) -> str:
    """A tensor whose first axis is the batch. One that has no other axis is `dims: [ 1 ]` for clients, as Triton has no empty
    dims, and is reshaped for the network."""
    assert tensor.shape[0] == BATCH
    dims = tensor.with_batch(1)[1:]
    if not dims:
        return _tensor(tensor.name, TYPES[tensor.dtype], ONE, "reshape { shape: [ ] }")
    return _tensor(tensor.name, TYPES[tensor.dtype], dims)


def _tensor(name: str, dtype: str, dims: Sequence[int], *more: str) -> str:
    sizes = ", ".join(map(str, dims))
    return " ".join([f'{{ name: "{name}" data_type: {dtype} dims: [ {sizes} ]', *more, "}"])


def _tensors(kind: str, tensors: Iterable[str]) -> str:
    lines = ",\n".join(f"  {tensor}" for tensor in tensors)
    return f"{kind} [\n{lines}\n]"


def _config(*fields: str) -> str:
    return "\n".join(fields) + "\n"
