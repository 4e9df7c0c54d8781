"""Exact nearest neighbours by cosine. One matrix product with all rows selects candidates, which are then compared in float64:
the result depends on the query alone, not on the other queries or on the order in which a library sums."""

from __future__ import annotations

import numpy as np

from fastgen.errors import InputError

SIMILARITIES = 2**23  # in memory at a time: 32 MiB of float32
GROUP = 64  # rows; of each group only the largest similarity is compared first
SLACK = 1e-5  # larger than the error of float32 sums of products of unit vectors


def nearest_rows(rows: np.ndarray, queries: np.ndarray, k: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each unit vector of `queries` (Q, D) the k nearest of `rows` (T, D), unit vectors too, by cosine: (indices (k,),
    similarities (k,) float64), best first, the lower index first where they are equal. Exact."""
    results = []
    at_once = max(1, SIMILARITIES // len(rows))
    for start in range(0, len(queries), at_once):
        part = queries[start : start + at_once]
        similarities = rows @ part.T  # (T, q)
        places = np.flatnonzero(similarities >= _lower_bounds(similarities, k) - SLACK)  # much quicker than nonzero
        indices, columns = np.divmod(places, len(part))
        order = np.argsort(columns, kind="stable")
        by_query = np.split(indices[order], np.searchsorted(columns[order], np.arange(1, len(part))))
        for query, candidates in zip(part, by_query, strict=True):
            exact = np.concatenate([_cosines(rows[c], query) for c in _pieces(candidates)])
            best = np.argsort(-exact, kind="stable")[:k]
            results.append((candidates[best], exact[best]))
    return results


def _lower_bounds(values: np.ndarray, k: int) -> np.ndarray:
    """(q,): a bound for each column of `values` (T, q) that at least k of its values reach: the k-th largest of the maxima of
    groups of rows, which is close to the k-th largest value, and much quicker to compute."""
    groups = len(values) // GROUP
    if groups < 2 * k:
        return np.partition(values, len(values) - k, axis=0)[len(values) - k]
    maxima = values[: groups * GROUP].reshape(groups, GROUP, -1).max(axis=1)  # (groups, q)
    return np.partition(maxima, groups - k, axis=0)[groups - k]


def _cosines(rows: np.ndarray, query: np.ndarray) -> np.ndarray:
    """In float64 and row by row, so that a row's result does not depend on the other rows."""
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
