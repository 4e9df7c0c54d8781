"""Cartoon shapes: smooth outlines, puffy shading, anti-aliasing by supersampling.

A picture is a list of `Shape`s, back to front. Coordinates are y-up and free of pixels; `paint` fits them into a
square picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFilter

Polygon = NDArray[np.float64]  # (N, 2)
RGB = tuple[int, int, int]

BACKGROUND: RGB = (250, 250, 250)
CURVE_STEPS = 8  # points between two control points of a curve
LIGHT = np.array([-0.55, 0.83])  # towards the light, y up


@dataclass(frozen=True)
class Ink:
    """How a shape is filled: a colour, puffy shading of a strength, an outline, or a soft edge (a blur radius)."""

    fill: RGB
    volume: float = 1.0
    outline: float = 0.045
    soft: float = 0.0
    alpha: float = 1.0
    edge: RGB | None = None  # colour of the outline; None: a dark shade of the fill


@dataclass(frozen=True)
class Shape:
    """Polygons that are filled as one; `framed` shapes must lie inside the picture."""

    polygons: tuple[Polygon, ...]
    ink: Ink
    framed: bool = True


class Pen:
    """Appends shapes to a list in a coordinate system of its own (an affine map to the picture's)."""

    def __init__(self, shapes: list[Shape], matrix: Polygon | None = None) -> None:
        self.shapes = shapes
        self.matrix = np.eye(3) if matrix is None else matrix

    def at(self, x: float = 0, y: float = 0, angle: float = 0, sx: float = 1, sy: float | None = None) -> Pen:
        """A pen whose origin is (x, y) of this one, turned by `angle` degrees and stretched."""
        c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
        sy = sx if sy is None else sy
        return Pen(self.shapes, self.matrix @ np.array([[c * sx, -s * sy, x], [s * sx, c * sy, y], [0, 0, 1]]))

    def polygon(self, *polygons: ArrayLike, ink: Ink, framed: bool = True) -> None:
        placed = tuple(np.asarray(p, float) @ self.matrix[:2, :2].T + self.matrix[:2, 2] for p in polygons)
        self.shapes.append(Shape(placed, ink, framed))

    def curve(self, *outlines: ArrayLike, ink: Ink, framed: bool = True) -> None:
        """Closed smooth outlines through the given points."""
        self.polygon(*(smooth(np.asarray(outline, float), closed=True) for outline in outlines), ink=ink, framed=framed)

    def ellipse(self, x: float, y: float, rx: float, ry: float | None = None, *, ink: Ink, framed: bool = True) -> None:
        self.polygon(oval(x, y, rx, ry), ink=ink, framed=framed)

    def stroke(self, path: ArrayLike, widths: Sequence[float], *, ink: Ink, framed: bool = True) -> None:
        """A smooth line of varying width with round ends."""
        self.polygon(ribbon(np.asarray(path, float), widths), ink=ink, framed=framed)


def oval(x: float, y: float, rx: float, ry: float | None = None, points: int = 40) -> Polygon:
    """An ellipse as a polygon (points, 2)."""
    turn = np.linspace(0, 2 * np.pi, points, endpoint=False)
    return np.stack([x + rx * np.cos(turn), y + (rx if ry is None else ry) * np.sin(turn)], -1)


def smooth(points: Polygon, closed: bool = False) -> Polygon:
    """A uniform Catmull-Rom curve through the points, CURVE_STEPS per segment."""
    ring = (
        np.concatenate([points[-1:], points, points[:2]])
        if closed
        else np.concatenate([points[:1], points, points[-1:]])
    )
    p0, p1, p2, p3 = (ring[i : len(ring) - 3 + i, None] for i in range(4))
    t = np.linspace(0, 1, CURVE_STEPS, endpoint=False)[:, None]
    curve = 0.5 * (2 * p1 + (p2 - p0) * t + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2 + (3 * p1 - p0 - 3 * p2 + p3) * t**3)
    curve = curve.reshape(-1, 2)
    return curve if closed else np.concatenate([curve, points[-1:]])


def ribbon(path: Polygon, widths: Sequence[float]) -> Polygon:
    """The outline of a smooth line whose full width runs through `widths`, with round ends."""
    line = smooth(path)
    half = np.interp(np.linspace(0, 1, len(line)), np.linspace(0, 1, len(widths)), widths)[:, None] / 2
    along = np.gradient(line, axis=0)
    along /= np.maximum(np.linalg.norm(along, axis=1, keepdims=True), 1e-9)
    across = np.stack([-along[:, 1], along[:, 0]], -1)
    caps = []
    for end, sign in ((-1, 1), (0, -1)):
        turn = np.linspace(np.pi / 2, -np.pi / 2, 9)[1:-1, None]
        caps.append(line[end] + half[end] * sign * (np.cos(turn) * along[end] + np.sin(turn) * across[end]))
    return np.concatenate([line + across * half, caps[0], (line - across * half)[::-1], caps[1]])


def bounds(shapes: Sequence[Shape]) -> NDArray[np.float64]:
    """(left, bottom, right, top) of the framed shapes."""
    points = np.concatenate([p for shape in shapes if shape.framed for p in shape.polygons])
    return np.concatenate([points.min(0), points.max(0)])


def paint(shapes: Sequence[Shape], box: NDArray[np.float64], size: int, margin: float = 0.04) -> Image.Image:
    """The picture, size x size pixels RGB, with `box` (left, bottom, right, top) centred in it."""
    factor = max(3, -(-256 // size))  # supersampling
    edge = size * factor
    scale = float(edge * (1 - 2 * margin) / max(box[2] - box[0], box[3] - box[1]))
    shift = np.array([edge / 2 - scale * (box[0] + box[2]) / 2, edge / 2 + scale * (box[1] + box[3]) / 2])
    image = Image.new("RGB", (edge, edge), BACKGROUND)
    thinnest = 0.55 * factor  # outlines stay visible in small pictures
    for shape in shapes:
        polygons = [p * (scale, -scale) + shift for p in shape.polygons]
        _paint_shape(image, polygons, shape.ink, scale, thinnest)
    return image.reduce(factor)


def _paint_shape(image: Image.Image, polygons: list[Polygon], ink: Ink, scale: float, thinnest: float) -> None:
    line = max(ink.outline * scale, thinnest) if ink.outline else 0.0
    blur = ink.soft * scale
    pad = int(line + 3 * blur) + 2
    points = np.concatenate(polygons)
    low = np.maximum(np.floor(points.min(0)).astype(int) - pad, 0)
    high = np.minimum(np.ceil(points.max(0)).astype(int) + pad, image.size)
    if (high - low < 1).any():
        return
    corner, size = (int(low[0]), int(low[1])), (int(high[0] - low[0]), int(high[1] - low[1]))
    local = [[(float(x), float(y)) for x, y in polygon - low] for polygon in polygons]
    mask = _filled(local, size)
    if line:
        image.paste(ink.edge or shade(ink.fill, -1.35), corner, _grown(mask, local, line))
    fill: Image.Image | RGB = _puffy(mask, ink) if ink.volume else ink.fill
    if blur:
        mask = _blurred(mask, blur)
    if ink.alpha < 1:
        mask = mask.point(lambda value: value * ink.alpha)
    image.paste(fill, corner, mask)


def _filled(polygons: list[list[tuple[float, float]]], size: tuple[int, int]) -> Image.Image:
    mask = Image.new("L", size)
    pen = ImageDraw.Draw(mask)
    for polygon in polygons:
        pen.polygon(polygon, fill=255)
    return mask


def _grown(mask: Image.Image, polygons: list[list[tuple[float, float]]], width: float) -> Image.Image:
    """The mask with a border of `width` around its polygons, round at the corners."""
    mask = mask.copy()
    pen = ImageDraw.Draw(mask)
    for polygon in polygons:
        pen.line([*polygon, polygon[0]], fill=255, width=2 * round(width) + 1)
        for x, y in polygon:
            pen.ellipse((x - width, y - width, x + width, y + width), fill=255)
    return mask


def _blurred(mask: Image.Image, radius: float) -> Image.Image:
    """A Gaussian blur, at a lower resolution where the radius allows it."""
    factor = max(1, int(radius / 3))
    small = mask.resize(
        (max(1, mask.width // factor), max(1, mask.height // factor)), Image.Resampling.BILINEAR, reducing_gap=2
    )
    return small.filter(ImageFilter.GaussianBlur(radius / factor)).resize(mask.size, Image.Resampling.BICUBIC)


def _puffy(mask: Image.Image, ink: Ink, resolution: int = 40) -> Image.Image:
    """Colours of a shape lit as if inflated: the slope of the blurred mask towards the light, at low resolution."""
    width, height = (max(4, edge * resolution // max(mask.size)) for edge in mask.size)
    solid = np.asarray(mask.resize((width, height), Image.Resampling.BOX), np.float32) / 255
    radius = max(1, round(0.28 * min(width, height)))
    dome = np.einsum(
        "ij,jk->ik", np.einsum("ij,jk->ik", _blur_matrix(height, radius), solid), _blur_matrix(width, radius)
    )
    slope_y, slope_x = np.gradient(dome)
    light = (slope_y * LIGHT[1] - slope_x * LIGHT[0]) * radius * 2.6
    colours = ramp(ink.fill, np.clip(light, -1, 1) * ink.volume)
    return Image.fromarray(colours).resize(mask.size, Image.Resampling.BICUBIC)


@lru_cache(maxsize=256)
def _blur_matrix(length: int, radius: int) -> NDArray[np.float32]:
    """(length, length), symmetric: a triangle filter of +-2 radius, zero outside of the picture."""
    offset = np.abs(np.arange(length)[:, None] - np.arange(length))
    peak = 2 * radius + 1
    return (np.maximum(peak - offset, 0) / peak**2).astype(np.float32)


def ramp(colour: RGB, light: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Shades of a colour, (H, W, 3): -1 is its shadow, towards violet; 1 its lit side, towards white."""
    base = np.array(colour, np.float32)
    vivid = (base.max() - base.min()) / 255
    shadow = base * 0.48 + np.array([16, 6, 34], np.float32) * (0.3 + 0.7 * vivid)
    lit = base + (np.array([255, 253, 240], np.float32) - base) * 0.48
    t = light[..., None]
    return np.clip(np.where(t < 0, base + (base - shadow) * t, base + (lit - base) * t), 0, 255).astype(np.uint8)


def shade(colour: RGB, amount: float) -> RGB:
    """A darker (amount < 0) or lighter tone of the colour."""
    r, g, b = (int(v) for v in ramp(colour, np.full((1, 1), amount, np.float32))[0, 0])
    return r, g, b
