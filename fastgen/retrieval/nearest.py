"""Exact nearest neighbours by cosine: one matrix product with all rows, and the candidates that it leaves are compared in
float64, so that what is found depends on the query alone, not on what else is asked or how a library sums."""

from __future__ import annotations

import numpy as np

from fastgen.errors import InputError

SIMILARITIES = 2**23  # held at a time: 32 MiB of float32
GROUP = 64  # rows of which only the largest is looked at first
SLACK = 1e-5  # more than float32 sums of products of unit vectors can be off


def nearest_rows(rows: np.ndarray, queries: np.ndarray, k: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each unit vector of `queries` (Q, D) the k nearest of `rows` (T, D), unit vectors too, by cosine: (indices (k,),
    similarities (k,) float64), best first, the lower index first where they are equal. Exact."""
    found = []
    at_once = max(1, SIMILARITIES // len(rows))
    for start in range(0, len(queries), at_once):
        part = queries[start : start + at_once]
        similarities = rows @ part.T  # (T, q)
        places = np.flatnonzero(similarities >= _lower_bounds(similarities, k) - SLACK)  # much quicker than nonzero
        reached, columns = np.divmod(places, len(part))
        order = np.argsort(columns, kind="stable")
        by_query = np.split(reached[order], np.searchsorted(columns[order], np.arange(1, len(part))))
        for query, candidates in zip(part, by_query, strict=True):
            exact = np.concatenate([_cosines(rows[c], query) for c in _pieces(candidates)])
            best = np.argsort(-exact, kind="stable")[:k]
            found.append((candidates[best], exact[best]))
    return found


def _lower_bounds(values: np.ndarray, k: int) -> np.ndarray:
    """(q,): a number that at least k of each column's values (T, q) reach: the k-th largest of the maxima of groups of rows,
    which is close to the k-th largest value, and much quicker to have."""
    groups = len(values) // GROUP
    if groups < 2 * k:
        return np.partition(values, len(values) - k, axis=0)[len(values) - k]
    maxima = values[: groups * GROUP].reshape(groups, GROUP, -1).max(axis=1)  # (groups, q)
    return np.partition(maxima, groups - k, axis=0)[groups - k]


def _cosines(rows: np.ndarray, query: np.ndarray) -> np.ndarray:
    """In float64 and row by row: the same numbers whatever else is compared."""
    return (rows.astype(np.float64) * query.astype(np.float64)).sum(axis=1)


def _pieces(candidates: np.ndarray, size: int = 4096) -> list[np.ndarray]:
    return [candidates[i : i + size] for i in range(0, len(candidates), size)]


def unit(vectors: np.ndarray, name: str) -> np.ndarray:
    """Vectors (N, D) scaled to unit length, float32. Raises InputError for values that are not finite, and for zeros."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    bad = np.flatnonzero(~np.isfinite(lengths[:, 0]) | (lengths[:, 0] == 0))
    if len(bad):
        raise InputError(f"the text encoder's state of {name} {bad[0]} is zero or not finite; try --dtype fp32")
    return np.ascontiguousarray(vectors / lengths, dtype=np.float32)
