"""Arrays become the PNG files and contact sheets that were promised."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fastgen.files.png import contact_sheet, image_grid, png_bytes, read_metadata, save_image, sheet, text_chunk

rng = np.random.default_rng(0)


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
    images = [np.full((32, 32, 3), colour, np.uint8) for colour in colours]
    save_image(tmp_path / "sheet.png", contact_sheet(images, [f"image {i}" for i in range(5)]), "fastgen job")
    assert text_chunk(tmp_path / "sheet.png", "Software") == "fastgen job"
    drawn = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    centres = []
    for colour in colours:
        rows, columns = np.nonzero((drawn == colour).all(-1))
        assert len(rows) == 96 * 96
        centres.append((rows.min(), columns.min()))
    assert centres == sorted(centres)


@pytest.mark.parametrize("caption", ["W" * 3000, "several words that need more than three lines " * 4, "", "竜 🐉"])
def test_captions_stay_inside_their_own_cell(caption):
    images = [Image.new("RGB", (64, 64), "red")] * 2
    with_text = np.asarray(sheet([images], [[caption, ""]], cell=128))
    without = np.asarray(sheet([images], [["", ""]], cell=128))
    second = with_text[: without.shape[0], 6 + 128 :]
    assert np.array_equal(second[: without.shape[0]], without[:, 6 + 128 :])


def test_gaps_heads_titles_and_a_tint_leave_the_images_in_their_columns():
    red, blue = Image.new("RGB", (32, 32), "red"), Image.new("RGB", (32, 16), "blue")
    rows, titles = [[red, None, blue], [blue, red]], ["", "W" * 999]
    drawn = np.asarray(sheet(rows, cell=96, heads=["W" * 99] * 3, titles=titles, tinted=1))
    areas = [drawn[:, 6 + 102 * j : 102 + 102 * j] for j in range(4)]
    counts = [[int((area == colour).all(-1).sum()) for area in areas] for colour in ((255, 0, 0), (0, 0, 255))]
    assert counts == [[96 * 96, 96 * 96, 0, 0], [96 * 48, 0, 96 * 48, 0]]
    tinted = (drawn[:, 0] == (255, 242, 204)).all(-1)
    assert not tinted[: len(tinted) // 2].any()
    assert tinted.sum() > 96


def test_a_sheet_without_rows_has_its_heads_only():
    assert sheet([], heads=["a", "b"], titles=[], cell=96).size == (6 + 2 * 102, 6 + 15)
