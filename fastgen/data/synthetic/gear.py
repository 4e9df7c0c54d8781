"""Wings, tails and weapons."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from fastgen.data.synthetic.canvas import RGB, Ink, Pen, shade

PLUM: RGB = (92, 62, 112)
FEATHER: RGB = (206, 226, 255)
STEEL: RGB = (196, 206, 218)
WOOD: RGB = (146, 92, 48)
GOLD: RGB = (246, 196, 58)


def draw_wings(pen: Pen, wings: str, root: tuple[float, float], flap: float, sides: tuple[int, ...]) -> None:
    """The wings, behind the body; `flap` from -1 (down) to 1 (up)."""
    if wings == "none":
        return
    for mirror in sides:
        wing = pen.at(mirror * root[0], root[1], sx=mirror, sy=1).at(angle=30 + 22 * flap)
        (_bat_wing if wings == "bat" else _feathered_wing)(wing)


def _bat_wing(pen: Pen) -> None:
    tips = ((1.28, 0.78), (1.26, 0.12), (0.84, -0.28), (0.3, -0.34))
    outline = [(0.0, 0.16), (0.3, 0.6), (0.62, 0.96), (0.9, 0.94), tips[0]]
    for (x0, y0), (x1, y1) in pairwise(tips):
        middle = np.array([(x0 + x1) / 2, (y0 + y1) / 2]) * 0.86 + np.array([0.0, 0.06])
        outline += [
            ((x0 + 2 * middle[0]) / 3, (y0 + 2 * middle[1]) / 3),
            ((x1 + 2 * middle[0]) / 3, (y1 + 2 * middle[1]) / 3),
            (x1, y1),
        ]
    pen.polygon(outline, ink=Ink(PLUM))
    bone = Ink(shade(PLUM, -0.9), 0, 0)
    for x, y in tips[:3]:
        pen.stroke(
            [(0.58, 0.9), (0.58 + 0.55 * (x - 0.58), 0.9 + 0.5 * (y - 0.9)), (x * 0.97, y * 0.97)],
            (0.09, 0.06, 0.02),
            ink=bone,
        )
    pen.stroke([(0, 0.02), (0.28, 0.52), (0.6, 0.94)], (0.18, 0.14, 0.1), ink=Ink(shade(PLUM, 0.25), 0.8))


def _feathered_wing(pen: Pen) -> None:
    ink = Ink(FEATHER, 0.9, 0.04, edge=(82, 104, 168))
    for angle, length, width in ((-42, 0.74, 0.3), (-16, 1.0, 0.34), (10, 1.2, 0.36), (35, 1.26, 0.34)):
        pen.at(0.05, 0, angle).stroke(
            [(0, 0), (length * 0.5, 0.06), (length, 0)], (width * 0.7, width, width * 0.6), ink=ink
        )
    down = Ink((250, 252, 255), 0.6, 0.04, edge=(82, 104, 168))
    for angle, length in ((-24, 0.5), (4, 0.62), (34, 0.66)):
        pen.at(0.02, 0, angle).stroke([(0, 0), (length, 0.02)], (0.28, 0.3), ink=down)


def draw_tail(pen: Pen, tail: str, root: tuple[float, float], wag: float, colour: RGB) -> None:
    """The tail, on the left behind the body."""
    if tail == "none":
        return
    pen = pen.at(*root, angle=wag)
    if tail == "pointed":
        ink = Ink(shade(colour, -0.35), 0.8)
        pen.polygon([(-0.8, 1.12), (-1.08, 0.72), (-0.8, 0.77), (-0.53, 0.66)], ink=Ink(shade(colour, -0.8), 0.8))
        pen.stroke(
            [(0.15, 0), (-0.26, -0.2), (-0.62, -0.1), (-0.72, 0.3), (-0.79, 0.82)],
            (0.2, 0.18, 0.16, 0.13, 0.09),
            ink=ink,
        )
    else:
        plume = [
            (0.2, 0.1), (-0.2, -0.18), (-0.6, -0.2), (-0.92, 0.08), (-1.0, 0.52), (-0.82, 1.02), (-0.6, 0.66),
            (-0.4, 0.44), (-0.1, 0.28),
        ]  # fmt: skip
        tip = [
            (-0.82, 1.02), (-0.99, 0.56), (-0.97, 0.34), (-0.82, 0.48), (-0.72, 0.34), (-0.58, 0.54), (-0.56, 0.64),
            (-0.64, 0.76),
        ]  # fmt: skip
        pen.curve(plume, ink=Ink(colour))
        pen.curve(tip, ink=Ink((255, 250, 242), 0.5, 0))


def _handle(pen: Pen, top: float, colour: RGB = WOOD, width: float = 0.14) -> None:
    pen.stroke([(0, -0.42), (0, top)], (width, width), ink=Ink(colour, 0.8))


def _axe(pen: Pen) -> None:
    _handle(pen, 1.3)
    pen.polygon([(-0.05, 1.14), (-0.34, 1.04), (-0.05, 0.9)], ink=Ink(STEEL))
    blade = [
        (0.02, 0.86), (0.26, 0.8), (0.52, 0.5), (0.74, 0.78), (0.78, 1.1), (0.7, 1.42), (0.5, 1.6), (0.26, 1.26),
        (0.02, 1.18),
    ]  # fmt: skip
    pen.curve(blade, ink=Ink(STEEL))
    pen.stroke([(0.62, 0.62), (0.71, 1.02), (0.58, 1.46)], (0.04, 0.08, 0.04), ink=Ink((252, 254, 255), 0, 0))


def _sword(pen: Pen) -> None:
    pen.stroke([(0, -0.34), (0, 0.14)], (0.14, 0.14), ink=Ink((112, 62, 44), 0.8))
    pen.polygon([(-0.15, 0.14), (0.15, 0.14), (0.16, 1.3), (0, 1.62), (-0.16, 1.3)], ink=Ink(STEEL, 0.5))
    pen.polygon([(-0.15, 0.16), (0, 0.16), (0, 1.6), (-0.15, 1.29)], ink=Ink((238, 244, 250), 0, 0))
    pen.stroke([(-0.36, 0.22), (0, 0.14), (0.36, 0.22)], (0.14, 0.18, 0.14), ink=Ink(GOLD))
    pen.ellipse(0, -0.38, 0.11, ink=Ink(GOLD))


def _trident(pen: Pen) -> None:
    _handle(pen, 0.9, (78, 104, 150))
    ink = Ink(GOLD)
    pen.stroke(
        [(-0.4, 1.36), (-0.38, 0.98), (0, 0.84), (0.38, 0.98), (0.4, 1.36)], (0.15, 0.16, 0.18, 0.16, 0.15), ink=ink
    )
    pen.polygon([(-0.09, 0.86), (0.09, 0.86), (0.09, 1.3), (-0.09, 1.3)], ink=ink)
    for x, y in ((-0.4, 1.3), (0, 1.28), (0.4, 1.3)):
        pen.polygon([(x - 0.17, y), (x + 0.17, y), (x, y + 0.36)], ink=ink)


def _hammer(pen: Pen) -> None:
    _handle(pen, 1.34)
    pen.polygon(
        [(-0.5, 0.84), (0.5, 0.84), (0.54, 0.9), (0.54, 1.34), (0.5, 1.4), (-0.5, 1.4), (-0.54, 1.34), (-0.54, 0.9)],
        ink=Ink((120, 128, 142)),
    )
    for x in (-0.4, 0.4):
        pen.polygon([(x - 0.07, 0.84), (x + 0.07, 0.84), (x + 0.07, 1.4), (x - 0.07, 1.4)], ink=Ink(GOLD, 0.8, 0.02))


def _staff(pen: Pen) -> None:
    _handle(pen, 1.06, (116, 70, 44))
    pen.ellipse(0, 1.34, 0.42, ink=Ink((120, 250, 200), 0, 0, soft=0.1, alpha=0.5))
    pen.stroke([(0, 0.9), (-0.28, 1.12), (-0.26, 1.44)], (0.13, 0.12, 0.06), ink=Ink((116, 70, 44), 0.8))
    pen.stroke([(0, 0.9), (0.28, 1.12), (0.26, 1.44)], (0.13, 0.12, 0.06), ink=Ink((116, 70, 44), 0.8))
    pen.ellipse(0, 1.36, 0.25, ink=Ink((44, 214, 160)))
    pen.ellipse(-0.08, 1.45, 0.07, ink=Ink((255, 255, 255), 0, 0))


WEAPONS: dict[str, Callable[[Pen], None]] = {
    "axe": _axe,
    "sword": _sword,
    "trident": _trident,
    "hammer": _hammer,
    "staff": _staff,
}
