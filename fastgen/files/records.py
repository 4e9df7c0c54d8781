"""The boundary for everything that fastgen reads from JSON and TOML: plain values -> typed records, whose fields have bounds.

A record is a class derived from `Record`, with a type per field; `Annotated[int, Meta(ge=1, le=4096)]` and the types below say
the bounds. msgspec checks the values. What it refuses becomes one line: place, field, what was found, what was expected.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, inspect

from fastgen.errors import InputError, nearest
from fastgen.files.jsonfiles import brief, read_json

T = TypeVar("T")

MAX_EDGE = 16_384  # pixels of an image's side
MAX_STEPS = 10_000  # rows of a solver table, and timesteps of a noise schedule
MAX_WIDTH = 1_048_576
MAX_SEED = 2**63 - 1
MAX_COUNT = 2**53  # whole numbers that JSON's readers in every language keep exactly

Edge = Annotated[int, Meta(ge=1, le=MAX_EDGE)]
Steps = Annotated[int, Meta(ge=1, le=MAX_STEPS)]
Width = Annotated[int, Meta(ge=1, le=MAX_WIDTH)]  # channels of a layer, words of a vocabulary, classes
Extent = Annotated[int, Meta(ge=0, le=MAX_WIDTH)]  # the same, and 0 where there is none
Tokens = Annotated[int, Meta(ge=1, le=65_536)]  # of a prompt
Index = Annotated[int, Meta(ge=0, le=MAX_WIDTH)]  # of a label, a class, a word
Factor = Annotated[float, Meta(ge=-1e6, le=1e6)]  # of a network's values: a scale, a mean, a standard deviation
Bytes = Annotated[int, Meta(ge=0, le=MAX_COUNT)]
Count = Annotated[int, Meta(ge=0, le=MAX_COUNT)]
Seed = Annotated[int, Meta(ge=0, le=MAX_SEED)]
Name = Annotated[str, Meta(min_length=1, max_length=1000)]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]

_STEP = re.compile(r"\.(\w+)|\[(\d+|\.\.\.)\]")
_UNKNOWN = re.compile(r"unknown field `(.*?)`( - at|$)", re.DOTALL)
_MISSING = re.compile(r"missing required field `(.*?)`")


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base class of records: immutable, and a key that is no field is an error."""


def read_record(path: str | os.PathLike[str], kind: type[T], *, infinity: bool = False) -> T:
    """The record in a JSON file. Raises InputError as `read_json` and `to_record` do; `infinity`: see `read_json`."""
    return to_record(read_json(path, infinity=infinity), kind, path)


def to_record(value: Any, kind: type[T], place: object = "", field: str = "") -> T:
    """A value of JSON or TOML as a `kind`: a Record, or any type that msgspec converts to, such as `dict[str, Seed]`.

    Raises InputError, `place: field: found ..., expected ...`, for a value of another type or out of bounds, a missing key, and
    a key that is no field, with the nearest name. `field`: the name of the whole value, before the names of its fields.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        problem = _problem(value, kind, str(error), field)
    except InputError as error:  # of a record's __post_init__
        problem = f"{field}: {error}" if field else str(error)
    raise InputError(f"{place}: {problem}" if str(place) else problem)


def builtins(record: Any) -> Any:
    """What `to_record` would read back: dicts, lists (or tuples), numbers, strings, None."""
    return msgspec.to_builtins(record, enc_hook=_plain)


def _plain(value: Any) -> Any:
    """A text of a class of its own as plain text."""
    if isinstance(value, str):
        return str.__str__(value)
    raise TypeError(f"{type(value).__name__} cannot be a field of a record")


def named_value(config: Mapping[str, Any], message: str) -> str:
    """`FIELD: found VALUE: `, of the first field with a word that a library's message repeats; empty where there is none."""
    for key, value in config.items():
        if key.startswith("_"):
            continue
        words = [value] if isinstance(value, str) else value if isinstance(value, list) else []
        if any(isinstance(word, str) and len(word) > 2 and word in message for word in words):
            return f"{key}: found {brief(value)}: "
    return ""


