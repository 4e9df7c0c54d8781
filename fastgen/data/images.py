"""Training images, decoded completely and brought to one size; anything wrong with a file is an InputError."""

from __future__ import annotations

import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple, get_args

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fastgen.data.dataset import Dataset, note
from fastgen.data.figure import find_figure
from fastgen.errors import InputError
from fastgen.files.jsonfiles import check_regular

Mode = Literal["stretch", "pad", "crop", "figure"]
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # none that starts an interpreter, as EPS does
WHITE = (255, 255, 255)
MARGIN = 0.04  # of the side, left around a figure

_opening = threading.Lock()  # warnings.catch_warnings changes the state of the whole process


def load_image(path: str | os.PathLike[str], size: int, *, row: str = "", mode: Mode = "stretch") -> Image.Image:
    """The image as RGB, size x size pixels; transparent parts become white.

    `mode`: how an image becomes square. "stretch" ignores the proportions, "pad" adds white, "crop" takes the middle. "figure"
    takes what differs from a plain or transparent background, in square images too, and adds background around it; it pads an
    image without such a figure. Resizing is bilinear with antialiasing, as in torchvision. Raises InputError, naming the file
    and `row`, for a file that is missing, truncated, damaged, of another format or a decompression bomb.
    """
    return _load(path, size, row, mode)[0]


class Remarks(NamedTuple):
    """Images that could not be loaded as the options say."""

    bad: tuple[str, ...] = ()  # their errors
    without_figure: tuple[str, ...] = ()  # their file names

    @property
    def notes(self) -> tuple[str, ...]:
        """A line for each kind that occurred."""
        padded = "images padded as they are: no figure on a plain or transparent background"
        return (*note(self.bad, "bad images skipped"), *note(self.without_figure, padded))


def load_images(
    dataset: Dataset, size: int, skip_bad: bool = False, workers: int = 2, mode: Mode = "stretch"
) -> tuple[np.ndarray, np.ndarray, Remarks]:
    """(images (N, size, size, 3) uint8, indices (N,) of their examples, remarks), in the order of the examples.

    A bad image raises InputError with its row. With `skip_bad` bad images are left out and listed in the remarks; InputError
    then means that none is good.
    """
    examples = dataset.examples
    images = np.empty((len(examples), size, size, 3), np.uint8)

    def load(index: int) -> tuple[str, bool]:
        try:
            image, as_asked = _load(examples[index].image, size, f"example {index}", mode)
        except InputError as error:
            if not skip_bad:
                raise
            return str(error), True
        images[index] = np.asarray(image)
        return "", as_asked

    with ThreadPoolExecutor(max(1, workers)) as pool:
        results = list(pool.map(load, range(len(examples))))
    bad = tuple(error for error, _ in results if error)
    padded = tuple(example.image.name for example, (_, as_asked) in zip(examples, results, strict=True) if not as_asked)
    if not bad:
        return images, np.arange(len(examples)), Remarks((), padded)
    if len(bad) == len(examples):
        raise InputError(f"none of the {len(examples):,} images can be read; the first: {bad[0]}")
    kept = np.array([index for index, (error, _) in enumerate(results) if not error])
    for new, old in enumerate(kept):
        images[new] = images[old]  # in place: a copy could double gigabytes
    return images[: len(kept)], kept, Remarks(bad, padded)


def open_image(path: str | os.PathLike[str], row: str = "") -> Image.Image:
    """The image as RGB at its own size; transparent parts become white. Raises as `load_image` does."""
    return _on_white(_decoded(path, row))


def _load(path: str | os.PathLike[str], size: int, row: str, mode: Mode) -> tuple[Image.Image, bool]:
    """(the image, whether it was made square by `mode`: False where there was no figure)."""
    if size < 1:
        raise InputError(f"image size: found {size}, expected at least 1")
    if mode not in get_args(Mode):
        raise InputError(f"resize mode: found {mode!r}, expected one of {', '.join(get_args(Mode))}")
    return _square(_decoded(path, row), size, mode)


def _decoded(path: str | os.PathLike[str], row: str) -> Image.Image:
    """RGB, or RGBA where there is transparency."""
    place = f"{path} ({row})" if row else str(path)
    if os.path.lexists(path):
        check_regular(path, "an image")
    try:
        with _open(path) as image:
            image.load()
            return _eight_bits(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = Image.MAX_IMAGE_PIXELS or 0
        raise InputError(f"{place}: more than {limit:,} pixels, a decompression bomb? Shrink it") from None
    except FileNotFoundError:
        raise InputError(f"{place}: no such image") from None
    except UnidentifiedImageError:
        raise InputError(f"{place}: is no image of a known format ({', '.join(FORMATS)}), or it is damaged") from None
    except Exception as error:  # Pillow's decoders raise many types for damaged files
        raise InputError(f"{place}: cannot be read as an image: {error or type(error).__name__}") from error


def _open(path: str | os.PathLike[str]) -> Image.Image:
    with _opening, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(path, formats=FORMATS)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Any mode to RGB, or RGBA where there is transparency (a channel, or one colour of the palette)."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("integers beyond 16 bits")
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels, expected 8 or 16 bits")
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, (*WHITE, 255)), image).convert("RGB")


def _square(image: Image.Image, size: int, mode: Mode) -> tuple[Image.Image, bool]:
    bilinear = Image.Resampling.BILINEAR
    figure = find_figure(image, WHITE) if mode == "figure" else None
    image = _on_white(image)
    if mode == "crop":
        return ImageOps.fit(image, (size, size), bilinear), True
    if mode == "stretch":
        return image.resize((size, size), bilinear), True
    if figure is None:
        return _padded(image, size, size, WHITE), mode == "pad"
    inner = max(1, round(size * (1 - 2 * MARGIN)))
    return _padded(image.crop(figure.box), size, inner, figure.background), True


def _padded(image: Image.Image, size: int, inner: int, background: tuple[int, int, int]) -> Image.Image:
    """The image, its longer side `inner` px, in the middle of size x size px."""
    scale = inner / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    canvas = Image.new("RGB", (size, size), background)
    small = image.resize((width, height), Image.Resampling.BILINEAR)
    canvas.paste(small, ((size - width) // 2, (size - height) // 2))
    return canvas
