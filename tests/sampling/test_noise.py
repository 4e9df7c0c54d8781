import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fastgen.errors import InputError
from fastgen.sampling.noise import normal, philox4x32, seed_array

ONES = 0xFFFFFFFF
# Random123's kat_vectors: counter, key, output of philox4x32-10
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
seeds_63_bit = st.integers(0, 2**63 - 1)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(library, counter, key, expected):
    def words(values):
        arrays = [np.array([value], dtype=np.int64) for value in values]
        return tuple(map(torch.from_numpy, arrays)) if library == "torch" else tuple(arrays)

    assert tuple(int(word[0]) for word in philox4x32(words(counter), words(key))) == expected


def scalar_normals(seed: int, stream: int, block: int) -> list[float]:
    """The documented layout once more, in Python integers and math's functions."""
    c = [block & ONES, block >> 32, stream & ONES, stream >> 32]
    k = [seed & ONES, seed >> 32]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & ONES, (p0 >> 32) ^ c[3] ^ k[1], p0 & ONES]
        k = [(k[0] + 0x9E3779B9) & ONES, (k[1] + 0xBB67AE85) & ONES]
    out = []
    for radius_word, angle_word in ((c[0], c[1]), (c[2], c[3])):
        radius = math.sqrt(-2 * math.log((radius_word + 0.5) / 2**32))
        angle = 2 * math.pi * angle_word / 2**32
        out += [radius * math.cos(angle), radius * math.sin(angle)]
    return out


@settings(deadline=None, max_examples=50)
@given(seed=seeds_63_bit, stream=st.integers(0, 2**40), elements=st.integers(1, 21))
def test_layout_is_as_documented(seed, stream, elements):
    expected = [value for block in range(6) for value in scalar_normals(seed, stream, block)][:elements]
    assert normal([seed], stream, (elements,))[0] == pytest.approx(expected, abs=3e-6)


@settings(deadline=None, max_examples=30)
@given(seeds=st.lists(seeds_63_bit, min_size=1, max_size=4), stream=st.integers(0, 3000))
def test_numpy_and_torch_agree(seeds, stream):
    here, there = normal(seeds, stream, (3, 16, 16)), normal(seeds, stream, (3, 16, 16), xp=torch)
    assert here.shape == there.shape == (len(seeds), 3, 16, 16)
    assert here.dtype == np.float32
    assert there.dtype == torch.float32
    assert np.abs(here - there.numpy()).max() <= 1e-6


def test_an_image_has_its_noise_whatever_its_batch():
    seeds = [0, 1, 2**63 - 1, 12345, 2**32]
    together = normal(seeds, 3, (4, 8, 8))
    for position, seed in enumerate(seeds):
        np.testing.assert_array_equal(normal([seed], 3, (4, 8, 8))[0], together[position])


@settings(deadline=None, max_examples=25)
@given(length=st.integers(1, 40), longer=st.integers(0, 40))
def test_longer_noise_begins_with_the_shorter(length, longer):
    np.testing.assert_array_equal(normal([7], 1, (length + longer,))[0, :length], normal([7], 1, (length,))[0])


def test_seeds_and_stream_may_be_arrays_and_streams_may_differ_per_image():
    seeds = [5, 6, 2**40]
    expected = normal(seeds, 9, (3, 4, 4), xp=torch)
    array = torch.tensor(seeds)
    assert torch.equal(normal(array, torch.tensor(9), (3, 4, 4)), expected)
    mixed = normal(array, torch.tensor([9, 2, 9]), (3, 4, 4))
    assert torch.equal(mixed[[0, 2]], expected[[0, 2]])
    assert torch.equal(mixed[1], normal([6], 2, (3, 4, 4), xp=torch)[0])
    assert array.tolist() == seeds


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_out_of_range_is_an_input_error(seed):
    with pytest.raises(InputError, match=r"seed 1 is .*expected an integer from 0 to 2\^63 - 1"):
        normal([3, seed], 0, (4,))


def test_seed_array_keeps_63_bits():
    assert seed_array([2**63 - 1, 0]).tolist() == [2**63 - 1, 0]


@pytest.mark.parametrize(("seeds", "stream"), [(range(64), 0), ([11], 5), ([2**62 + 1], 2**33)])
def test_values_are_standard_normal(seeds, stream):
    values = normal(seeds, stream, (200_000 // len(seeds),)).ravel()
    assert stats.kstest(values, "norm").pvalue > 1e-3
    assert abs(values.mean()) < 4 / math.sqrt(values.size)
    assert abs(values.var() - 1) < 4 * math.sqrt(2 / values.size)
    assert np.isfinite(values).all()
    assert 4 < np.abs(values).max() < 7


def test_neighbouring_seeds_streams_and_elements_are_uncorrelated():
    count = 50_000
    base = normal([100], 7, (count,))[0]
    others = [normal([101], 7, (count,))[0], normal([100], 8, (count,))[0], normal([100 + 2**32], 7, (count,))[0]]
    others += [np.roll(base, shift) for shift in (1, 2, 3, 4)]
    for other in others:
        assert abs(np.corrcoef(base, other)[0, 1]) < 4.5 / math.sqrt(count)
        assert abs(np.corrcoef(base**2, other**2)[0, 1]) < 4.5 / math.sqrt(count)
