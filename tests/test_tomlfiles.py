"""What is written as TOML is what Python's own parser reads back."""

from __future__ import annotations

import tomllib

from hypothesis import given
from hypothesis import strategies as st

from fastgen.tomlfiles import to_toml

TEXT = st.text(st.characters(exclude_categories=("Cs",)))
SCALARS = TEXT | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
LISTS = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=2))
TABLES = st.recursive(
    st.dictionaries(TEXT, SCALARS | st.lists(LISTS, max_size=3), min_size=1, max_size=4),
    lambda inner: st.dictionaries(TEXT, inner | SCALARS, min_size=1, max_size=3),
)


@given(TABLES)
def test_tomllib_reads_back_what_was_written(table):
    assert tomllib.loads(to_toml(table)) == table


def test_what_toml_cannot_say_is_left_out():
    assert to_toml({"a": None, "b": {}, "c": {"d": None, "e": 1}}) == "[c]\ne = 1\n"
