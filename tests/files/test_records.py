"""Records: what is refused, and that the message names field, value and bounds."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from fastgen.errors import InputError
from fastgen.files.records import Count, Edge, Name, Record, Sha256, Steps, builtins, read_record, to_record


class Inner(Record):
    steps: Steps
    edges: tuple[Edge, ...] = ()

    def __post_init__(self) -> None:
        if self.steps == 13:
            raise InputError("steps = 13: expected another number")
        if self.steps == 14:
            raise ValueError("14 is refused too")


class Outer(Record):
    named: dict[str, Inner]
    space: Literal["latents", "pixels"] = "pixels"
    count: Count | None = None
    inner: Inner | None = None
    compile: bool | Literal["auto"] = False
    sha256: Sha256 = "a" * 64
    pairs: tuple[tuple[Name, Inner], ...] = ()
    names: dict[Name, Count] | None = None


INNER = {"steps": 1}


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ([], "found [], expected an object"),
        ({}, "named is missing"),
        ({"named": {"a": INNER, "b": {"steps": 0}}}, "named['b'].steps: found 0, expected a whole number from 1 to"),
        ({"named": {"b": {"steps": 1.5}}}, "named['b'].steps: found 1.5, expected a whole number"),
        ({"named": {"b": {"steps": True}}}, "named['b'].steps: found True, expected a whole number"),
        ({"named": {"b": {}}}, "named['b'].steps is missing"),
        ({"named": {"b": {"steps": 1, "edge": []}}}, "named['b']: unknown field 'edge'; did you mean 'edges'?"),
        ({"named": {"b": {"steps": 1, "edges": [1, "q"]}}}, "named['b'].edges[1]: found 'q', expected a whole number"),
        ({"named": {"b": {"steps": 13}}}, "steps = 13: expected another number"),
        ({"named": {"b": {"steps": 14}}}, "named['b']: 14 is refused too"),
        ({"named": {}, "inner": {"steps": 10**9}}, "inner.steps: found 1000000000, expected a whole number from 1 to"),
        ({"named": {}, "space": "latent"}, "space: found 'latent', expected latents, pixels; did you mean 'latents'?"),
        ({"named": {}, "compile": "never"}, "compile: found 'never', expected true or false or auto"),
        ({"named": {}, "count": -1}, "count: found -1, expected a whole number from 0 to"),
        ({"named": {}, "sha256": "A" * 64}, "expected a SHA-256 in hexadecimal"),
        ({"named": {}, "pairs": [["x", INNER], ["", INNER]]}, "pairs[1][0]: found '', expected text of 1 to 1000"),
        ({"named": {}, "pairs": [["x"]]}, "pairs[0]: found ['x'], expected a list of 2"),
        ({"named": {}, "names": {"": 1}}, "names: found a key that is refused, expected text of 1 to 1000 characters"),
        ({"named": {}, "spaces": 1}, "unknown field 'spaces'; did you mean 'space'?"),
    ],
)
def test_a_refusal_names_field_value_and_bounds(value: Any, problem: str):
    with pytest.raises(InputError) as error:
        to_record(value, Outer, "FILE.json")
    assert str(error.value).startswith(f"FILE.json: {problem}") or problem in str(error.value)


def test_a_record_is_what_it_was_read_from(tmp_path):
    value = {"named": {"b": {"steps": 7, "edges": [1, 2]}}, "compile": "auto", "count": 5}
    record = to_record(value, Outer)
    assert record.named["b"].edges == (1, 2)
    assert to_record(builtins(record), Outer) == record
    (tmp_path / "r.json").write_text('{"named": {"b": {"steps": 1e400}}}')
    with pytest.raises(InputError, match="too large for a float"):
        read_record(tmp_path / "r.json", Outer)


def test_the_place_and_the_name_of_the_whole_come_first():
    with pytest.raises(InputError, match=r"^p\.toml: unet\.train\.steps: found 0"):
        to_record({"steps": 0}, Inner, "p.toml", "unet.train")
