"""The boundary for what users type: every option and argument of every command has one of these types.

A type refuses an empty text, which is never the same as an option left out, the character NUL, numbers that are not finite or
out of bounds, and paths that no file system takes: InputError, `--option: found X, expected Y`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from fastgen.errors import InputError, one_line, unknown
from fastgen.files.jsonfiles import brief
from fastgen.files.names import check_device
from fastgen.files.places import Url, is_url, parse_place, without_secrets
from fastgen.files.records import MAX_EDGE, MAX_SEED, MAX_STEPS

MAX_TEXT = 100_000  # characters of one value; Linux itself takes 131,071 bytes
MAX_PATH, MAX_NAME = 4095, 255  # bytes of a path and of a name in it, on Linux
MAX_NEW_NAME = 235  # of a name that is written: other names, such as NAME.lock, are made of it
MAX_IMAGES = 1_000_000  # of one command


def option(*names: str, **settings: Any) -> Callable[[Any], Any]:
    """`click.option` for one of the types of this module; a text without one."""
    if not (settings.get("is_flag") or any("/" in name for name in names)):
        settings.setdefault("type", TEXT)
    return click.option(*names, **settings)


def argument(name: str, **settings: Any) -> Callable[[Any], Any]:
    """`click.argument` for one of the types of this module; a text without one."""
    return click.argument(name, **{"type": TEXT, **settings})


class Typed(click.ParamType):
    """What all types share: the value is a text without NUL that is not empty, or a default that is converted already."""

    name = "text"
    expected = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return self.converted(value, param)
        if not value:
            refuse(param, "an empty text", f"{self.expected}; to leave it out, leave out the option")
        if "\0" in value:
            refuse(param, brief(value), f"{self.expected} without the character NUL")
        if len(value) > MAX_TEXT:
            refuse(param, f"{len(value):,} characters", f"at most {MAX_TEXT:,}")
        return self.converted(value, param)

    def converted(self, value: Any, param: click.Parameter | None) -> Any:
        """The value of a text that has passed the checks, or of a default."""
        return value


class Whole(Typed):
    """A whole number from `low` to `high`."""

    name = "integer"

    def __init__(self, low: int, high: int) -> None:
        self.low, self.high = low, high
        self.expected = f"a whole number from {low} to {high}"

    def converted(self, value: Any, param: click.Parameter | None) -> int:
        number = int(value) if re.fullmatch(r"[+-]?[0-9]{1,30}", str(value).strip()) else None
        if number is None or not self.low <= number <= self.high:
            refuse(param, brief(value), self.expected)
        return number


class Number(Typed):
    """A finite number from `low` to `high`; `above`: more than `low`."""

    name = "float"

    def __init__(self, low: float, high: float, *, above: bool = False) -> None:
        self.low, self.high, self.above = low, high, above
        self.expected = f"a number {'above' if above else 'from'} {low:g} {'and up ' if above else ''}to {high:g}"

    def converted(self, value: Any, param: click.Parameter | None) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not self.low <= number <= self.high or (self.above and number == self.low):  # NaN is in no range
            refuse(param, brief(value), self.expected)
        return number


class Choice(Typed):
    """One of the names."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def choices(self) -> Sequence[str]:
        return self.names

    def converted(self, value: Any, param: click.Parameter | None) -> Any:
        if value not in (choices := self.choices()):
            raise unknown(spelling(param).lstrip("-"), value, choices)
        return value


class Listed(Typed):
    """Values of one type, separated by commas."""

    def __init__(self, item: Typed) -> None:
        self.item = item
        self.expected = f"a list such as 1,8,64, each {item.expected}"

    def converted(self, value: Any, param: click.Parameter | None) -> Any:
        words = [word.strip() for word in value.split(",")]
        if "" in words:
            refuse(param, brief(value), self.expected)
        return [self.item.convert(word, param, None) for word in words]


class EngineName(Choice):
    """The name of an engine of this package, installed or not."""

    def choices(self) -> Sequence[str]:
        from fastgen.engines import engine_names

        return engine_names()


class Device(Typed):
    """The name of a device: cpu, cuda, cuda:1. Whether this machine has it is seen when it is opened."""

    expected = "cpu, cuda, cuda:1, ..."

    def converted(self, value: Any, param: click.Parameter | None) -> Any:
        return check_device(value, spelling(param))


class Location(Typed):
    """A text that may be a path, such as FOLDER or ID, whose names a file system takes. `new`: it is written."""

    name = "path"
    expected = "a path"

    def __init__(self, *, new: bool = False) -> None:
        self.longest = MAX_NEW_NAME if new else MAX_NAME

    def converted(self, value: Any, param: click.Parameter | None) -> Any:
        data = os.fsencode(value) if _encodable(value) else refuse(param, brief(value), "a path that can be encoded")
        if len(data) > MAX_PATH:
            refuse(param, f"a path of {len(data):,} bytes", f"at most {MAX_PATH:,}")
        longest = max(map(len, data.split(b"/")))
        if longest > self.longest:
            refuse(param, f"a path with a name of {longest:,} bytes", f"at most {self.longest}")
        return value


class FilePath(Location):
    """A Path on this machine."""

    def converted(self, value: Any, param: click.Parameter | None) -> Path:
        if is_url(value):
            help_text = "a path on this machine; `fastgen generate --out` alone takes a bucket"
            refuse(param, brief(without_secrets(value)), help_text)
        return Path(super().converted(value, param))


class Place(Location):
    """A Path on this machine, or the Url of a bucket."""

    def converted(self, value: Any, param: click.Parameter | None) -> Path | Url:
        return parse_place(super().converted(value, param), spelling(param))


class ModelPath(FilePath):
    """A folder, or the name of a model or evaluator that comes with fastgen; a folder of that name wins."""

    def converted(self, value: Any, param: click.Parameter | None) -> Path:
        from fastgen.models.find import find_folder

        return find_folder(super().converted(value, param))


def spelling(param: click.Parameter | None) -> str:
    """How a user types the parameter: `--out`, `REQUESTS.json`."""
    if isinstance(param, click.Option):
        return max(param.opts, key=len)
    return param.human_readable_name.strip("[].") if param is not None else "value"


def refuse(param: click.Parameter | None, found: str, expected: str) -> NoReturn:
    raise InputError(f"{spelling(param)}: found {one_line(found, 90)}, expected {expected}")


def _encodable(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


TEXT = Typed()
FOLDER = FilePath()
NEW = FilePath(new=True)
PLACE = Place(new=True)
PATH_OR_NAME = Location()
MODEL = ModelPath()
DEVICE = Device()
ENGINE = EngineName()
DTYPE = Choice("fp32", "bf16", "fp16", "int8", "fp8")
SEED = Whole(0, MAX_SEED)
EDGE = Whole(1, MAX_EDGE)
STEPS = Whole(1, MAX_STEPS)
STEP = Whole(0, MAX_STEPS)
IMAGES = Whole(1, MAX_IMAGES)
BATCH = Whole(1, 65_536)
SHARDS = Whole(1, 999_999)
BATCHES = Listed(BATCH)
THREADS = Whole(1, 1024)
COLUMNS = Whole(1, 1000)
NEIGHBOURS = Whole(1, MAX_IMAGES)
GUIDANCE = Number(0, 1000)
SHARE = Number(0, 1, above=True)
TYPES = (Typed, click.types.BoolParamType)  # of every parameter; a tuple's items too
