"""Arrays become the PNG files and contact sheets that were promised."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fastgen.images import (
    contact_sheet,
    image_grid,
    png_bytes,
    problem,
    quantised,
    read_metadata,
    save_contact_sheet,
    to_uint8,
)

rng = np.random.default_rng(0)


def test_pixels_are_those_of_diffusers_image_processor():
    torch = pytest.importorskip("torch")
    VaeImageProcessor = pytest.importorskip("diffusers.image_processor").VaeImageProcessor
    images = rng.uniform(-1.5, 1.5, (4, 3, 32, 32)).astype(np.float32)
    zero_to_one = VaeImageProcessor.denormalize(torch.from_numpy(images)).numpy().transpose(0, 2, 3, 1)
    expected = np.stack([np.asarray(image) for image in VaeImageProcessor.numpy_to_pil(zero_to_one)])
    found = to_uint8(images)
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


@pytest.mark.parametrize(("count", "columns", "padding"), [(1, 8, 2), (3, 8, 2), (8, 8, 2), (11, 4, 2), (5, 2, 0)])
def test_a_grid_is_laid_out_as_torchvision_make_grid_does(count, columns, padding):
    images = rng.integers(1, 256, (count, 10, 12, 3), dtype=np.uint8)
    found = image_grid(list(images), columns, padding)
    if count == 1:
        assert np.array_equal(found, images[0])
        return
    # torchvision 0.21, make_grid: xmaps = min(nrow, nmaps), ymaps = ceil(nmaps / xmaps), padding included in height and width
    xmaps = min(columns, count)
    ymaps = -(-count // xmaps)
    expected = np.zeros(((10 + padding) * ymaps + padding, (12 + padding) * xmaps + padding, 3), np.uint8)
    for k, image in enumerate(images):
        y, x = divmod(k, xmaps)
        expected[y * (10 + padding) + padding :, x * (12 + padding) + padding :][:10, :12] = image
    assert np.array_equal(found, expected)


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


def test_a_png_keeps_pixels_and_metadata_and_its_bytes_are_reproducible(tmp_path):
    pixels = rng.integers(0, 256, (16, 24, 3), dtype=np.uint8)
    metadata = {"prompt": 'a "crème" dragon 🐉\n\0', "seed": 2**63 - 1, "labels": ["red cube"], "scale": 7.5}
    data = png_bytes(pixels, metadata)
    (tmp_path / "a.png").write_bytes(data)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), pixels)
    assert read_metadata(tmp_path / "a.png") == metadata
    assert png_bytes(pixels, dict(reversed(metadata.items()))) == data


def test_a_contact_sheet_shows_every_image_in_order(tmp_path):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)]
    files = []
    for i, colour in enumerate(colours):
        files.append(tmp_path / f"{i}.png")
        Image.new("RGB", (32, 32), colour).save(files[-1])
    save_contact_sheet(tmp_path / "sheet.png", files, [f"image {i}" for i in range(5)])
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    centres = []
    for colour in colours:
        rows, columns = np.nonzero((sheet == colour).all(-1))
        assert len(rows) == 96 * 96
        centres.append((rows.min(), columns.min()))
    assert centres == sorted(centres)


@pytest.mark.parametrize("caption", ["W" * 3000, "several words that need more than three lines " * 4, "", "竜 🐉"])
def test_captions_stay_inside_their_own_cell(caption):
    images = [Image.new("RGB", (64, 64), "red")] * 2
    with_text = np.asarray(contact_sheet(images, [caption, ""], cell=128, columns=2))
    without = np.asarray(contact_sheet(images, ["", ""], cell=128, columns=2))
    second = with_text[: without.shape[0], 6 + 128 :]
    assert np.array_equal(second[: without.shape[0]], without[:, 6 + 128 :])
