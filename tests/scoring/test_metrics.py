"""Label accuracy against the official protocol, written with torch as the i-CLEVR task states it, and against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen.errors import InputError
from fastgen.scoring.metrics import (
    Share,
    accuracy_by_count,
    accuracy_by_object,
    label_accuracy,
    label_hits,
    ratio_standard_error,
    standard_error,
)


def standard_error_over_images(scores, targets):
    return ratio_standard_error(label_hits(scores, targets).sum(axis=1), np.count_nonzero(targets, axis=1))


SCORES = np.array([[0.9, 0.1, 0.8, 0.2], [0.1, 0.7, 0.6, 0.5], [0.4, 0.3, 0.2, 0.1]])
TARGETS = np.array([[1, 1, 0, 0], [0, 1, 0, 0], [0, 1, 1, 1]])  # top k: {0, 2}, {1}, {0, 1, 2}


def official(scores, targets):
    """The protocol as it is stated: each row's top k, hits counted over the whole set, divided by the sum of all k."""
    import torch

    out, onehot = torch.from_numpy(scores), torch.from_numpy(targets)
    hits = total = 0
    for row, truth in zip(out, onehot, strict=True):
        k = int(truth.sum())
        total += k
        hits += len(set(row.topk(k).indices.tolist()) & set(truth.nonzero().flatten().tolist()))
    return hits / total


def predicted(scores, targets):
    """Multi-hot of every row's top k, by torch."""
    import torch

    rows = torch.zeros(scores.shape, dtype=torch.int64)
    for i, k in enumerate(targets.sum(axis=1)):
        rows[i, torch.from_numpy(scores[i]).topk(int(k)).indices] = 1
    return rows.numpy()


@st.composite
def sets(draw):
    """Scores without ties in a row (torch leaves their order open) and targets with at least one label."""
    n, k = draw(st.integers(1, 12)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scores = rng.permuted(np.tile(np.linspace(0, 1, k), (n, 1)), axis=1)
    targets = (rng.random((n, k)) < draw(st.floats(0.05, 0.95))).astype(np.int64)
    targets[draw(st.integers(0, n - 1)), draw(st.integers(0, k - 1))] = 1
    return scores, targets


def test_accuracy_of_three_rows_worked_out_by_hand():
    # row 0: one of two, row 1: one of one, row 2: two of three
    assert label_hits(SCORES, TARGETS).sum(axis=1).tolist() == [1, 1, 2]
    assert label_accuracy(SCORES, TARGETS) == pytest.approx(4 / 6)


def test_an_image_weighs_as_much_as_it_has_objects():
    scores, targets = np.array([[0.9, 0.8, 0.7, 0.1], [0.9, 0.1, 0.2, 0.3]]), np.array([[1, 1, 1, 0], [0, 1, 0, 0]])
    assert label_accuracy(scores, targets) == 3 / 4  # the mean of the rows' accuracies would be 1 / 2


@given(sets())
@settings(max_examples=150, deadline=None)
def test_accuracy_equals_the_official_protocol(case):
    assert label_accuracy(*case) == official(*case)


@given(sets())
@settings(max_examples=60, deadline=None)
def test_breakdowns_equal_the_official_protocol_on_each_part(case):
    scores, targets = case
    by_count = accuracy_by_count(scores, targets)
    counts = targets.sum(axis=1)
    assert list(by_count) == sorted(set(counts[counts > 0].tolist()))
    for k, share in by_count.items():
        assert share.accuracy == official(scores[counts == k], targets[counts == k])
    hits = predicted(scores, targets) & targets
    assert [s.hits for s in accuracy_by_object(scores, targets)] == hits.sum(axis=0).tolist()
    assert [s.total for s in accuracy_by_object(scores, targets)] == targets.sum(axis=0).tolist()


def test_breakdowns_worked_out_by_hand():
    assert accuracy_by_count(SCORES, TARGETS) == {1: Share(1, 1), 2: Share(1, 2), 3: Share(2, 3)}
    assert accuracy_by_object(SCORES, TARGETS) == [Share(1, 1), Share(2, 3), Share(1, 1), Share(0, 1)]


def test_rows_without_a_label_count_for_nothing():
    scores, targets = np.vstack([SCORES, SCORES]), np.vstack([TARGETS, np.zeros_like(TARGETS)])
    assert label_accuracy(scores, targets) == label_accuracy(SCORES, TARGETS)
    assert accuracy_by_count(scores, targets) == accuracy_by_count(SCORES, TARGETS)


def test_among_equal_scores_the_lower_index_ranks_first():
    assert label_hits(np.ones((24, 24)), np.eye(24)).sum(axis=1).tolist() == [1] + [0] * 23


def test_the_accuracy_of_an_object_nobody_asked_for_is_undefined():
    assert math.isnan(Share(0, 0).accuracy)


@pytest.mark.parametrize(
    ("scores", "targets", "message"),
    [
        (np.zeros((2, 3)), np.ones((2, 4)), r"scores \(2, 3\) and targets \(2, 4\)"),
        (np.zeros(3), np.ones(3), "two arrays of one shape"),
        (np.array([[0.5, np.nan], [0.1, 0.2]]), np.ones((2, 2)), "1 rows hold NaN"),
        (np.zeros((1, 2)), np.array([[0.5, 1.0]]), "multi-hot of 0 and 1"),
        (np.zeros((2, 2)), np.zeros((2, 2)), "2 rows without a single true label"),
    ],
)
def test_what_cannot_be_scored_is_refused(scores, targets, message):
    with pytest.raises(InputError, match=message):
        label_accuracy(scores, targets)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=20))
@settings(deadline=None)
def test_standard_error_over_seeds_equals_scipy(values):
    from scipy.stats import sem

    assert standard_error(values) == pytest.approx(float(sem(values)), abs=1e-12)


def test_a_standard_error_of_one_value_is_undefined():
    assert math.isnan(standard_error([0.5]))
    assert math.isnan(standard_error_over_images(SCORES[:1], TARGETS[:1]))


def test_standard_error_over_images_agrees_with_scipys_bootstrap_over_images():
    from scipy.stats import bootstrap

    rng = np.random.default_rng(0)
    targets = np.zeros((200, 24), np.int64)
    for row, k in zip(targets, rng.integers(1, 4, 200), strict=True):
        row[rng.choice(24, k, replace=False)] = 1
    scores = rng.random(targets.shape) + 0.6 * targets
    hits, k = label_hits(scores, targets).sum(axis=1), targets.sum(axis=1)
    drawn = bootstrap(
        (hits, k), lambda h, t, axis: h.sum(axis) / t.sum(axis), paired=True, n_resamples=4000, rng=1, method="basic"
    )
    assert standard_error_over_images(scores, targets) == pytest.approx(float(drawn.standard_error), rel=0.05)


def test_standard_error_over_images_with_one_object_each_is_the_binomial_one():
    scores, targets = np.tile([0.9, 0.1], (10, 1)), np.eye(2, dtype=int)[[0] * 7 + [1] * 3]
    assert standard_error_over_images(scores, targets) == pytest.approx(math.sqrt(0.7 * 0.3 / 9))
