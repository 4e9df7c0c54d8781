"""The files that an ONNX graph keeps its weights in, read from the graph's bytes without the onnx package.

An ONNX file is a protobuf message, whose fields stand as (number, value) one after another (protobuf.dev/programming-guides/
encoding). Only those messages are looked into that can hold a tensor, and whose bytes hold the word `location` at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fastgen.errors import InputError
from fastgen.files.jsonfiles import read_bytes

MAX_GRAPH_BYTES = 2**31  # protobuf's own limit
MAX_DEPTH = 64  # of messages within messages; an exported graph has about 8
_WORD = b"location"
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


def data_files(path: Path) -> set[str]:
    """The `location` of all external data of an ONNX file, as they stand there. Raises InputError for what is no protobuf."""
    data = read_bytes(path, "an ONNX graph", MAX_GRAPH_BYTES)
    try:
        return {entry.decode() for entry in _locations(data, 0, len(data), "Model", 0)}
    except (ValueError, IndexError) as error:
        raise InputError(f"{path}: is no ONNX graph ({error}); export the model again") from None


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


def _fields(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(number, begin, end) of the fields of a message that have a length: texts, bytes, messages. ValueError, IndexError."""
    position = start
    while position < end:
        tag, position = _varint(data, position)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            _, position = _varint(data, position)
        elif kind == 2:
            size, position = _varint(data, position)
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
