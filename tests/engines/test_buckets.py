"""Jobs are cut into few batch sizes with little padding, and every request runs once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgen.engines.batches import Batch, cut, halved, waste
from fastgen.errors import InputError


def check_cover(batches, count, limit):
    assert [i for b in batches for i in range(b.start, b.stop)] == list(range(count))
    assert all(len(b) >= 1 and len(b) <= b.bucket <= limit for b in batches)


@given(count=st.integers(1, 5000), limit=st.integers(1, 256))
def test_free_sizes_waste_at_most_3_percent_in_the_fewest_batches_of_at_most_two_sizes(count, limit):
    batches = cut(count, limit)
    check_cover(batches, count, limit)
    assert len(batches) == -(-count // limit)
    assert len({b.bucket for b in batches}) <= 2
    assert sum(b.bucket for b in batches) - count <= 0.03 * count


@given(
    count=st.integers(1, 3000), limit=st.integers(1, 128), sizes=st.lists(st.integers(1, 128), min_size=1, max_size=5)
)
def test_fixed_sizes_cover_the_job_with_sizes_that_exist(count, limit, sizes):
    if min(sizes) > limit:
        with pytest.raises(InputError, match="compiled for"):
            cut(count, limit, sizes)
        return
    batches = cut(count, limit, sizes)
    check_cover(batches, count, limit)
    assert {b.bucket for b in batches} <= set(sizes)
    if 1 in sizes:
        assert sum(b.bucket for b in batches) - count <= 0.03 * count


@pytest.mark.parametrize(
    ("count", "limit", "sizes", "buckets"),
    [
        (1063, 128, None, [119] * 9),
        (17, 16, None, [9, 8]),
        (32, 16, None, [16, 16]),
        (1063, 64, (1, 8, 64), [64] * 17),  # 2.3% of padding instead of five more batches
        (231, 64, (1, 8, 64), [64] * 3 + [8] * 5),  # one row of padding instead of seven batches of 1
        (65, 64, (1, 8, 64), [64, 1]),
        (7, 64, (8, 64), [8]),
        (1063, 256, (64, 128), [128] * 8 + [64]),
    ],
)
def test_known_cuts(count, limit, sizes, buckets):
    assert [b.bucket for b in cut(count, limit, sizes)] == buckets


def test_waste_is_the_share_of_padded_rows():
    assert waste(cut(1063, 128)) == pytest.approx(8 / 1071)
    assert waste([]) == 0.0


@given(start=st.integers(0, 100), length=st.integers(1, 64), padding=st.integers(0, 3))
def test_halving_keeps_every_request(start, length, padding):
    batch = Batch(start, start + length, length + padding)
    if batch.bucket == 1:
        with pytest.raises(InputError, match="1 already"):
            halved(batch)
        return
    parts = halved(batch)
    assert [i for b in parts for i in range(b.start, b.stop)] == list(range(start, start + length))
    assert max(b.bucket for b in parts) <= -(-batch.bucket // 2)


def test_halving_takes_sizes_that_exist():
    assert [b.bucket for b in halved(Batch(0, 64, 64), [1, 8, 64])] == [8] * 8
    with pytest.raises(InputError, match="compiled for 8"):
        halved(Batch(0, 8, 8), [8])


@pytest.mark.parametrize("limit", [0, -1])
def test_a_batch_size_below_one_is_refused(limit):
    with pytest.raises(InputError, match="expected at least 1"):
        cut(3, limit)
