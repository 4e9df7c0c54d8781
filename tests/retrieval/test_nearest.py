"""Exact search by cosine, against brute force."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen.errors import InputError
from fastgen.retrieval.nearest import nearest_rows, unit


def vectors(rng, count, width):
    return unit(rng.standard_normal((count, width)), "vector")


def brute_force(rows, queries, k):
    """By torch in float64; a stable sort keeps the lower index first."""
    torch = pytest.importorskip("torch")
    similarities = torch.from_numpy(queries).double() @ torch.from_numpy(rows).double().T
    values, indices = similarities.sort(dim=1, descending=True, stable=True)
    return indices[:, :k].numpy(), values[:, :k].numpy()


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 700), st.integers(1, 24), st.integers(1, 9), st.integers(1, 40), st.integers(0, 99))
def test_the_nearest_rows_are_those_of_brute_force(count, width, asked, k, seed):
    rng = np.random.default_rng(seed)
    rows, queries, k = vectors(rng, count, width), vectors(rng, asked, width), min(k, count)
    indices, values = brute_force(rows, queries, k)
    for (found, similarities), expected, cosines in zip(nearest_rows(rows, queries, k), indices, values, strict=True):
        np.testing.assert_allclose(similarities, cosines, atol=1e-12)
        if width > 1:  # in one dimension everything is equal up to the last digit
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("k", [1, 3, 500])
def test_equal_rows_come_in_their_order_wherever_they_stand(k):
    rng = np.random.default_rng(0)
    rows = vectors(rng, 5000, 32)
    copies = np.sort(rng.choice(5000, 600, replace=False))
    rows[copies] = rows[copies[0]]
    ((found, similarities),) = nearest_rows(rows, rows[copies[:1]], k)
    np.testing.assert_array_equal(found, copies[:k])
    assert len(set(similarities.tolist())) == 1


def test_what_is_found_depends_on_the_query_alone():
    rng = np.random.default_rng(1)
    rows, queries = vectors(rng, 3000, 64), vectors(rng, 70, 64)
    together = nearest_rows(rows, queries, 4)
    for query, (found, similarities) in zip(queries, together, strict=True):
        ((alone, values),) = nearest_rows(rows, query[None], 4)
        np.testing.assert_array_equal(alone, found)
        np.testing.assert_array_equal(values, similarities)


def test_many_queries_are_searched_in_parts(monkeypatch):
    rng = np.random.default_rng(2)
    rows, queries = vectors(rng, 300, 8), vectors(rng, 50, 8)
    whole = nearest_rows(rows, queries, 2)
    monkeypatch.setattr("fastgen.retrieval.nearest.SIMILARITIES", 900)
    for (a, b), (c, d) in zip(whole, nearest_rows(rows, queries, 2), strict=True):
        np.testing.assert_array_equal(a, c)
        np.testing.assert_array_equal(b, d)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_a_vector_without_a_direction_is_an_input_error(value):
    values = np.ones((3, 4), np.float32)
    values[1] = value
    with pytest.raises(InputError, match=r"state of text 1 is zero or not finite"):
        unit(values, "text")


def test_64_queries_among_43294_distinct_rows_take_little_time():
    """About 43 ms on one core of an AMD EPYC; the bound is generous, for machines that do other things too."""
    rng = np.random.default_rng(3)
    rows, queries = vectors(rng, 43_294, 512), vectors(rng, 64, 512)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        nearest_rows(rows, queries, 1)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.6
