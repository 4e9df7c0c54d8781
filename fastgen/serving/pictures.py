"""Pictures of the server: states -> files, in batches of the sizes that the decoder was warmed up for."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastgen.files.png import png_bytes, to_image
from fastgen.generate.decoder import Pictures

if TYPE_CHECKING:
    from fastgen.generate.runner import ModelRunner

Array = Any
QUALITY = 90  # of jpeg and webp by default


@dataclass(frozen=True)
class Decoding:
    """States that are being decoded, and a function that waits for their pictures."""

    count: int
    wait: Callable[[], Pictures]

    def pictures(self) -> Pictures:
        """Those of the states, without the padding."""
        pictures = self.wait()
        return Pictures(pictures.pixels[: self.count], pictures.problems[: self.count])


def start_decoding(pipeline: ModelRunner, states: Array, sizes: Sequence[int], normalize: str) -> list[Decoding]:
    """Begin to decode states (B, C, h, w), in parts of at most the largest of `sizes`, each padded to the next size. On a CPU
    the pictures are ready when this returns."""
    parts = []
    for first in range(0, len(states), max(sizes)):
        part = states[first : first + max(sizes)]
        size = min(n for n in sizes if n >= len(part))
        padded = pipeline.engine.padded(part, size)
        parts.append(Decoding(len(part), pipeline.decoder.start(padded, normalize, size)))
    return parts


def image_file(pixels: np.ndarray, metadata: Mapping[str, Any], output_format: str, compression: int | None) -> bytes:
    """(H, W, channels) uint8 -> a file. PNG: with the metadata, as a job writes it. `compression`: quality of jpeg and webp."""
    if output_format == "png":
        return png_bytes(pixels, metadata)
    buffer, image = io.BytesIO(), to_image(pixels)
    quality = QUALITY if compression is None else compression
    if output_format == "jpeg":
        image.convert("RGB" if pixels.shape[-1] > 2 else "L").save(buffer, "JPEG", quality=quality)
    else:
        image.save(buffer, "WEBP", quality=quality)
    return buffer.getvalue()
