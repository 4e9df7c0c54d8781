"""Eyes, mouths and horns."""

from __future__ import annotations

import numpy as np

from fastgen.data.synthetic.canvas import RGB, Ink, Pen

WHITE: RGB = (255, 255, 255)
DARK: RGB = (38, 30, 48)
IVORY: RGB = (246, 228, 190)
GOLD: RGB = (248, 200, 62)
BARK: RGB = (140, 94, 56)
EYES = {
    "one": ((0.0, 0.07, 0.45),),
    "two": ((-0.34, 0.04, 0.3), (0.34, 0.04, 0.3)),
    "three": ((-0.37, -0.07, 0.26), (0.37, -0.07, 0.26), (0.0, 0.33, 0.26)),
}


def draw_face(pen: Pen, eyes: str, look: str, mouth: str, iris: RGB, lid: RGB) -> None:
    """Eyes and mouth around the pen's origin; `look` and `mouth` are those of a Pose."""
    for x, y, r in EYES[eyes]:
        _eye(pen.at(x, y, sx=r), look, iris, lid, np.sign(x))
    _mouth(pen.at(0, {"one": -0.56, "two": -0.44, "three": -0.5}[eyes]), mouth)


def _eye(pen: Pen, look: str, iris: RGB, lid: RGB, side: float) -> None:
    """An eye of radius 1."""
    pen.ellipse(0, 0, 1, ink=Ink(WHITE, 0.3))
    if look == "dead":
        for flip in (-1, 1):
            pen.stroke([(-0.5, -0.5 * flip), (0.5, 0.5 * flip)], (0.26, 0.26), ink=Ink(DARK, 0, 0))
        return
    size = 0.34 if look == "shocked" else 0.62
    x, y = (0.0, 0.0) if look == "shocked" else (0.16, -0.04)
    if look != "shocked":
        pen.ellipse(x, y, size, ink=Ink(iris, 0.9, 0))
    pen.ellipse(x, y, size * (1 if look == "shocked" else 0.62), ink=Ink(DARK, 0, 0))
    pen.ellipse(x - 0.22, y + 0.26, 0.19, ink=Ink(WHITE, 0, 0))
    pen.ellipse(x + 0.2, y - 0.26, 0.09, ink=Ink(WHITE, 0, 0))
    if look == "drowsy":
        turn = np.radians(np.linspace(10, 170, 24))
        pen.polygon(np.stack([np.cos(turn), np.sin(turn)], -1), ink=Ink(lid, 0.5, 0.03, edge=DARK))
    elif look == "angry":
        slope = 0.34 * (side or 1)
        pen.stroke([(-1.05, 0.88 - slope), (0, 0.82), (1.05, 0.88 + slope)], (0.3, 0.42, 0.3), ink=Ink(DARK, 0, 0))


def _mouth(pen: Pen, mouth: str) -> None:
    line, inside = Ink(DARK, 0, 0), Ink((126, 28, 44), 0.2, 0.035, edge=DARK)
    if mouth == "smile":
        pen.stroke([(-0.24, 0.05), (0, -0.08), (0.24, 0.05)], (0.05, 0.075, 0.05), ink=line)
        pen.polygon([(0.06, -0.06), (0.18, -0.01), (0.13, -0.14)], ink=Ink(WHITE, 0, 0.02, edge=DARK))
    elif mouth == "calm":
        pen.stroke([(-0.16, 0), (0.16, 0)], (0.065, 0.065), ink=line)
    elif mouth == "shout":
        pen.ellipse(0, -0.03, 0.17, 0.15, ink=inside)
        pen.ellipse(0, -0.11, 0.1, 0.06, ink=Ink((242, 110, 120), 0, 0))
    elif mouth == "wail":
        pen.curve([(-0.22, -0.12), (-0.12, 0.06), (0.12, 0.06), (0.22, -0.12), (0, -0.08)], ink=inside)
    else:
        pen.curve([(-0.34, 0.08), (0, 0.03), (0.34, 0.08), (0.22, -0.15), (0, -0.2), (-0.22, -0.15)], ink=inside)
        for x in (-0.2, -0.07, 0.07, 0.2):
            pen.polygon([(x - 0.065, 0.06), (x + 0.065, 0.06), (x, -0.07)], ink=Ink(WHITE, 0, 0))


def draw_horns(pen: Pen, horns: str, side: tuple[float, float], top: tuple[float, float]) -> None:
    """Horns at `side` (and mirrored) or at `top`; drawn before the head, which hides their roots."""
    if horns == "unicorn":
        horn = pen.at(*top)
        horn.polygon([(-0.19, -0.12), (0.19, -0.12), (0.03, 0.92), (-0.03, 0.92)], ink=Ink(GOLD))
        for y in (0.14, 0.36, 0.56):
            w = 0.17 * (1 - y)
            horn.stroke([(-w, y - 0.04), (w, y + 0.06)], (0.045, 0.045), ink=Ink((196, 136, 24), 0, 0))
    elif horns in ("curved", "antlers"):
        for mirror in (-1, 1):
            horn = pen.at(mirror * side[0], side[1], sx=mirror, sy=1)
            (_curved_horn if horns == "curved" else _antler)(horn)


def _curved_horn(pen: Pen) -> None:
    pen.stroke([(-0.1, -0.14), (0.22, 0.16), (0.4, 0.44), (0.34, 0.84)], (0.38, 0.32, 0.22, 0.03), ink=Ink(IVORY))
    for a, b in (((0.02, 0.2), (0.32, 0.1)), ((0.2, 0.42), (0.46, 0.34))):
        pen.stroke([a, b], (0.04, 0.04), ink=Ink((190, 150, 100), 0, 0))


def _antler(pen: Pen) -> None:
    ink = Ink(BARK, 0.7)
    pen.stroke([(0.16, 0.28), (0.4, 0.36), (0.58, 0.56)], (0.14, 0.12, 0.05), ink=ink)
    pen.stroke([(-0.06, -0.16), (0.12, 0.24), (0.2, 0.56), (0.4, 0.94)], (0.19, 0.16, 0.14, 0.06), ink=ink)
    pen.stroke([(0.18, 0.52), (0.06, 0.74), (0.08, 0.94)], (0.13, 0.11, 0.05), ink=ink)


def star(points: int, inner: float, turn: float = 90) -> np.ndarray:
    """A star of radius 1 as a polygon."""
    angles = np.radians(turn + np.arange(2 * points) * 180 / points)
    radius = np.where(np.arange(2 * points) % 2 == 0, 1.0, inner)
    return np.stack([radius * np.cos(angles), radius * np.sin(angles)], -1)