def _problem(value: Any, kind: Any, message: str, field: str) -> str:
    """`field: found ..., expected ...` of a value that msgspec refused with this message."""
    path = message.rpartition("`$")[2].rstrip("`") if "`$" in message else ""
    expected, where, found = _type_info(kind), field, value
    steps = [name or index for name, index in _STEP.findall(path)]
    for depth, step in enumerate(steps):
        if step == "...":  # msgspec does not say which key
            step = _wrong_key(value, kind, [*steps[:depth]], found)
            steps[depth] = step
            where = f"{where}[{brief(step)}]"
        elif isinstance(found, Sequence):
            step = int(step)
            steps[depth] = step
            where = f"{where}[{step}]"
        else:
            where = f"{where}.{step}" if where else str(step)
        found, expected = found[step], _inner(expected, step, found[step])
    here = f"{where}: " if where else ""
    if (match := _UNKNOWN.search(message)) is not None:
        names = [f.encode_name for f in _alternative(expected, inspect.StructType).fields]
        return f"{here}unknown field {brief(match[1])}{nearest(match[1], names)}"
    if (match := _MISSING.search(message)) is not None:
        return f"{where}.{match[1]} is missing" if where else f"{match[1]} is missing"
    if message.startswith("Expected ") and "`key`" in message:
        keys = _alternative(expected, inspect.DictType).key_type
        return f"{here}found a key that is refused, expected {_words(keys)}"
    if not message.startswith(("Expected ", "Invalid ")):
        return f"{here}{message.partition(' - at `$')[0]}"  # of a record's __post_init__
    hint = ""
    if isinstance(found, str) and (choices := _choices(expected)):
        hint = nearest(found, choices)
    return f"{here}found {brief(found)}, expected {_words(expected)}{hint}"


def _wrong_key(value: Any, kind: Any, steps: list[Any], table: Mapping[Any, Any]) -> Any:
    """The first key of a table, which lies at `steps` of the value, whose own value is refused."""
    for key, inner in table.items():
        try:
            msgspec.convert(_replaced(value, steps, {key: inner}), kind)
        except (msgspec.ValidationError, InputError):
            return key
    raise AssertionError("a table is refused, but none of its values is")


def _replaced(value: Any, steps: list[Any], new: Any) -> Any:
    """The value with another one at `steps`."""
    if not steps:
        return new
    first, *rest = steps
    inner = _replaced(value[first], rest, new)
    if isinstance(value, Mapping):
        return {**value, first: inner}
    return [*value[:first], inner, *value[first + 1 :]]


@cache
def _type_info(kind: Any) -> Any:
    return inspect.type_info(kind)


def _inner(info: Any, step: Any, value: Any) -> Any:
    """The type of a field, of a table's values, or of a list's items."""
    for kind in info.types if isinstance(info, inspect.UnionType) else (info,):
        if isinstance(kind, inspect.StructType):
            return next(f.type for f in kind.fields if f.encode_name == step)
        if isinstance(kind, inspect.DictType):
            return kind.value_type
        if isinstance(kind, inspect.TupleType):
            return kind.item_types[step]
        if isinstance(kind, inspect.ListType | inspect.VarTupleType | inspect.SetType | inspect.FrozenSetType):
            return kind.item_type
    raise AssertionError(f"{info} has no part {step!r}")


def _alternative(info: Any, kind: type[Any]) -> Any:
    """The type of this kind among those of a union."""
    return next(t for t in (info.types if isinstance(info, inspect.UnionType) else (info,)) if isinstance(t, kind))


def _choices(info: Any) -> list[str]:
    kinds = info.types if isinstance(info, inspect.UnionType) else (info,)
    return [str(value) for kind in kinds if isinstance(kind, inspect.LiteralType) for value in kind.values]


def _words(info: Any) -> str:
    """What a type allows, in words: `a whole number from 1 to 4096`."""
    if isinstance(info, inspect.UnionType):
        return " or ".join(_words(kind) for kind in info.types)
    if isinstance(info, inspect.IntType | inspect.FloatType):
        noun = "a whole number" if isinstance(info, inspect.IntType) else "a number"
        return noun + _bounds(info)
    if isinstance(info, inspect.LiteralType):
        return ", ".join(map(str, info.values))
    if isinstance(info, inspect.StrType):
        if info.pattern == "^[0-9a-f]{64}$":
            return "a SHA-256 in hexadecimal"
        return "text" + (f" like {info.pattern}" if info.pattern else _length(info, "characters"))
    if isinstance(info, inspect.TupleType):
        return f"a list of {len(info.item_types)}"
    if isinstance(info, inspect.ListType | inspect.VarTupleType):
        return "a list" + _length(info, "items")
    if isinstance(info, inspect.DictType | inspect.StructType):
        return "an object" + (_length(info, "keys") if isinstance(info, inspect.DictType) else "")
    return {inspect.BoolType: "true or false", inspect.NoneType: "null"}.get(type(info), "another value")


def _bounds(info: Any) -> str:
    low = f"{info.ge}" if info.ge is not None else None
    high = f"{info.le}" if info.le is not None else None
    if low is not None and high is not None:
        return f" from {low} to {high}"
    words = [
        *([f"at least {low}"] if low is not None else []),
        *([f"more than {info.gt}"] if info.gt is not None else []),
        *([f"at most {high}"] if high is not None else []),
        *([f"less than {info.lt}"] if info.lt is not None else []),
    ]
    return f", {' and '.join(words)}" if words else ""


def _length(info: Any, unit: str) -> str:
    low, high = info.min_length, info.max_length
    if low is None and high is None:
        return ""
    if low == high:
        return f" of {low} {unit}"
    return f" of {low or 0} to {high} {unit}" if high is not None else f" of at least {low} {unit}"
