"""How many images run together: a job cut into batches of few sizes, with little padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from fastgen.errors import InputError

MAX_WASTE = 0.03  # of a job's rows may be padding


class Batch(NamedTuple):
    """Requests start..stop-1 of a job, run as a batch of `bucket` >= stop - start rows."""

    start: int
    stop: int
    bucket: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)

    def __len__(self) -> int:
        return self.stop - self.start


def cut(count: int, limit: int, sizes: Sequence[int] | None = None) -> list[Batch]:
    """Batches of at most `limit` rows that cover `count` requests in order, the larger ones first.

    `sizes` None, or all sizes from 1 to a largest one: as few batches as possible. They have one size, the last one padded,
    if that wastes at most 3% of the rows; else two sizes that differ by one. Other `sizes` (engines compiled per batch size):
    the largest up to `limit` as often as it can be filled; the rest takes the fewest batches that waste at most 3% of the job,
    or if there are none, those with the least waste. Raises InputError when `limit` is below 1 or below all sizes.
    """
    if limit < 1:
        raise InputError(f"batch_size is {limit}, expected at least 1")
    if count == 0:
        return []
    if sizes is not None and set(sizes) == set(range(1, max(sizes) + 1)):
        limit, sizes = min(limit, max(sizes)), None
    buckets = _even(count, limit) if sizes is None else _fixed(count, limit, sizes)
    batches, start = [], 0
    for bucket in buckets:
        batches.append(Batch(start, min(start + bucket, count), bucket))
        start += bucket
    return batches


def even_size(count: int, limit: int) -> int:
    """The smallest batch size that covers `count` rows in as few batches as `limit` allows."""
    return math.ceil(count / math.ceil(count / limit))


def waste(batches: Sequence[Batch]) -> float:
    """The share of rows that are padding."""
    rows = sum(batch.bucket for batch in batches)
    return 1 - sum(len(batch) for batch in batches) / rows if rows else 0.0


def halved(batch: Batch, sizes: Sequence[int] | None = None) -> list[Batch]:
    """The same requests in batches of at most half the size, rounded up. Raises InputError when there is no smaller size."""
    if batch.bucket == 1:
        raise InputError("batch_size is 1 already")
    parts = cut(len(batch), math.ceil(batch.bucket / 2), sizes)
    return [Batch(batch.start + part.start, batch.start + part.stop, part.bucket) for part in parts]


def _even(count: int, limit: int) -> list[int]:
    batches = math.ceil(count / limit)
    size = even_size(count, limit)
    if batches * size - count <= MAX_WASTE * count:
        return [size] * batches
    larger = count - batches * (size - 1)
    return [size] * larger + [size - 1] * (batches - larger)


def _fixed(count: int, limit: int, sizes: Sequence[int]) -> list[int]:
    usable = sorted(size for size in sizes if size <= limit)
    if not usable:
        raise InputError(f"batch_size is {limit}; this engine was compiled for {', '.join(map(str, sorted(sizes)))}")
    largest = usable[-1]
    full, rest = divmod(count, largest)
    fewest: list[list[int] | None] = [[]]  # fewest[rows]: batches of exactly so many rows in all
    for rows in range(1, rest + largest + 1):
        options = [[*before, s] for s in usable if s <= rows and (before := fewest[rows - s]) is not None]
        fewest.append(min(options, key=len, default=None))
    covers = [cover for cover in fewest[rest:] if cover is not None]
    within = [cover for cover in covers if sum(cover) - rest <= MAX_WASTE * count]
    best = min(within, key=lambda cover: (len(cover), sum(cover))) if within else covers[0]
    return [largest] * full + sorted(best, reverse=True)
