"""All noise of the package: Gaussian, and a pure function of (image seed, stream, element), for any array library.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) maps a 64-bit key and a 128-bit
counter to four 32-bit words. Layout, words from least to most significant:

    key     (seed & 0xFFFFFFFF, seed >> 32)
    counter (block & 0xFFFFFFFF, block >> 32, stream & 0xFFFFFFFF, stream >> 32)

Block n of a stream holds the elements 4n .. 4n+3 of the image in C order: words 0 and 1 give elements 4n and 4n+1,
words 2 and 3 the other two, by Box-Muller: radius sqrt(-2 ln((w + 1/2) / 2^32)) from the first word of the pair, angle
2 pi w' / 2^32 from the second, cosine first. Stream 0 is the initial noise, 1 + i belongs to row i of the full
schedule. Hence an image's noise does not depend on its batch, and a longer image begins with a shorter one's noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import array_api_compat
import numpy

from fastgen.errors import InputError
from fastgen.sampling.arrays import array_namespace

Array = Any  # an array of any array-API library
WORD = 0xFFFFFFFF
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10


def normal(
    seeds: Sequence[int] | Array, stream: int | Array, shape: Sequence[int], xp: Any = numpy, device: Any = None
) -> Array:
    """Standard normal noise (B, *shape), float32: row j is a function of seeds[j], `stream` and the element alone.

    `seeds`: B integers in [0, 2^63), or an int64 array (B,), whose library and device then replace `xp` and `device`.
    `stream`: an integer in [0, 2^63), or an int64 array, 0-d or (B,), on the same device (no value is read on the host,
    so this can be captured in a CUDA graph). NumPy and torch differ by less than 1e-6. Raises InputError for a seed out
    of range.
    """
    seeds = seed_array(seeds, xp, device)
    xp, device = array_namespace(seeds), array_api_compat.device(seeds)
    elements = math.prod(shape)
    seeds = xp.reshape(seeds, (-1, 1))  # (B, 1)
    blocks = xp.arange(-(-elements // 4), dtype=xp.int64, device=device)  # (N,)
    if not isinstance(stream, int):
        stream = xp.reshape(stream, (-1, 1))  # (1, 1) or (B, 1)

    zeros = xp.zeros((seeds.shape[0], blocks.shape[0]), dtype=xp.int64, device=device)  # (B, N)
    counter = zeros + (blocks & WORD), zeros + (blocks >> 32), zeros + (stream & WORD), zeros + (stream >> 32)
    w0, w1, w2, w3 = philox4x32(counter, (seeds & WORD, seeds >> 32))
    values = xp.stack((*_box_muller(xp, w0, w1), *_box_muller(xp, w2, w3)), axis=-1)  # (B, N, 4)
    values = xp.reshape(values, (seeds.shape[0], 4 * blocks.shape[0]))
    return xp.reshape(values[:, :elements], (seeds.shape[0], *shape))


def seed_array(seeds: Sequence[int] | Array, xp: Any = numpy, device: Any = None) -> Array:
    """The seeds as an int64 array (B,) of `xp` on `device`; an array is returned as it is. Raises InputError."""
    if array_api_compat.is_array_api_obj(seeds):
        return seeds
    values = [int(seed) for seed in seeds]
    for position, seed in enumerate(values):
        if not 0 <= seed < 2**63:
            raise InputError(f"seed {position} is {seed}, expected an integer from 0 to 2^63 - 1")
    xp = array_namespace(xp.asarray(0))
    return xp.asarray(values, dtype=xp.int64, device=device)


def philox4x32(counter: tuple[Array, Array, Array, Array], key: tuple[Array, Array]) -> tuple[Array, ...]:
    """Philox4x32-10: four int64 arrays of 32-bit counter words, two of key words -> four of random words, in place.

    Signed 64-bit products wrap around, and `>>` copies the sign: only the low 32 bits of a word are meaningful until it
    is masked, which every word is before it is multiplied. The counter's arrays have one shape; the key broadcasts.
    """
    c0, c1, c2, c3 = counter
    for i in range(ROUNDS):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c1 ^= product1 >> 32
        c1 ^= (key[0] + i * WEYL[0]) & WORD
        c1 &= WORD
        c3 ^= product0 >> 32
        c3 ^= (key[1] + i * WEYL[1]) & WORD
        c3 &= WORD
        c0, c1, c2, c3 = c1, product1, c3, product0
    c1 &= WORD
    c3 &= WORD
    return c0, c1, c2, c3


def _box_muller(xp: Any, radius_word: Array, angle_word: Array) -> tuple[Array, Array]:
    """Two independent normals per pair of words. The radius in float64: float32 logarithms differ between libraries."""
    uniform = xp.astype(radius_word, xp.float64)
    uniform += 0.5
    uniform *= 2.0**-32  # in (0, 1)
    radius = xp.astype(xp.sqrt(-2.0 * xp.log(uniform)), xp.float32)
    angle = xp.astype(angle_word, xp.float32)
    angle *= 2 * math.pi * 2.0**-32
    return radius * xp.cos(angle), radius * xp.sin(angle)
