"""FID against scipy's matrix square root, KID against an MMD written out in NumPy, both against known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchmetrics")
linalg = pytest.importorskip("scipy.linalg")
torch.set_num_threads(1)

from fastgen.scoring.distances import Frechet, Kernel, frechet_distance, kernel_distance  # noqa: E402
from fastgen.scoring.reference_set import Statistics  # noqa: E402
from fastgen.scoring.samples import resample_counts  # noqa: E402


def gaussian(n, d=12, seed=0, shift=0.0):
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(d, d))
    return (rng.normal(size=(n, d)) @ mixing + shift).astype(np.float32)


def by_scipy(x, y):
    x, y = x.astype(np.float64), y.astype(np.float64)
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    shift = x.mean(axis=0) - y.mean(axis=0)
    return shift @ shift + np.trace(a) + np.trace(b) - 2 * np.trace(linalg.sqrtm(a @ b)).real


def mmd(x, y):
    """The unbiased estimate, sum by sum (Binkowski et al. 2018, equation 4)."""
    d, x, y = x.shape[1], x.astype(np.float64), y.astype(np.float64)
    k = lambda a, b: (float(a @ b) / d + 1) ** 3  # noqa: E731
    xx = [k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j]
    yy = [k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j]
    return np.mean(xx) + np.mean(yy) - 2 * np.mean([k(a, b) for a in x for b in y])


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_frechet_distance_is_scipy_s(seed):
    x, y = gaussian(60, seed=seed, shift=0.3), gaussian(90, seed=seed + 10)
    assert frechet_distance(x, Statistics.of(y)) == pytest.approx(by_scipy(x, y), rel=1e-9)


def test_it_is_scipy_s_with_fewer_images_than_features():
    x, y = gaussian(10, d=40, seed=1), gaussian(200, d=40, seed=2)
    assert frechet_distance(x, Statistics.of(y)) == pytest.approx(by_scipy(x, y), rel=1e-5)


def test_float64_survives_features_far_from_zero():
    x, y = gaussian(60, seed=1, shift=1000.0), gaussian(90, seed=2, shift=1000.0)
    assert frechet_distance(x, Statistics.of(y)) == pytest.approx(by_scipy(x, y), rel=1e-5)


def test_identical_sets_have_distance_0():
    x = gaussian(300)
    assert frechet_distance(x, Statistics.of(x)) == pytest.approx(0, abs=1e-3)


def test_identical_sets_of_fewer_images_than_features_have_distance_0_up_to_a_millionth_of_their_variance():
    few = Statistics.of(gaussian(16, d=512))
    assert abs(frechet_distance(few.features, few)) < 1e-6 * np.trace(few.covariance)


def test_a_shifted_set_has_the_squared_length_of_the_shift():
    x = gaussian(300).astype(np.float64)
    shift = np.linspace(-1, 2, 12)
    assert frechet_distance(x + shift, Statistics.of(x)) == pytest.approx(shift @ shift, rel=1e-6)


def test_two_gaussians_of_known_moments():
    """N(0, 1) and N(3, 2^2) in each of four independent dimensions: 4 (9 + (2 - 1)^2)."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200_000, 4)), 3 + 2 * rng.normal(size=(200_000, 4))
    assert frechet_distance(y, Statistics.of(x)) == pytest.approx(40, rel=0.01)


def test_the_kernel_distance_of_equally_many_images_is_the_unbiased_mmd():
    x, y = gaussian(15, seed=1), gaussian(15, seed=2)
    assert kernel_distance(x, y) == pytest.approx(mmd(x, y), rel=1e-9)


def test_the_kernel_distance_of_unequal_sets_is_that_of_subsets_and_agrees_with_the_whole():
    x, y = gaussian(40, seed=1, shift=1.0), gaussian(400, seed=2)
    found, state = kernel_distance(x, y), torch.random.get_rng_state()
    assert found == pytest.approx(mmd(x, y), rel=0.05)
    assert kernel_distance(x, y) == found
    assert torch.equal(torch.random.get_rng_state(), state)


def test_frechet_replicates_are_distances_of_resampled_images():
    for n, d in ((30, 12), (10, 40)):  # more images than features, and fewer
        x, y = gaussian(n, d, seed=1), gaussian(300, d, seed=2)
        sample = Frechet(x, Statistics.of(y))
        assert len(sample.replicates) == 200
        for row in (0, 7, 199):
            drawn = np.repeat(x, resample_counts(n)[row], axis=0)
            assert len(drawn) == n
            assert sample.replicates[row] == pytest.approx(by_scipy(drawn, y), rel=1e-4)
        assert sample.standard_error == pytest.approx(np.std(sample.replicates, ddof=1))
        assert sample.method == "bootstrap, 200 resamples"


def test_resamples_of_fid_are_fewer_where_each_is_expensive():
    features = np.zeros((3000, 2048), np.float32)
    sample = Frechet(features, Statistics(features, np.zeros(1), np.zeros(1)))
    assert sample.method == "bootstrap, 20 resamples"


def test_kernel_replicates_leave_out_pairs_of_copies():
    x, y = gaussian(12, seed=1), gaussian(50, seed=2)
    sample, counts = Kernel(x, Statistics.of(y)), resample_counts(12)
    constant = mmd(x[:2], y) - mmd_without_reference(x[:2], y)
    for row in (0, 3):
        drawn = [i for i, count in enumerate(counts[row]) for _ in range(count)]
        k = lambda a, b: (float(a.astype(np.float64) @ b) / 12 + 1) ** 3  # noqa: E731
        within = np.mean([k(x[i], x[j]) for i in drawn for j in drawn if i != j])
        across = np.mean([k(x[i], b) for i in drawn for b in y])
        assert sample.replicates[row] == pytest.approx(within - 2 * across, rel=1e-6)
    assert np.mean(sample.replicates) + constant == pytest.approx(mmd(x, y), abs=3 * sample.standard_error)


def mmd_without_reference(x, y):
    d = x.shape[1]
    k = lambda a, b: (float(a.astype(np.float64) @ b) / d + 1) ** 3  # noqa: E731
    return k(x[0], x[1]) - 2 * np.mean([k(a, b) for a in x for b in y])


@pytest.mark.parametrize(("kind", "factor"), [(Frechet, 1.6), (Kernel, 1.6)])
def test_the_standard_error_is_the_spread_over_independent_sets(kind, factor):
    reference = Statistics.of(gaussian(2000, d=6, seed=5))
    samples = [kind(gaussian(100, d=6, seed=seed, shift=0.5), reference) for seed in range(100, 140)]
    true = np.std([sample.value for sample in samples], ddof=1)
    found = np.mean([sample.standard_error for sample in samples[:5]])
    assert true / factor < found < true * factor


def test_statistics_are_numpy_s_moments():
    x = gaussian(100)
    found = Statistics.of(x)
    np.testing.assert_allclose(found.mean, x.astype(np.float64).mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-9)
    np.testing.assert_allclose(found.root @ found.root, found.covariance, atol=1e-9)
    assert math.isclose(float(np.trace(found.products)), float((x.astype(np.float64) ** 2).sum()))
