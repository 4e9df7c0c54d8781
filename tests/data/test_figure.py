"""image_mode "figure": cropped to what is no background, padded to a square, resized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastgen.data import Dataset, Example
from fastgen.data.cache import cached_pixels
from fastgen.data.figure import TOLERANCE, find_figure
from fastgen.data.images import load_image, load_images

GREEN = (30, 160, 40)


def scene(
    background: Any, box: tuple[int, int, int, int], size: tuple[int, int] = (60, 40), figure: Any = GREEN
) -> Image.Image:
    image = Image.new("RGBA" if len(background) == 4 else "RGB", size, background)
    image.paste(figure, box)
    return image


def loaded(folder: Path, image: Image.Image, size: int = 50, name: str = "a.png", mode: Any = "figure") -> np.ndarray:
    image.save(folder / name)
    return np.asarray(load_image(folder / name, size, mode=mode)).astype(int)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_the_box_is_the_figures_own_wherever_it_is(data: st.DataObject) -> None:
    width, height = data.draw(st.integers(6, 40)), data.draw(st.integers(6, 40))
    left, upper = data.draw(st.integers(1, width - 3)), data.draw(st.integers(1, height - 3))
    box = (left, upper, data.draw(st.integers(left + 1, width - 1)), data.draw(st.integers(upper + 1, height - 1)))
    background = data.draw(st.sampled_from([(255, 255, 255), (0, 0, 0), (120, 130, 250), (200, 200, 200, 0)]))
    found = find_figure(scene(background, box, (width, height), (230, 40, 40)))
    assert found is not None
    assert found.box == box
    assert found.background == (background if len(background) == 3 else (255, 255, 255))


def test_the_figure_fills_the_image_with_a_small_margin_and_keeps_its_proportions(tmp_path: Path) -> None:
    found = loaded(tmp_path, scene((255, 255, 255), (5, 10, 25, 20)), size=100)  # 20 x 10 px
    green = np.abs(found - GREEN).max(axis=-1) < 5
    rows, columns = np.flatnonzero(green.any(axis=1)), np.flatnonzero(green.any(axis=0))
    assert (columns[0], columns[-1]) == (4, 95)
    assert (rows[0], rows[-1]) == (27, 72)
    assert (found[:27] == 255).all()
    assert (found[:, :4] == 255).all()


def test_a_figure_on_a_coloured_background_is_padded_with_that_colour(tmp_path: Path) -> None:
    found = loaded(tmp_path, scene((90, 120, 200), (5, 5, 50, 12)))
    assert (found[[0, -1]] == (90, 120, 200)).all()


def test_an_image_with_alpha_is_cropped_to_what_is_opaque_on_white(tmp_path: Path) -> None:
    image = scene((90, 120, 200, 0), (10, 10, 20, 20), figure=(*GREEN, 255))
    found = loaded(tmp_path, image, size=100)
    assert (found[[0, -1]] == 255).all()
    assert np.abs(found[4:96, 4:96] - GREEN).max() <= 1
    assert (found[:4] == 255).all()


def test_alpha_that_hides_nothing_leaves_the_border_to_say_what_the_background_is(tmp_path: Path) -> None:
    image = scene((90, 120, 200, 255), (10, 10, 20, 20), figure=(*GREEN, 255))
    found = find_figure(image)
    assert found is not None
    assert (found.box, found.background) == ((10, 10, 20, 20), (90, 120, 200))


def test_a_white_figure_on_transparency_is_found(tmp_path: Path) -> None:
    figure = find_figure(scene((255, 255, 255, 0), (10, 10, 20, 20), figure=(255, 255, 255, 255)))
    assert figure is not None
    assert figure.box == (10, 10, 20, 20)


def test_the_noise_of_a_jpeg_is_background(tmp_path: Path) -> None:
    image = scene((250, 250, 250), (16, 16, 40, 32))
    image.save(tmp_path / "a.jpg", quality=60)
    found = find_figure(Image.open(tmp_path / "a.jpg"))
    assert found is not None
    assert np.abs(np.array(found.box) - (16, 16, 40, 32)).max() <= 2


@pytest.mark.parametrize("level", [0, 10, 128, 250, 255])
def test_the_tolerance_holds_at_either_end_of_the_scale(level: int) -> None:
    image = np.full((20, 20, 3), level, np.uint8)
    image[5, 5] = abs(level - TOLERANCE) if level >= TOLERANCE else level + TOLERANCE
    assert find_figure(Image.fromarray(image)) is None
    image[5, 5] = abs(level - TOLERANCE - 1) if level > TOLERANCE else level + TOLERANCE + 1
    figure = find_figure(Image.fromarray(image))
    assert figure is not None
    assert figure.box == (5, 5, 6, 6)


def photograph() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))


@pytest.mark.parametrize("image", [Image.new("RGB", (60, 40), GREEN), Image.new("RGBA", (60, 40)), photograph()])
def test_without_a_figure_the_image_is_padded_as_it_is(tmp_path: Path, image: Image.Image) -> None:
    assert find_figure(image) is None
    np.testing.assert_array_equal(loaded(tmp_path, image), loaded(tmp_path, image, mode="pad"))


def dataset(folder: Path, images: list[Image.Image]) -> Dataset:
    for i, image in enumerate(images):
        image.save(folder / f"{i}.png")
    examples = tuple(Example(folder / f"{i}.png", ("x",), (), str(i)) for i in range(len(images)))
    return Dataset("text", folder, examples, None)


def test_images_without_a_figure_are_counted_over_the_whole_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [scene((255, 255, 255), (5, 5, 20, 20)), Image.new("RGB", (9, 9), "white"), photograph()] * 2
    data = dataset(tmp_path, images)
    (tmp_path / "3.png").write_bytes(b"damaged")
    found = load_images(data, 16, skip_bad=True, mode="figure")[2]
    assert found.without_figure == ("1.png", "2.png", "4.png", "5.png")
    monkeypatch.setattr("fastgen.data.cache.CHUNK", 2)
    first, second = cached_pixels(data, 16, "figure", True).notes
    assert first.startswith("1 bad images skipped: ")
    assert second == (
        "4 images padded as they are: no figure on a plain or transparent background: 1.png, 2.png, 4.png, 5.png"
    )
    assert cached_pixels(data, 16, "pad", True).notes == (first,)


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 2)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_odd_shapes_and_modes_become_squares(tmp_path: Path, size: tuple[int, int], mode: str) -> None:
    assert loaded(tmp_path, Image.new(mode, size), size=8).shape == (8, 8, 3)
