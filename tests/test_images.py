"""Arrays become the PNG files and contact sheets that were promised."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fastgen.images import contact_sheet, png_bytes, problem, read_metadata, save_contact_sheet, to_uint8

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
