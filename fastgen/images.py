"""Arrays -> PNG files with their metadata, and contact sheets."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from fastgen.jsonfiles import write_bytes

METADATA_KEY = "fastgen"  # the PNG text chunk that holds an image's manifest line


def png_bytes(pixels: np.ndarray, metadata: Mapping[str, Any]) -> bytes:
    """(H, W, 3) uint8 -> a PNG file whose text chunk `fastgen` holds `metadata` as JSON; the same input, the same bytes."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt(METADATA_KEY, json.dumps(metadata, ensure_ascii=False, sort_keys=True))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=info, compress_level=4)
    return buffer.getvalue()


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata that `png_bytes` stored."""
    with Image.open(path) as image:
        image.load()
        return json.loads(image.info[METADATA_KEY])


def image_grid(images: Sequence[np.ndarray], columns: int = 8, padding: int = 2) -> np.ndarray:
    """Images (H, W, 3) uint8 of one size, in rows on black, with `padding` px between and around them: the layout of
    torchvision's `make_grid(images, nrow=columns, padding=padding)`, which leaves a single image as it is."""
    if len(images) == 1:
        return images[0]
    height, width, _ = images[0].shape
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    shape = rows * (height + padding) + padding, columns * (width + padding) + padding, 3
    grid = np.zeros(shape, np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * (height + padding) + padding, i % columns * (width + padding) + padding
        grid[y : y + height, x : x + width] = image
    return grid


def save_image(path: Path, image: Image.Image) -> None:
    """A PNG without metadata, written atomically."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())


def read_pixels(file: Path) -> np.ndarray:
    """(H, W, 3) uint8 of an image file that fastgen wrote."""
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def contact_sheet(
    images: Sequence[Image.Image], captions: Sequence[str] | None = None, *, cell: int = 128, columns: int | None = None
) -> Image.Image:
    """Images side by side on white, each scaled to fit `cell` px, with up to three lines of caption below."""
    columns = columns or max(1, min(len(images), math.ceil(math.sqrt(len(images) * 1.6))))
    font = ImageFont.load_default(max(9, cell // 12))
    line = int(font.size * 1.25)  # type: ignore[union-attr]
    texts = [_wrap(caption, font, cell, 3) for caption in captions] if captions else []
    pad = 6
    height = cell + (line * max((len(t) for t in texts), default=0) + 2 if texts else 0)
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (cell + pad) + pad, rows * (height + pad) + pad), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = pad + i % columns * (cell + pad), pad + i // columns * (height + pad)
        scale = cell / max(image.size)
        method = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        sheet.paste(image.convert("RGB").resize(size, method), (x, y))
        for j, text in enumerate(texts[i] if texts else []):
            draw.text((x, y + cell + 1 + j * line), text, fill="black", font=font)
    return sheet


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


def save_contact_sheet(path: Path, files: Sequence[Path], captions: Sequence[str], limit: int = 256) -> None:
    """A contact sheet of the first `limit` image files, written atomically."""
    images = [Image.fromarray(read_pixels(file)) for file in files[:limit]]
    save_image(path, contact_sheet(images, captions[:limit], cell=max(96, min(192, images[0].width))))
