"""Flips and colour jitter, of pixels and of cached latents."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from fastgen.training.augment import BRIGHTNESS, CONTRAST, SATURATION, VARIANTS, color_jitter, light_variant
from fastgen.training.draws import Draws
from fastgen.training.encode import cached_moments, latent_scale
from fastgen.training.sources import FLIP, POSTERIOR, LatentSpace, PixelSpace, to_signed, to_uint8
from fastgen.training.vae import moments

CPU = torch.device("cpu")
ROWS = np.arange(16)
DRAWS = Draws(0, 7, ROWS, 16, CPU)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def pictures(count: int = 16, size: int = 16) -> np.ndarray:
    """Smooth ones, no two alike."""
    rng = np.random.default_rng(1)
    small = rng.integers(0, 256, (count, 4, 4, 3), np.uint8)
    return np.stack(
        [np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)) for image in small]
    )


def tiny_vae() -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    options: dict[str, Any] = {"norm_num_groups": 4, "layers_per_block": 1, "scaling_factor": 0.5}
    return AutoencoderKL(block_out_channels=(8,), **options).eval().requires_grad_(False)


def factors(draws: Draws, amount: float) -> np.ndarray:
    low = max(0.0, 1 - amount)
    return np.stack([low + (1 + amount - low) * draws.uniform(s) for s in (BRIGHTNESS, CONTRAST, SATURATION)])


@pytest.mark.parametrize("amount", [0.1, 0.5, 1.5])
def test_colour_jitter_is_pillows_enhancement_by_the_factors_drawn(amount: float) -> None:
    images = pictures()
    found = to_uint8(color_jitter(to_signed(images, CPU), DRAWS, amount))
    for image, ours, (brightness, contrast, saturation) in zip(images, found, factors(DRAWS, amount).T, strict=True):
        theirs = ImageEnhance.Brightness(Image.fromarray(image)).enhance(brightness)
        theirs = ImageEnhance.Contrast(theirs).enhance(contrast)
        theirs = ImageEnhance.Color(theirs).enhance(saturation)
        rounding = 3 + (1 + amount) ** 2  # Pillow cuts to integers after each, and the next ones enlarge that
        error = np.abs(np.asarray(theirs).astype(int) - ours)
        assert error.max() <= rounding
        assert error.mean() <= rounding / 2


def test_factors_fill_their_interval_and_differ_between_images_and_kinds() -> None:
    many = Draws(0, 0, np.arange(2000), 2000, CPU)
    values = factors(many, 0.2)
    assert values.min() >= 0.8
    assert values.max() <= 1.2
    assert (values.min(axis=1) < 0.81).all()
    assert (values.max(axis=1) > 1.19).all()
    assert np.abs(np.corrcoef(values) - np.eye(3)).max() < 0.1


def test_colour_jitter_of_nothing_changes_nothing() -> None:
    x = to_signed(pictures(), CPU)
    torch.testing.assert_close(color_jitter(x, DRAWS, 0.0), x, rtol=0, atol=1e-6)


def test_pixels_are_jittered_and_mirrored_as_drawn_and_only_when_asked() -> None:
    images = pictures()
    space = PixelSpace(images, CPU)
    plain = to_signed(images, CPU)
    assert torch.equal(space.clean(ROWS, DRAWS), plain)
    both = space.clean(ROWS, DRAWS, flip=True, jitter=0.3)
    assert torch.equal(both, space.pictures(ROWS, DRAWS, flip=True, jitter=0.3))
    mirrored = DRAWS.integers(FLIP, 2) == 1
    assert 0 < mirrored.sum() < 16
    lit = color_jitter(plain, DRAWS, 0.3)
    assert torch.equal(both[~mirrored], lit[~mirrored])
    assert torch.equal(both[mirrored], lit[mirrored].flip(-1))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("jitter", [0.0, 0.4])
def test_latents_are_those_of_the_very_picture_that_is_shown_beside_them(flip: bool, jitter: float) -> None:
    vae, images = tiny_vae(), pictures()
    cached = cached_moments(vae, images, {"data": "augment"}, flip, CPU, False, jitter)
    assert cached.shape == (16, VARIANTS if jitter else 1, 2 if flip else 1, 8, 16, 16)
    space = LatentSpace(cached, images, vae, CPU)
    shown = space.pictures(ROWS, DRAWS, flip, jitter)
    mean, logvar = moments(vae, shown).chunk(2, dim=1)
    expected = (mean + torch.exp(0.5 * logvar) * DRAWS.normal(POSTERIOR, space.shape)) * 0.5
    torch.testing.assert_close(space.clean(ROWS, DRAWS, flip, jitter), expected, rtol=5e-3, atol=5e-3)
    plain = to_signed(images, CPU)
    unchanged = (shown == plain).flatten(1).all(1)
    if flip or jitter:
        assert not unchanged.all()
    else:
        assert unchanged.all()
    assert torch.equal(space.pictures(ROWS, DRAWS), plain)


def test_variants_of_light_differ_between_examples_and_repeat() -> None:
    same = to_signed(np.repeat(pictures(1), 3, axis=0), CPU)
    rows = np.array([5, 6, 5])
    first, again = (light_variant(same, rows, 2, 0.3) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(first[0], first[2])
    assert not torch.equal(first[0], first[1])
    assert torch.equal(light_variant(same, rows, 0, 0.3), same)
    mixed = light_variant(same, rows, np.array([0, 2, 1]), 0.3)
    assert torch.equal(mixed[0], same[0])
    assert torch.equal(mixed[1], first[1])
    assert not torch.equal(mixed[2], first[2])


def test_jittered_latents_are_cached_once_under_their_own_key_and_their_size_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    vae, images = tiny_vae(), pictures(4)
    plain = cached_moments(vae, images, {"data": "once"}, True, CPU, False)
    assert "color_jitter" not in capsys.readouterr().err
    jittered = cached_moments(vae, images, {"data": "once"}, True, CPU, False, 0.2)
    assert f"the latents of {VARIANTS} variants of every image are cached" in capsys.readouterr().err
    np.testing.assert_array_equal(plain[:, 0], jittered[:, 0])
    other = cached_moments(vae, images, {"data": "once"}, True, CPU, False, 0.1)
    assert not (other[:, 1:] == jittered[:, 1:]).all()
    monkeypatch.setattr("fastgen.training.encode.write_array", lambda *_: pytest.fail("encoded again"))
    np.testing.assert_array_equal(jittered, cached_moments(vae, images, {"data": "once"}, True, CPU, False, 0.2))
    assert latent_scale(plain, np.arange(4)) == latent_scale(jittered, np.arange(4))
