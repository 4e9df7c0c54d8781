"""TOML files and values: what a record cannot hold is refused when read, with the name of its key."""

from __future__ import annotations

import math
import os
import tomllib
from typing import Any

from fastgen.errors import InputError
from fastgen.files.jsonfiles import MAX_INTEGER_DIGITS, brief, located, read_text

MAX_BYTES = 2**20
MAX_DEPTH = 20  # tables and lists within each other


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The table of a TOML file of at most 1 MiB. Raises InputError as `read_text` and `parse_toml` do."""
    return parse_toml(read_text(path, "a TOML file", MAX_BYTES), path)


def parse_toml(text: str, place: object) -> dict[str, Any]:
    """The table of a TOML text. Raises InputError, after `place`, for malformed TOML (with its position), for numbers that are
    not finite or have more than 40 digits, the character NUL in a text, dates, and nesting that is too deep."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{place}: not valid TOML: {error}") from None
    except RecursionError:
        raise InputError(f"{place}: TOML nested too deeply") from None
    except ValueError:  # of int(), for thousands of digits
        raise InputError(f"{place}: found a number of too many digits, expected at most {MAX_INTEGER_DIGITS}") from None
    with located(place):
        check_values(table)
    return table


def check_values(value: Any, field: str = "") -> None:
    """InputError for a value of TOML that `parse_toml` refuses; its message begins with the value's key, below `field`."""
    problem = _problem(value, field, 0)
    if problem:
        raise InputError(problem)


def _problem(value: Any, where: str, depth: int) -> str | None:
    """`key: found ..., expected ...` of the first value that is refused."""
    if depth > MAX_DEPTH:
        return f"{where[:80]}: nested too deeply, expected at most {MAX_DEPTH} tables and lists within each other"
    if isinstance(value, dict | list):
        items: Any = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            step = f"[{key}]" if isinstance(value, list) else f".{key}" if where else f"{key}"
            if "\0" in str(key):
                return f"{where or 'the top'}: found NUL in the key {brief(key)}"
            if problem := _problem(inner, where + step, depth + 1):
                return problem
        return None
    expected = {bool: True, str: "\0" not in str(value), int: True, float: True}
    if not expected.get(type(value), False):
        return f"{where}: found {brief(value)}, expected text without NUL, a number, true, false, a list or a table"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{where}: found {value}, expected a finite number"
    if isinstance(value, int) and abs(value) >= 10**MAX_INTEGER_DIGITS:
        return f"{where}: found a number of too many digits, expected at most {MAX_INTEGER_DIGITS}"
    return None
