"""Comparing two runs: the interval covers 0 for one distribution, leaves it out for two, and has the width theory gives."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchmetrics")

from fastgen.errors import InputError  # noqa: E402
from fastgen.scoring import compare  # noqa: E402
from fastgen.scoring.distances import Frechet, Kernel  # noqa: E402
from fastgen.scoring.reference_set import Statistics  # noqa: E402
from fastgen.scoring.result import BETTER, Score, figure  # noqa: E402
from fastgen.scoring.samples import Mean, Ratio  # noqa: E402

REFERENCE = Statistics.of(np.random.default_rng(7).normal(size=(1000, 6)).astype(np.float32))


def run(names=None, saving="clamp", **samples):
    """A Score of given samples: {metric: [a sample for each seed]}."""
    n = len(next(iter(next(iter(samples.values()))[0].__dict__.values())))
    return Score(
        requests=None,
        evaluator=None,
        num_images=n,
        metrics={key: figure(key, key, found, range(len(found))) for key, found in samples.items()},
        by_count={},
        by_object={},
        reference=None,
        clip=None,
        resized={},
        saving=saving,
        made_by={},
        warnings=(),
        names=names or tuple(map(str, range(n))),
        samples={key: tuple(found) for key, found in samples.items()},
    )


def draw(kind, seed, n=80, shift=0.0):
    rng = np.random.default_rng(seed)
    if kind is Mean:
        return Mean(rng.normal(0.3 + shift, 0.1, size=n))
    if kind is Ratio:
        wholes = rng.integers(1, 4, size=n)
        return Ratio(rng.binomial(wholes, 0.4 + shift), wholes)
    return kind((rng.normal(size=(n, 6)) + shift).astype(np.float32), REFERENCE)


KINDS = [("clip_t", Mean, 0.08), ("label_accuracy", Ratio, 0.4), ("fid", Frechet, 0.7), ("kid", Kernel, 0.7)]


@pytest.mark.parametrize(("key", "kind", "shift"), KINDS)
def test_a_clear_difference_is_found_and_the_better_run_named(key, kind, shift):
    a, b = run(**{key: [draw(kind, 1)]}), run(**{key: [draw(kind, 2, shift=shift)]})
    found = compare(a, b).metrics[key]
    assert found.excludes_zero
    assert found.low < found.value < found.high
    assert found.verdict == ("B" if BETTER[key] == "higher" else "A")
    back = compare(b, a).metrics[key]
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low))
    assert back.verdict == ("A" if BETTER[key] == "higher" else "B")


@pytest.mark.parametrize(("key", "kind", "shift"), KINDS)
def test_two_runs_of_one_distribution_differ_by_chance_alone_in_most_cases(key, kind, shift):
    """95% intervals: of 24, at most 4 miss (probability 0.6% of more); none missing would pass too."""
    runs = [run(**{key: [draw(kind, seed)]}) for seed in range(48)]
    missed = sum(compare(a, b).metrics[key].excludes_zero for a, b in zip(runs[::2], runs[1::2], strict=True))
    assert missed <= 4


@pytest.mark.parametrize(("key", "kind", "shift"), KINDS)
def test_a_run_against_itself_differs_by_exactly_0(key, kind, shift):
    a = run(**{key: [draw(kind, 1), draw(kind, 2)]})
    found = compare(a, a).metrics[key]
    assert (found.value, found.low, found.high, found.verdict) == (0, 0, 0, "undecided")


def test_pairing_removes_what_the_requests_share():
    """b = a + 0.01 + small noise: the interval is that of the differences, far narrower than of two independent means."""
    rng = np.random.default_rng(0)
    a = rng.normal(0.3, 0.1, size=200)
    b = a + 0.01 + rng.normal(0, 0.01, size=200)
    paired = compare(run(clip_t=[Mean(b)]), run(clip_t=[Mean(a)]))
    found = paired.metrics["clip_t"]
    assert paired.paired
    assert found.high - found.value == pytest.approx(1.96 * np.std(b - a, ddof=1) / np.sqrt(200), rel=0.1)
    assert found.verdict == "A"
    others = compare(run(clip_t=[Mean(b)], names=tuple("x" * 200)), run(clip_t=[Mean(a)]))
    wide = others.metrics["clip_t"]
    assert not others.paired
    assert wide.high - wide.value == pytest.approx(1.96 * np.sqrt(2) * np.std(a, ddof=1) / np.sqrt(200), rel=0.1)


def test_seeds_are_averaged():
    """Two independent seeds: the interval of their mean is narrower by the square root of 2."""
    one = compare(run(clip_t=[draw(Mean, 1)]), run(clip_t=[draw(Mean, 2)])).metrics["clip_t"]
    two = compare(run(clip_t=[draw(Mean, 1), draw(Mean, 3)]), run(clip_t=[draw(Mean, 2), draw(Mean, 4)])).metrics[
        "clip_t"
    ]
    assert (two.high - two.low) / (one.high - one.low) == pytest.approx(0.5**0.5, rel=0.15)
    assert two.a == pytest.approx((draw(Mean, 1).value + draw(Mean, 3).value) / 2)


def test_the_result_is_the_same_every_time_and_says_how_it_was_found():
    a, b = run(fid=[draw(Frechet, 1)], clip_t=[draw(Mean, 1)]), run(fid=[draw(Frechet, 2)], clip_t=[draw(Mean, 2)])
    again = run(fid=[draw(Frechet, 1)], clip_t=[draw(Mean, 1)])
    assert compare(a, b).to_json() == compare(again, b).to_json()
    assert compare(a, b).to_json()["method"] == "paired bootstrap over images, seeds averaged, normal interval"
    assert compare(a, b).to_json()["metrics"]["fid"]["resamples"] == 200
    assert compare(a, b).table().endswith("resamples: fid 200, clip_t 1000")


def test_runs_measured_differently_are_not_compared():
    a, b = run(clip_t=[draw(Mean, 1)]), run(label_accuracy=[draw(Ratio, 1)])
    with pytest.raises(InputError, match="no metric in common"):
        compare(a, b)
    with pytest.raises(InputError, match="clip_t: measured with different networks or references"):
        compare(a, replace(a, reference={"path": "elsewhere"}))


def test_a_difference_in_saving_is_said():
    a, b = run(clip_t=[draw(Mean, 1)]), run(clip_t=[draw(Mean, 1)], saving="min-max")
    assert compare(a, b).warnings == (
        "the runs were saved differently (clamp and min-max), which changes scores by itself",
    )
