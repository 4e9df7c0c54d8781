"""How legs and torso of each body are drawn: the ground is y = 0, the figure about 2 high, seen from the front."""

from __future__ import annotations

import numpy as np

from fastgen.data.synthetic.canvas import RGB, Ink, Pen, shade
from fastgen.data.synthetic.poses import Pose

CREAM: RGB = (250, 232, 204)
STEEL: RGB = (176, 184, 196)


def feet(pen: Pen, colour: RGB, pose: Pose, spread: float, rx: float, ry: float) -> None:
    ink = Ink(shade(colour, -0.55))
    for side in (-1, 1):
        lift = max(0.0, side * pose.step) * 0.16
        pen.ellipse(side * spread + 0.12 * pose.step * side, ry + lift, rx, ry, ink=ink)


def gleam(pen: Pen, x: float, y: float, rx: float, ry: float, angle: float = 35) -> None:
    """The light's reflection."""
    pen.at(x, y, angle).ellipse(0, 0, rx, ry, ink=Ink((255, 255, 255), 0, 0, soft=0.035, alpha=0.75))


def round_legs(pen: Pen, colour: RGB, pose: Pose) -> None:
    feet(pen, colour, pose, 0.4, 0.3, 0.17)


def round_torso(pen: Pen, colour: RGB, pose: Pose) -> None:
    pen.ellipse(0, 1.0, 0.9, 0.88, ink=Ink(colour))
    pen.ellipse(0, 0.58, 0.5, 0.36, ink=Ink(shade(colour, 0.75), 0, 0, soft=0.04, alpha=0.8))
    gleam(pen, -0.46, 1.56, 0.2, 0.1)


def no_legs(pen: Pen, colour: RGB, pose: Pose) -> None:
    pass


def slime_torso(pen: Pen, colour: RGB, pose: Pose) -> None:
    w = 0.06 * pose.step
    outline = [
        (0.1, 1.98), (0.2, 1.66), (0.52, 1.32), (0.88, 0.86), (1.06, 0.36), (1.0, 0.08), (0.74, 0.02), (0.5, 0.1 + w),
        (0.26, 0.0), (0.0, 0.09 - w), (-0.3, 0.0), (-0.54, 0.09 + w), (-0.8, 0.01), (-1.04, 0.1), (-1.06, 0.4),
        (-0.88, 0.88), (-0.5, 1.36), (-0.16, 1.66), (-0.06, 1.84),
    ]  # fmt: skip
    pen.curve(outline, ink=Ink(colour))
    pen.ellipse(0.1, 0.3, 0.66, 0.17, ink=Ink(shade(colour, 0.8), 0, 0, soft=0.07, alpha=0.6))
    for x, y, r in ((0.66, 0.62, 0.075), (-0.72, 0.42, 0.06), (0.54, 0.36, 0.045)):
        pen.ellipse(x, y, r, ink=Ink(shade(colour, 0.9), 0, 0, alpha=0.75))
    gleam(pen, -0.5, 1.14, 0.22, 0.085, 56)


def mushroom_legs(pen: Pen, colour: RGB, pose: Pose) -> None:
    feet(pen, CREAM, pose, 0.34, 0.26, 0.14)


def mushroom_torso(pen: Pen, colour: RGB, pose: Pose) -> None:
    stem = [(-0.5, 1.2), (-0.6, 0.7), (-0.66, 0.3), (-0.42, 0.08), (0.42, 0.08), (0.66, 0.3), (0.6, 0.7), (0.5, 1.2)]
    pen.curve(stem, ink=Ink(CREAM))
    cap = [
        (-1.12, 1.2), (-1.08, 1.5), (-0.78, 1.94), (-0.3, 2.18), (0.3, 2.18), (0.78, 1.94), (1.08, 1.5), (1.12, 1.2),
        (0.72, 1.06), (0, 1.02), (-0.72, 1.06),
    ]  # fmt: skip
    pen.ellipse(0, 1.02, 0.5, 0.14, ink=Ink((150, 116, 100), 0, 0, soft=0.06, alpha=0.55))
    pen.curve(cap, ink=Ink(colour))
    spot = Ink((255, 250, 240), 0.35, 0)
    for x, y, rx, ry in (
        (-0.62, 1.5, 0.19, 0.17),
        (0.05, 1.78, 0.25, 0.2),
        (0.68, 1.46, 0.2, 0.17),
        (0.12, 1.26, 0.12, 0.09),
    ):
        pen.ellipse(x, y, rx, ry, ink=spot)
    gleam(pen, -0.58, 1.88, 0.2, 0.07)


