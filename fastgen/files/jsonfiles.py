"""JSON and JSONL files: errors name file, line and column; nothing is dropped silently; writes are atomic."""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from fastgen.errors import FastgenError, InputError
from fastgen.files.temporary import temporary_path

INFINITE = {"Infinity": math.inf, "-Infinity": -math.inf}
MAX_INTEGER_DIGITS = 40  # int() itself refuses 4300 digits, and takes quadratic time below that
MAX_BYTES = 64 * 2**20  # of a file that is read whole; Python's objects take about ten times as much memory
MAX_DATA_BYTES = 2**30  # of a file that describes a training set

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict = 2, 3, 3

# A string (and whether it is a key), a brace, a constant that JSON lacks, or a number: what `_explain` looks at.
_TOKEN = re.compile(r'("(?:[^"\\]|\\.)*+")(\s*:)?|[{}]|NaN|-?Infinity|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?', re.DOTALL)
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")  # an escape for the character 0


class _RefusedError(ValueError):
    """Valid for Python's parser, but refused here. The parser's hooks, which raise it, do not know the position."""


def brief(value: object) -> str:
    """`repr(value)` cut to a length that fits in an error message, however large the value is."""
    return _SHORT.repr(value)


@contextmanager
def located(place: object) -> Iterator[None]:
    """Puts `place: ` in front of an InputError raised inside."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}: {error}") from None


def read_json(path: str | os.PathLike[str], *, infinity: bool = False, limit: int = MAX_BYTES) -> Any:
    """The value of a JSON file (UTF-8, byte order mark accepted) of at most `limit` bytes.

    `infinity`: accept Infinity and -Infinity, which are not JSON, but which diffusers writes into the scheduler_config.json of
    DPM-Solver (`lambda_min_clipped`). Raises InputError for a missing or unreadable file, bytes that are not UTF-8, malformed
    JSON, nesting too deep for the parser, and what Python's parser accepts at the user's cost: a key twice in one object, NaN,
    Infinity, numbers too large for a float, integers of more than 40 digits, the character 0 in a text.
    """
    return _parse(read_text(path, limit=limit), Path(path), 1, _WITH_INFINITY if infinity else _STRICT)


def parse_json_text(text: str, place: object) -> Any:
    """The value of the JSON file `place` that has this text. Raises InputError as `read_json` does."""
    return _parse(text, place, 1)


def parse_json(data: bytes, place: object) -> Any:
    """The value of JSON that lies in another file, which `place` names. Raises InputError as `read_json` does."""
    try:
        return _parse(data.decode(), place, 1)
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: not UTF-8 (found byte 0x{data[error.start]:02x})") from None


def read_jsonl(path: str | os.PathLike[str], limit: int = MAX_BYTES) -> list[tuple[int, Any]]:
    """(line number from 1, value) for every line of a JSONL file that is not blank; raises as `read_json` does."""
    return parse_jsonl_text(read_text(path, limit=limit), Path(path))


def parse_jsonl_text(text: str, place: object) -> list[tuple[int, Any]]:
    """As `read_jsonl`, of the file `place` that has this text."""
    lines = enumerate(text.split("\n"), start=1)
    return [(number, _parse(line, place, number)) for number, line in lines if line.strip(" \t\r")]


def read_text(path: str | os.PathLike[str], expected: str = "a JSON file", limit: int = MAX_BYTES) -> str:
    """A file's text (UTF-8, byte order mark accepted), of at most `limit` bytes. InputError for a missing or unreadable file,
    for what is no file (to read a pipe would wait for its writer), and for other bytes."""
    return decode(read_bytes(path, expected, limit), Path(path))


def decode(data: bytes, place: object) -> str:
    """The text of the file `place` (UTF-8, byte order mark accepted). InputError for other bytes."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        found = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else f"byte 0x{data[error.start]:02x}"
        raise InputError(
            f"{place}: line {line}, column {column}: not UTF-8 (found {found}); save it as UTF-8"
        ) from None


def read_bytes(path: str | os.PathLike[str], expected: str = "a file", limit: int = MAX_BYTES) -> bytes:
    """A file's content, of at most `limit` bytes; InputError for a missing or unreadable file and for what is no file."""
    path = Path(path)
    with _reading(path):
        size = _regular_size(path, expected)
        if size > limit:
            found = f"has {size / 2**20:,.0f} MiB, expected at most {limit / 2**20:,.0f} MiB"
            raise InputError(f"{path}: {found}; split it")
        return path.read_bytes()


