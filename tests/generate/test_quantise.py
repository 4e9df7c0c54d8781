"""Values become the pixels that other libraries make of them, and what is no picture is noticed."""

from __future__ import annotations

import numpy as np
import pytest

from fastgen.generate.quantise import problem, quantised

rng = np.random.default_rng(0)


def test_pixels_are_those_of_diffusers_image_processor():
    torch = pytest.importorskip("torch")
    VaeImageProcessor = pytest.importorskip("diffusers.image_processor").VaeImageProcessor
    images = rng.uniform(-1.5, 1.5, (4, 3, 32, 32)).astype(np.float32)
    zero_to_one = VaeImageProcessor.denormalize(torch.from_numpy(images)).numpy().transpose(0, 2, 3, 1)
    expected = np.stack([np.asarray(image) for image in VaeImageProcessor.numpy_to_pil(zero_to_one)])
    found = quantised(images)[0]
    assert found.shape == (4, 32, 32, 3)
    assert np.abs(found.astype(int) - expected).max() <= 1  # ties may round differently
    assert (found == expected).mean() > 0.999


def torchvision_save_image(image):
    """`save_image(image, normalize=True)` of torchvision 0.21 for one image (C, H, W), up to the file: make_grid's norm_ip,
    then quantisation."""
    low, high = float(image.min()), float(image.max())
    image = image.clone().clamp_(min=low, max=high)
    image.sub_(low).div_(max(high - low, 1e-5))
    return image.mul(255).add_(0.5).clamp_(0, 255).permute(1, 2, 0).byte().numpy()


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_min_max_is_what_torchvision_saves_of_each_clamped_image(library):
    torch = pytest.importorskip("torch")
    images = (rng.normal(0, 1, (6, 3, 16, 16)) * np.array([0.01, 0.1, 0.3, 1, 3, 0])[:, None, None, None]).astype(
        np.float32
    )
    given = torch.from_numpy(images) if library == "torch" else images
    pixels, broken, low, high = (np.asarray(x) for x in quantised(given, "min-max"))
    expected = np.stack([torchvision_save_image(image.clamp(-1, 1)) for image in torch.from_numpy(images)])
    assert np.array_equal(pixels, expected)
    assert not broken.any()
    assert np.array_equal(low, images.clip(-1, 1).min((1, 2, 3)))
    assert np.array_equal(high, images.clip(-1, 1).max((1, 2, 3)))


@pytest.mark.parametrize(
    ("values", "word"),
    [
        (np.full((3, 8, 8), np.nan), "not finite"),
        (np.where(np.arange(192).reshape(3, 8, 8) == 7, np.inf, 0.5), "1 of 192 values are not finite"),
        (np.full((3, 8, 8), 0.25), "flat"),
        (np.zeros((3, 8, 8)) + rng.uniform(0, 1e-3, (3, 8, 8)), "flat"),
        (rng.uniform(2, 100, (3, 8, 8)), "flat"),  # saturated: a white picture
    ],
)
def test_what_is_no_picture_is_a_problem(values, word):
    assert word in str(problem(values.astype(np.float32)))


def test_pictures_are_no_problem_even_where_they_saturate():
    assert problem(rng.uniform(-1, 1, (3, 8, 8)).astype(np.float32)) is None
    assert problem(rng.normal(0, 50, (3, 8, 8)).astype(np.float32)) is None