def ghost_torso(pen: Pen, colour: RGB, pose: Pose) -> None:
    w = 0.07 * (1 if pose.step >= 0 else -1)
    outline = [
        (0, 2.0), (0.48, 1.88), (0.8, 1.46), (0.86, 0.9), (0.98, 0.24), (0.8, 0.02 + w), (0.58, 0.26), (0.34, 0.02 - w),
        (0.1, 0.26), (-0.14, 0.02 + w), (-0.38, 0.26), (-0.62, 0.0), (-0.86, 0.24), (-1.08, 0.06 - w), (-0.96, 0.4),
        (-0.86, 0.9), (-0.8, 1.46), (-0.48, 1.88),
    ]  # fmt: skip
    pen.curve(outline, ink=Ink(colour, 0.9))
    pen.ellipse(0, 0.42, 0.62, 0.3, ink=Ink(shade(colour, 1), 0, 0, soft=0.12, alpha=0.65))
    gleam(pen, -0.46, 1.64, 0.18, 0.09, 48)


def box(pen: Pen, left: float, bottom: float, right: float, top: float, ink: Ink, corner: float = 0.12) -> None:
    """A rectangle with round corners."""
    turn = np.radians(np.arange(0, 91, 15))
    arc = np.stack([np.cos(turn), np.sin(turn)], -1) * corner
    corners = ((right - corner, top - corner, 1, 1), (left + corner, top - corner, -1, 1),
               (left + corner, bottom + corner, -1, -1), (right - corner, bottom + corner, 1, -1))  # fmt: skip
    parts = [(x, y) + (arc if fx * fy > 0 else arc[::-1]) * (fx, fy) for x, y, fx, fy in corners]
    pen.polygon(np.concatenate(parts), ink=ink)


def robot_legs(pen: Pen, colour: RGB, pose: Pose) -> None:
    for side in (-1, 1):
        lift = max(0.0, side * pose.step) * 0.16
        x = side * 0.32 + 0.1 * pose.step * side
        box(pen, x - 0.1, 0.12 + lift, x + 0.1, 0.5, Ink(STEEL), 0.03)
        box(pen, x - 0.26, lift, x + 0.26, 0.24 + lift, Ink(shade(colour, -0.5)), 0.08)


def robot_torso(pen: Pen, colour: RGB, pose: Pose) -> None:
    box(pen, -0.16, 0.9, 0.16, 1.2, Ink(STEEL), 0.03)
    box(pen, -0.6, 0.38, 0.6, 1.02, Ink(colour), 0.12)
    box(pen, -0.3, 0.5, 0.3, 0.86, Ink((236, 240, 244), 0.4, 0.03), 0.06)
    for x, light in ((-0.16, (236, 70, 60)), (0, (250, 200, 50)), (0.16, (80, 190, 90))):
        pen.ellipse(x, 0.68, 0.06, ink=Ink(light, 0.5, 0))
    for side in (-1, 1):
        box(pen, side * 0.84 - 0.12, 1.36, side * 0.84 + 0.12, 1.72, Ink(STEEL), 0.05)
    box(pen, -0.84, 1.1, 0.84, 2.04, Ink(colour), 0.2)
    box(pen, -0.7, 1.2, 0.7, 1.92, Ink((190, 226, 240), 0.4, 0.03), 0.16)
    gleam(pen, -0.5, 1.98, 0.24, 0.03, 0)


def octopus_legs(pen: Pen, colour: RGB, pose: Pose) -> None:
    sway = 0.1 * pose.step
    for i, x in enumerate((-0.62, 0.62, -0.38, 0.38, -0.13, 0.13)):
        side, reach = (1 if x > 0 else -1), abs(x)
        foot = 0.1 + max(0.0, pose.step * (1 if i % 2 else -1)) * 0.14
        knee, toe = x * 1.5 + sway, side * (0.16 + 0.3 * reach)
        path = [
            (x * 0.8, 0.95), (x * 1.25, 0.5), (knee, 0.18 + foot / 2), (knee + toe, foot),
            (knee + 1.5 * toe, foot + 0.2),
        ]  # fmt: skip
        pen.stroke(path, (0.42, 0.34, 0.28, 0.2, 0.1), ink=Ink(shade(colour, -0.18), 0.8))


