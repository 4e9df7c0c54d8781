"""Training images, decoded completely and brought to one size; whatever is wrong with a file is an InputError."""

from __future__ import annotations

import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fastgen.data.dataset import Dataset, note
from fastgen.errors import InputError

Mode = Literal["stretch", "pad", "crop"]
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # none that starts an interpreter, as EPS does
WHITE = (255, 255, 255)

_opening = threading.Lock()  # warnings.catch_warnings changes the state of the whole process


def open_image(path: str | os.PathLike[str], row: str = "") -> Image.Image:
    """The image as RGB at its own size, what is transparent on white. Raises as `load_image` does."""
    place = f"{path} ({row})" if row else str(path)
    try:
        with _open(path) as image:
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = Image.MAX_IMAGE_PIXELS or 0
        raise InputError(f"{place}: more than {limit:,} pixels, a decompression bomb? Shrink it") from None
    except FileNotFoundError:
        raise InputError(f"{place}: no such image") from None
    except UnidentifiedImageError:
        raise InputError(f"{place}: is no image of a known format ({', '.join(FORMATS)}), or it is damaged") from None
    except Exception as error:  # Pillow's decoders raise many types for damaged files
        raise InputError(f"{place}: cannot be read as an image: {error or type(error).__name__}") from error


def load_image(path: str | os.PathLike[str], size: int, *, row: str = "", mode: Mode = "stretch") -> Image.Image:
    """The image as RGB, size x size pixels, what is transparent on white.

    `mode` says what becomes of one that is not square: "stretch" ignores the proportions, "pad" adds white, "crop"
    takes the middle. Resizing is bilinear with antialiasing, as in torchvision. Raises InputError, naming the file and
    `row`, for a file that is missing, truncated, damaged, of another format or a decompression bomb.
    """
    if size < 1:
        raise InputError(f"image size: found {size}, expected at least 1")
    if mode not in get_args(Mode):
        raise InputError(f"resize mode: found {mode!r}, expected one of {', '.join(get_args(Mode))}")
    return _square(open_image(path, row), size, mode)


def load_images(
    dataset: Dataset, size: int, skip_bad: bool = False, workers: int = 2, mode: Mode = "stretch"
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """(images (N, size, size, 3) uint8, indices (N,) of their examples, notes), in the order of the examples.

    A bad image raises InputError with its row; with `skip_bad` it is left out and counted in the notes, and only a
    dataset without any good image raises.
    """
    examples = dataset.examples
    images = np.empty((len(examples), size, size, 3), np.uint8)

    def load(index: int) -> str | None:
        try:
            image = load_image(examples[index].image, size, row=f"example {index}", mode=mode)
        except InputError as error:
            if not skip_bad:
                raise
            return str(error)
        images[index] = np.asarray(image)
        return None

    with ThreadPoolExecutor(max(1, workers)) as pool:
        errors = list(pool.map(load, range(len(examples))))
    bad = [error for error in errors if error]
    if not bad:
        return images, np.arange(len(examples)), ()
    if len(bad) == len(examples):
        raise InputError(f"none of the {len(examples):,} images can be read; the first: {bad[0]}")
    kept = np.array([index for index, error in enumerate(errors) if not error])
    for new, old in enumerate(kept):
        images[new] = images[old]  # in place: a copy could double gigabytes
    return images[: len(kept)], kept, note(bad, "bad images skipped")


def _open(path: str | os.PathLike[str]) -> Image.Image:
    with _opening, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(path, formats=FORMATS)


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB; transparency (a channel, or one colour of the palette) becomes white; 16 bits become 8."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("integers beyond 16 bits")
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels, expected 8 or 16 bits")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (*WHITE, 255)), image).convert("RGB")


def _square(image: Image.Image, size: int, mode: Mode) -> Image.Image:
    bilinear = Image.Resampling.BILINEAR
    if mode == "crop":
        return ImageOps.fit(image, (size, size), bilinear)
    if mode == "stretch":
        return image.resize((size, size), bilinear)
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    canvas = Image.new("RGB", (size, size), WHITE)
    canvas.paste(image.resize((width, height), bilinear), ((size - width) // 2, (size - height) // 2))
    return canvas
