"""The eight bodies: how they are drawn and where eyes, arms, horns, wings and tail are attached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fastgen.data.synthetic import torsos
from fastgen.data.synthetic.canvas import RGB, Pen
from fastgen.data.synthetic.poses import Pose

XY = tuple[float, float]


@dataclass(frozen=True)
class Body:
    """Anchors on the right-hand side of the picture (mirrored for the left) and the two drawing functions."""

    legs: Callable[[Pen, RGB, Pose], None]
    torso: Callable[[Pen, RGB, Pose], None]
    face: XY
    face_scale: float
    shoulder: XY
    hand: XY
    arm_width: float
    horn: XY  # base of the right horn
    top: XY  # base of a horn in the middle
    wing: XY
    tail: XY  # on the left
    hover: float = 0.0


BODIES: dict[str, Body] = {
    "round": Body(
        torsos.round_legs, torsos.round_torso, face=(0, 1.14), face_scale=1.0, shoulder=(0.82, 0.92),
        hand=(0.98, 0.72), arm_width=0.22, horn=(0.46, 1.66), top=(0, 1.8),
        wing=(0.55, 1.25), tail=(-0.56, 0.45),
    ),
    "slime": Body(
        torsos.no_legs, torsos.slime_torso, face=(0, 0.78), face_scale=1.0, shoulder=(0.86, 0.7),
        hand=(1.04, 0.66), arm_width=0.26, horn=(0.52, 1.2), top=(0.08, 1.66),
        wing=(0.6, 0.95), tail=(-0.72, 0.3),
    ),
    "mushroom": Body(
        torsos.mushroom_legs, torsos.mushroom_torso, face=(0, 0.68), face_scale=0.82, shoulder=(0.54, 0.66),
        hand=(0.9, 0.62), arm_width=0.2, horn=(0.62, 1.98), top=(0, 2.1),
        wing=(0.5, 0.85), tail=(-0.38, 0.36),
    ),
    "ghost": Body(
        torsos.no_legs, torsos.ghost_torso, face=(0, 1.32), face_scale=0.96, shoulder=(0.76, 1.0),
        hand=(1.04, 0.86), arm_width=0.26, horn=(0.44, 1.82), top=(0, 1.92),
        wing=(0.55, 1.15), tail=(-0.62, 0.5), hover=0.28,
    ),
    "robot": Body(
        torsos.robot_legs, torsos.robot_torso, face=(0, 1.58), face_scale=0.84, shoulder=(0.6, 0.84),
        hand=(0.94, 0.68), arm_width=0.18, horn=(0.5, 1.98), top=(0, 1.98),
        wing=(0.5, 0.95), tail=(-0.4, 0.5),
    ),
    "octopus": Body(
        torsos.octopus_legs, torsos.octopus_torso, face=(0, 1.28), face_scale=0.96, shoulder=(0.7, 1.0),
        hand=(1.02, 0.86), arm_width=0.24, horn=(0.46, 1.88), top=(0, 1.98),
        wing=(0.6, 1.3), tail=(-0.62, 1.2),
    ),
    "spider": Body(
        torsos.spider_legs, torsos.spider_torso, face=(0, 1.02), face_scale=0.92, shoulder=(0.74, 0.9),
        hand=(1.02, 0.78), arm_width=0.18, horn=(0.4, 1.56), top=(0, 1.66),
        wing=(0.45, 1.3), tail=(-0.62, 1.1),
    ),
    "cat": Body(
        torsos.cat_legs, torsos.cat_torso, face=(0, 1.32), face_scale=0.92, shoulder=(0.5, 0.72),
        hand=(0.94, 0.66), arm_width=0.24, horn=(0.26, 1.82), top=(0, 1.84),
        wing=(0.5, 0.9), tail=(-0.36, 0.3),
    ),
}  # fmt: skip
