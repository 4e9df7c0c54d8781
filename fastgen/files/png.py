"""Arrays -> PNG files with their metadata, and contact sheets."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from fastgen.files.jsonfiles import write_bytes

METADATA_KEY = "fastgen"  # the PNG text chunk that holds an image's manifest line
SOFTWARE_KEY = "Software"  # the PNG text chunk of sheets that says which command wrote them, see `outputs`
MAX_TEXT = 2**20  # bytes of a text chunk that is read
SIGNATURE = b"\x89PNG\r\n\x1a\n"
PAD = 6  # px between the images of a sheet
TINT = "#fff2cc"
T = TypeVar("T")


def to_image(pixels: np.ndarray) -> Image.Image:
    """(H, W, channels) uint8 -> an image: grey of 1 channel, RGB of 3; 2 and 4 channels have transparency."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def png_bytes(pixels: np.ndarray, metadata: Mapping[str, Any]) -> bytes:
    """(H, W, channels) uint8 -> a PNG file whose text chunk `fastgen` holds `metadata` as JSON; the same input, the same
    bytes."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt(METADATA_KEY, json.dumps(metadata, ensure_ascii=False, sort_keys=True))
    buffer = io.BytesIO()
    to_image(pixels).save(buffer, "PNG", pnginfo=info, compress_level=4)
    return buffer.getvalue()


def read_metadata(path: str | Path) -> dict[str, Any] | None:
    """The metadata that `png_bytes` stored; None for every other file. The pixels are not read."""
    return parse_metadata(text_chunk(path, METADATA_KEY))


def parse_metadata(text: str | None) -> dict[str, Any] | None:
    """The metadata in the text chunk `fastgen`; None for no text, and for another text."""
    try:
        value = None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def text_chunk(path: str | Path, key: str) -> str | None:
    """The text of an uncompressed text chunk (iTXt in UTF-8, tEXt in Latin 1) before a PNG's pixels; None without one, and for
    what is no PNG file."""
    if not os.path.isfile(path):
        return None
    with open(path, "rb") as file:
        return text_in(file, key)


def text_in(file: BinaryIO, key: str) -> str | None:
    """As `text_chunk`, of an open file at its beginning; None too where the file ends within the chunk."""
    if file.read(8) != SIGNATURE:
        return None
    while len(head := file.read(8)) == 8:
        size, kind = int.from_bytes(head[:4], "big"), head[4:]
        if kind in (b"IDAT", b"IEND"):
            return None
        if kind in (b"iTXt", b"tEXt") and size <= MAX_TEXT:
            data = file.read(size)
            name, _, rest = data.partition(b"\0")
            if name == key.encode():
                if len(data) < size:
                    return None
                return _text_of(rest) if kind == b"iTXt" else rest.decode("latin-1")
            file.seek(4, io.SEEK_CUR)
        else:
            file.seek(size + 4, io.SEEK_CUR)
    return None


def _text_of(data: bytes) -> str | None:
    """The text of an iTXt chunk after its keyword: compression flag and method, language, translated keyword, text."""
    parts = data[2:].split(b"\0", 2)
    if data[:1] != b"\0" or len(parts) < 3:
        return None
    return parts[2].decode("utf-8", "replace")


def image_grid(images: Sequence[np.ndarray], columns: int = 8, padding: int = 2) -> np.ndarray:
    """Images (H, W, channels) uint8 of one size, in rows on black, with `padding` px between and around them: the layout of
    torchvision's `make_grid(images, nrow=columns, padding=padding)`, which leaves a single image as it is."""
    if len(images) == 1:
        return images[0]
    height, width, channels = images[0].shape
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    shape = rows * (height + padding) + padding, columns * (width + padding) + padding, channels
    grid = np.zeros(shape, np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * (height + padding) + padding, i % columns * (width + padding) + padding
        grid[y : y + height, x : x + width] = image
    return grid


def save_image(path: Path, image: Image.Image, software: str) -> None:
    """Write what `image_bytes` returns, atomically."""
    write_bytes(path, image_bytes(image, software))


def image_bytes(image: Image.Image, software: str) -> bytes:
    """A PNG file whose text chunk `Software` says what wrote it."""
    info = PngImagePlugin.PngInfo()
    info.add_text(SOFTWARE_KEY, software)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def read_pixels(file: Path | BinaryIO) -> np.ndarray:
    """(H, W, 3) uint8 of an image file that fastgen wrote."""
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def sheet(
    rows: Sequence[Sequence[Image.Image | None]],
    captions: Sequence[Sequence[str]] = (),
    *,
    cell: int = 128,
    heads: Sequence[str] = (),
    titles: Sequence[str] = (),
    tinted: int | None = None,
) -> Image.Image:
    """Rows of images on white, each scaled to fit `cell` px; None leaves a gap.

    `captions`: up to three lines below each image. `heads`: a line above each column. `titles`: a line above each row, which
    may be as wide as four images. `tinted`: the row with a background of its own.
    """
    font, head_font = ImageFont.load_default(max(10, cell // 12)), ImageFont.load_default(max(12, cell // 10))
    line, head_line = int(max(10, cell // 12) * 1.25), int(max(12, cell // 10) * 1.25)
    texts = [[_wrap(text, font, cell, 3) for text in row] for row in captions] or [[] for _ in rows]
    above, top = head_line if titles else 0, PAD + (head_line if heads else 0)
    heights = [above + cell + line * max(map(len, row), default=0) + PAD for row in texts]
    width = PAD + max(4 if titles else 1, len(heads), *map(len, rows)) * (cell + PAD)
    image = Image.new("RGB", (width, top + sum(heights)), "white")
    draw = ImageDraw.Draw(image)
    lefts = range(PAD, width, cell + PAD)
    for x, text in zip(lefts, heads, strict=False):
        draw.text((x, PAD // 2), fit_text(text, head_font, cell), fill="black", font=head_font)
    for i, (row, height) in enumerate(zip(rows, heights, strict=True)):
        if i == tinted:
            draw.rectangle((0, top - PAD // 2, width, top + height - PAD // 2 - 1), fill=TINT)
        if titles:
            draw.text((PAD, top - 1), fit_text(titles[i], head_font, width - 2 * PAD), fill="black", font=head_font)
        for x, picture in zip(lefts, row, strict=False):
            if picture is not None:
                image.paste(_scaled(picture, cell), (x, top + above))
        for x, lines in zip(lefts, texts[i], strict=False):
            draw.multiline_text((x, top + above + cell + 1), "\n".join(lines), fill="black", font=font, spacing=2)
        top += height
    return image


def _scaled(image: Image.Image, cell: int) -> Image.Image:
    """The longer side `cell` px."""
    scale = cell / max(image.size)
    method = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size, method)


def _wrap(text: str, font: Any, width: int, lines: int) -> list[str]:
    """Greedy word wrap to `width` px; a line that does not fit, or that others follow, ends in an ellipsis."""
    out: list[str] = []
    for word in text.split():
        joined = f"{out[-1]} {word}" if out else word
        if out and font.getlength(joined) <= width:
            out[-1] = joined
        else:
            out.append(word)
    more = len(out) > lines
    return [fit_text(line, font, width, more and i == lines - 1) for i, line in enumerate(out[:lines])]


def fit_text(text: str, font: Any, width: int, more: bool = False) -> str:
    """As much of a line as `width` px hold, with an ellipsis where something is left out (or `more` follows)."""
    text, cut = text[:width], more or len(text) > width  # a character takes a pixel at least
    while text and font.getlength(text + ("…" if cut else "")) > width:
        text, cut = text[:-1], True
    return text + "…" if cut else text


def contact_sheet(images: Sequence[np.ndarray], captions: Sequence[str]) -> Image.Image:
    """Images (H, W, 3) uint8 with their captions, in rows."""
    columns = math.ceil(math.sqrt(len(images) * 1.6))
    rows = in_rows([Image.fromarray(image) for image in images], columns)
    return sheet(rows, in_rows(captions, columns), cell=max(96, min(192, images[0].shape[1])))


def in_rows(values: Sequence[T], columns: int) -> list[Sequence[T]]:
    """`columns` values in every row but the last, which may have fewer."""
    return [values[start : start + columns] for start in range(0, len(values), columns)]