def octopus_torso(pen: Pen, colour: RGB, pose: Pose) -> None:
    head = [
        (0, 2.06), (0.56, 1.92), (0.86, 1.46), (0.74, 0.98), (0.5, 0.7), (0, 0.62), (-0.5, 0.7), (-0.74, 0.98),
        (-0.86, 1.46), (-0.56, 1.92),
    ]  # fmt: skip
    pen.curve(head, ink=Ink(colour))
    for x, y, r in ((0.52, 1.78, 0.09), (0.66, 1.54, 0.06), (0.3, 1.92, 0.05)):
        pen.ellipse(x, y, r, ink=Ink(shade(colour, 0.8), 0, 0, alpha=0.7))
    gleam(pen, -0.44, 1.72, 0.2, 0.1, 42)


def spider_legs(pen: Pen, colour: RGB, pose: Pose) -> None:
    for i, (knee, foot) in enumerate(
        (
            ((1.0, 1.42), (1.42, 0.5)),
            ((1.14, 1.06), (1.5, 0.06)),
            ((0.98, 0.72), (1.16, 0.02)),
            ((0.7, 0.44), (0.66, 0.02)),
        )
    ):
        for side in (-1, 1):
            lift = max(0.0, pose.step * (1 if (i + side) % 4 < 2 else -1)) * 0.16
            path = [(side * 0.4, 0.86), (side * knee[0], knee[1]), (side * foot[0], foot[1] + lift)]
            pen.stroke(path, (0.22, 0.2, 0.15, 0.08), ink=Ink(shade(colour, -0.38), 0.8))


def spider_torso(pen: Pen, colour: RGB, pose: Pose) -> None:
    angles = np.linspace(0, 2 * np.pi, 44, endpoint=False)
    radius = np.where(np.arange(44) % 2 == 0, 1.0, 0.93)
    fuzz = np.stack([0.8 * radius * np.cos(angles), 0.98 + 0.76 * radius * np.sin(angles)], -1)
    pen.polygon(fuzz, ink=Ink(colour))
    for x, y, r in ((0.0, 1.62, 0.075), (-0.2, 1.58, 0.055), (0.2, 1.58, 0.055)):
        pen.ellipse(x, y, r, ink=Ink(shade(colour, 0.9), 0, 0, alpha=0.8))
    gleam(pen, -0.44, 1.42, 0.17, 0.09, 42)


def cat_legs(pen: Pen, colour: RGB, pose: Pose) -> None:
    pen.curve(
        [(-0.62, 0.3), (-0.56, 0.75), (0, 1.0), (0.56, 0.75), (0.62, 0.3), (0.4, 0.08), (-0.4, 0.08)], ink=Ink(colour)
    )
    pen.ellipse(0, 0.4, 0.32, 0.28, ink=Ink(shade(colour, 0.95), 0, 0, soft=0.03, alpha=0.85))
    feet(pen, shade(colour, 0.5), pose, 0.4, 0.25, 0.15)


def cat_torso(pen: Pen, colour: RGB, pose: Pose) -> None:
    for side in (-1, 1):
        ear = [
            (side * 0.3, 1.72), (side * 0.46, 2.1), (side * 0.78, 2.36), (side * 0.86, 1.9), (side * 0.84, 1.4),
            (side * 0.5, 1.5),
        ]  # fmt: skip
        pen.curve(ear, ink=Ink(colour))
        pen.polygon([(side * 0.46, 1.74), (side * 0.73, 2.18), (side * 0.77, 1.66)], ink=Ink((255, 176, 186), 0.4, 0))
    head = [
        (0, 1.92), (0.5, 1.86), (0.88, 1.5), (0.98, 1.1), (0.66, 0.76), (0, 0.66), (-0.66, 0.76), (-0.98, 1.1),
        (-0.88, 1.5), (-0.5, 1.86),
    ]  # fmt: skip
    pen.curve(head, ink=Ink(colour))
    pen.ellipse(0, 0.92, 0.4, 0.2, ink=Ink(shade(colour, 0.95), 0, 0, soft=0.03, alpha=0.85))
    for side in (-1, 1):
        for dy in (0.05, -0.07):
            pen.stroke(
                [(side * 0.66, 1.0 + dy * 0.6), (side * 1.16, 1.02 + 2 * dy)],
                (0.035, 0.02),
                ink=Ink((90, 84, 96), 0, 0),
            )
    gleam(pen, -0.5, 1.64, 0.2, 0.08)