def check_regular(path: str | os.PathLike[str], expected: str = "a file") -> None:
    """InputError for a missing file and for what is no file: to open a pipe would wait for its writer."""
    with _reading(Path(path)):
        _regular_size(Path(path), expected)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """OSError and ValueError (a NUL in the path), raised inside, as InputError."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or error
        raise InputError(f"{brief(str(path))}: cannot be read: {problem}") from None


def _regular_size(path: Path, expected: str) -> int:
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise InputError(f"{path}: is a folder, expected {expected}")
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path}: is a pipe or a device, expected {expected}")
    return status.st_size


def write_json(path: str | os.PathLike[str], value: Any, indent: int | None = 2, *, infinity: bool = False) -> None:
    """Writes `value` as UTF-8 JSON under a temporary name, then renames it to `path`.

    `infinity`: allow infinite numbers, as `read_json` does, for files that diffusers reads.
    Raises FastgenError where the disk or the permissions refuse, ValueError for NaN, and for infinity where not allowed.
    """
    write_bytes(path, json_bytes(value, indent, infinity=infinity))


def write_new_json(path: str | os.PathLike[str], value: Any) -> bool:
    """As `write_json`, but False, and nothing is written, where `path` is there already: of several processes one succeeds."""
    return write_new(path, json_bytes(value))


def json_bytes(value: Any, indent: int | None = 2, *, infinity: bool = False) -> bytes:
    """What `write_json` writes."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=infinity) + "\n"
    return text.encode("utf-8", "backslashreplace")  # a lone surrogate becomes \udXXX, its JSON escape


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file so that `path` holds the old content or all of the new, never a part; FastgenError if it fails."""
    _write(Path(path), data, os.replace)


def write_new(path: str | os.PathLike[str], data: bytes) -> bool:
    """As `write_bytes`, but False, and nothing is written, where `path` is there already: of several processes one succeeds."""
    return _write(Path(path), data, _place_new)


def _write(path: Path, data: bytes, place: Callable[[Path, Path], None]) -> bool:
    """Write a temporary file and `place` it at `path`; False where `place` finds a file there."""
    temporary = temporary_path(path)
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        place(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        raise FastgenError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return True


def _place_new(temporary: Path, path: Path) -> None:
    """Give a file a name that is free. FileExistsError where it is not."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        with open(path, "xb"):
            os.replace(temporary, path)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise _RefusedError
    return value


def infinity_as_text(config: Mapping[str, Any]) -> dict[str, Any]:
    """A flat config whose infinite numbers are the words Infinity and -Infinity: strict JSON."""
    words = {math.inf: "Infinity", -math.inf: "-Infinity"}
    return {key: words.get(value, value) if isinstance(value, float) else value for key, value in config.items()}


def infinity_from_text(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config that `infinity_as_text` was given."""
    return {key: INFINITE.get(value, value) if isinstance(value, str) else value for key, value in config.items()}


def _refuse_constant(_: str) -> NoReturn:
    raise _RefusedError


def _infinity(word: str) -> float:
    if word not in INFINITE:
        raise _RefusedError
    return INFINITE[word]


def _integer(digits: str) -> int:
    if len(digits) > MAX_INTEGER_DIGITS:
        raise _RefusedError
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise _RefusedError
    return value


_HOOKS: dict[str, Any] = {"object_pairs_hook": _unique, "parse_int": _integer, "parse_float": _finite}
_STRICT = json.JSONDecoder(parse_constant=_refuse_constant, **_HOOKS)
_WITH_INFINITY = json.JSONDecoder(parse_constant=_infinity, **_HOOKS)


def _parse(text: str, path: object, first_line: int, decoder: json.JSONDecoder = _STRICT) -> Any:
    try:
        value = decoder.decode(text)
        if "\\u0000" in text and _NUL.search(text):
            raise _RefusedError
        return value
    except json.JSONDecodeError as error:
        place = f"{path}: line {first_line + error.lineno - 1}, column {error.colno}"
        if not text.strip():
            raise InputError(f"{path}: is empty, expected JSON") from None
        help_text = "; is it JSONL (a value per line)? then name it .jsonl" if error.msg == "Extra data" else ""
        raise InputError(f"{place}: malformed JSON: {error.msg}{help_text}") from None
    except _RefusedError:
        position, problem = _explain(text, ("NaN",) if decoder is _WITH_INFINITY else ("NaN", "Infinity"))
        line = first_line + text.count("\n", 0, position)
        column = position - text.rfind("\n", 0, position)
        raise InputError(f"{path}: line {line}, column {column}: {problem}") from None
    except RecursionError:
        raise InputError(f"{path}: line {first_line}: JSON nested too deeply") from None


def _explain(text: str, constants: tuple[str, ...]) -> tuple[int, str]:
    """(position, problem) of what a hook refused; `constants`: the words that it refuses. The text before is well-formed."""
    objects: list[set[str]] = []
    for match in _TOKEN.finditer(text):
        token, string, colon = match[0], match[1], match[2]
        if string and "\\u0000" in string and _NUL.search(string):
            return match.start(), "found NUL (\\u0000) in a text"
        if token == "{":
            objects.append(set())
        elif token == "}":
            objects.pop()
        elif string and colon:
            key = json.loads(string)
            if key in objects[-1]:
                return match.start(), f"key {brief(key)} occurs twice in one object; only one of them would be kept"
            objects[-1].add(key)
        elif not string and token.endswith(constants):
            return match.start(), f"found {token}, which is not JSON"
        elif not string and len(token) > MAX_INTEGER_DIGITS and token.lstrip("-").isdigit():
            return match.start(), f"found an integer of {len(token)} digits, expected at most {MAX_INTEGER_DIGITS}"
        elif not string and token[-1].isdigit() and math.isinf(float(token)):
            return match.start(), f"found {token[:20]}, a number too large for a float"
    raise AssertionError("a hook refused what the scanner accepts")
