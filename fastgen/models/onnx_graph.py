"""The inputs and outputs of an ONNX graph, and the files with its weights, read from its bytes without the onnx package.

An ONNX file is a protobuf message, whose fields stand as (number, value) one after another (protobuf.dev/programming-guides/
encoding). For the files only those messages are looked into that can hold a tensor, and whose bytes hold the word `location`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastgen.errors import InputError
from fastgen.files.jsonfiles import read_bytes
from fastgen.models.condition import BATCH
from fastgen.models.signatures import Signature, TensorSpec

MAX_GRAPH_BYTES = 2**31  # protobuf's own limit
MAX_DEPTH = 64  # of messages within messages; an exported graph has about 8
_WORD = b"location"
AGAIN = "export the model again"
# The fields of each message that can hold tensors: number -> message. Names as in onnx.proto.
_MESSAGES: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}
_INPUTS, _OUTPUTS, _INITIALIZERS, _GRAPH = 11, 12, 5, 7  # fields of a graph; and its own in the model
_TENSOR_NAME = 8
_DTYPES = {1: "float32", 7: "int64"}  # onnx.TensorProto.DataType

Axis = int | None  # None: any size


@dataclass(frozen=True)
class GraphTensor:
    """An input or output. `shape`: None where the graph does not say."""

    name: str
    dtype: str  # "float32", "int64", or onnx's number of another type
    shape: tuple[Axis, ...] | None

    def fits(self, tensor: TensorSpec) -> bool:
        """Whether it takes, or gives, a tensor of the signature."""
        if (self.name, self.dtype) != (tensor.name, tensor.dtype):
            return False
        if self.shape is None:
            return True
        pairs = zip(self.shape, tensor.shape, strict=False)
        return len(self.shape) == len(tensor.shape) and all(there is None or there == axis for there, axis in pairs)

    def __str__(self) -> str:
        shape = "" if self.shape is None else f" {[BATCH if axis is None else axis for axis in self.shape]}"
        return f"{self.name} {self.dtype}{shape}"


@dataclass(frozen=True)
class Graph:
    """An ONNX file. `data`: the `location` of all external data, as they stand there."""

    path: Path
    inputs: Sequence[GraphTensor]
    outputs: Sequence[GraphTensor]
    data: frozenset[str]

    def check(self, signature: Signature) -> None:
        """InputError unless the graph's inputs and outputs are those of the signature."""
        for what, there, expected in (
            ("input", self.inputs, signature.inputs),
            ("output", self.outputs, signature.outputs),
        ):
            if len(there) != len(expected):
                raise InputError(f"{self.path}: has {len(there)} {what}s, expected {len(expected)}; {AGAIN}")
            for tensor, spec in zip(there, expected, strict=True):
                if not tensor.fits(spec):
                    wanted = f"{spec.name} {spec.dtype} {list(spec.shape)}"
                    raise InputError(f"{self.path}: {what}: found {str(tensor)[:90]}, expected {wanted}; {AGAIN}")


def read_graph(path: Path) -> Graph:
    """Read an ONNX file. Raises InputError for what is none."""
    data = read_bytes(path, "an ONNX graph", MAX_GRAPH_BYTES)
    try:
        files = frozenset(entry.decode() for entry in _locations(data, 0, len(data), "Model", 0))
        graphs = [(begin, stop) for number, begin, stop in _fields(data, 0, len(data)) if number == _GRAPH]
        if len(graphs) != 1:
            raise ValueError(f"it holds {len(graphs)} graphs")
        fields = list(_fields(data, *graphs[0]))
        weights = {_text(data, begin, stop, _TENSOR_NAME) for n, begin, stop in fields if n == _INITIALIZERS}
        inputs = [_tensor(data, begin, stop) for number, begin, stop in fields if number == _INPUTS]
        outputs = [_tensor(data, begin, stop) for number, begin, stop in fields if number == _OUTPUTS]
    except (ValueError, IndexError) as error:
        raise InputError(f"{path}: is no ONNX graph ({error}); {AGAIN}") from None
    return Graph(path, [t for t in inputs if t.name not in weights], outputs, files)


def _tensor(data: bytes, begin: int, stop: int) -> GraphTensor:
    """A ValueInfoProto: name = 1, type = 2; of the type tensor_type = 1, of that elem_type = 1, shape = 2."""
    name, shape, dtype = _text(data, begin, stop, 1), None, "0"
    for type_ in _parts(data, begin, stop, 2):
        for tensor_type in _parts(data, *type_, 1):
            number = _numbers(data, *tensor_type).get(1, 0)
            dtype = _DTYPES.get(number, f"onnx type {number}")
            for dims in _parts(data, *tensor_type, 2):
                shape = tuple(_numbers(data, *dim).get(1) for dim in _parts(data, *dims, 1))
    return GraphTensor(name, dtype, shape)


def _parts(data: bytes, begin: int, stop: int, wanted: int) -> list[tuple[int, int]]:
    """Begin and end of a message's fields of this number."""
    return [(start, end) for number, start, end in _fields(data, begin, stop) if number == wanted]


def _text(data: bytes, begin: int, stop: int, wanted: int) -> str:
    return "".join(data[start:end].decode() for start, end in _parts(data, begin, stop, wanted)[-1:])


def _numbers(data: bytes, begin: int, stop: int) -> Mapping[int, int]:
    """The whole numbers among a message's fields."""
    numbers: dict[int, int] = {}
    for _ in _fields(data, begin, stop, numbers):
        pass
    return numbers


def _locations(data: bytes, start: int, end: int, message: str, depth: int) -> Iterator[bytes]:
    """The values of all entries `location` in data[start:end], a message of this kind."""
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    if message == "Entry":
        fields = {number: data[begin:stop] for number, begin, stop in _fields(data, start, end)}
        if fields.get(1) == _WORD:
            yield fields.get(2, b"")
        return
    for number, begin, stop in _fields(data, start, end):
        inner = _MESSAGES[message].get(number)
        if inner is not None and data.find(_WORD, begin, stop) >= 0:
            yield from _locations(data, begin, stop, inner, depth + 1)


def _fields(data: bytes, start: int, end: int, numbers: dict[int, int] | None = None) -> Iterator[tuple[int, int, int]]:
    """(number, begin, end) of the fields of a message that have a length: texts, bytes, messages. The whole numbers among the
    others go into `numbers`. ValueError or IndexError for what is no message.

    Numbers of one byte, which nearly all are, are read here: a graph has tens of thousands, before the first picture."""
    position = start
    while position < end:
        tag = data[position]
        position += 1
        if tag >= 0x80:
            tag, position = _varint(data, position - 1)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, position = _varint(data, position)
            if numbers is not None:
                numbers[number] = value
        elif kind == 2:
            size = data[position]
            position += 1
            if size >= 0x80:
                size, position = _varint(data, position - 1)
            if position + size > end:
                raise ValueError("a field is longer than its message")
            yield number, position, position + size
            position += size
        elif kind in (1, 5):
            position += 8 if kind == 1 else 4
        else:
            raise ValueError(f"found a field of kind {kind}")
    if position != end:
        raise ValueError("cut off")


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """(value, position after it): 7 bits per byte, the lowest first, the highest bit set where more follow."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number of more than 10 bytes")
