"""How a monster holds itself in each action; `t` runs from 0 to 1 over an action's frames."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import pi, sin

MAX_FRAMES = {"main": 1, "hit1": 2}  # all other actions: as many as asked for


@dataclass(frozen=True)
class Pose:
    """Displacements from the resting figure; angles in degrees, counter-clockwise."""

    x: float = 0.0
    y: float = 0.0
    lean: float = 0.0
    squash: float = 0.0  # wider and flatter
    arm: tuple[float, float] = (0.0, 0.0)  # displacement of the weapon hand
    off_arm: tuple[float, float] = (0.0, 0.0)  # of the other hand, away from the body
    weapon: float = -8.0  # its angle; 0 points up
    step: float = 0.0  # -1 to 1: which foot is in front
    flap: float = 0.0  # -1 to 1: wings down or up
    wag: float = 0.0  # degrees
    eyes: str = "open"  # open, angry, shocked, drowsy, dead
    mouth: str = "smile"  # smile, fangs, shout, wail, calm
    lying: bool = False  # on its side: what would be underneath is not drawn


def _main(t: float) -> Pose:
    return Pose(arm=(0.0, 0.12), flap=0.35)


def _stand(t: float) -> Pose:
    breath = sin(2 * pi * t + 0.4)
    return Pose(
        squash=0.05 + 0.05 * breath, arm=(0.0, -0.16), off_arm=(0.0, -0.12), weapon=-3, flap=-0.6 + 0.1 * breath,
        wag=9 * breath, eyes="drowsy", mouth="calm",
    )  # fmt: skip


def _move(t: float) -> Pose:
    swing = sin(2 * pi * t + 0.7)
    return Pose(
        y=0.07 * abs(swing), lean=-10 - 2 * swing, arm=(0.02, 0.05 + 0.1 * swing), off_arm=(0.06, 0.16 - 0.14 * swing),
        weapon=-16 + 6 * swing, step=swing, flap=0.5 * swing, wag=14 * swing,
    )  # fmt: skip


def _attack(t: float) -> Pose:
    swing = t**0.6
    return Pose(
        x=-0.08 + 0.22 * swing, lean=-2 - 11 * swing, squash=0.03, arm=(-0.02 - 0.2 * swing, 0.42 - 0.42 * swing),
        off_arm=(0.1, 0.2), weapon=22 - 80 * swing, step=0.9, flap=1 - 1.4 * swing, wag=-12 + 24 * swing,
        eyes="angry", mouth="fangs",
    )  # fmt: skip


def _hit(t: float) -> Pose:
    return Pose(
        x=0.15 + 0.1 * t, lean=-17 - 7 * t, squash=0.07 - 0.05 * t, arm=(0.02, 0.42), off_arm=(0.1, 0.46),
        weapon=8 - 8 * t, step=0.8, flap=0.8 - 0.3 * t, wag=16, eyes="shocked", mouth="wail",
    )  # fmt: skip


def _die(t: float) -> Pose:
    fall = min(1.0, 0.76 + 0.4 * t)
    return Pose(
        lean=-100 * fall, squash=0.06 * t, arm=(-0.36, -0.1), off_arm=(0.1 - 0.1 * t, 0.42 - 0.3 * t), step=0.7,
        flap=0.6 - 0.9 * t, wag=-25 + 15 * t, eyes="dead", mouth="wail", lying=True,
    )  # fmt: skip


def _skill(t: float) -> Pose:
    pulse = sin(2 * pi * t + 0.4)
    return Pose(
        y=0.18 + 0.06 * pulse, squash=-0.04, arm=(0.02, 0.5 + 0.05 * pulse), off_arm=(0.04, 0.56 + 0.05 * pulse),
        weapon=-4 + 5 * pulse, flap=0.75 + 0.25 * pulse, wag=10 * pulse, eyes="angry", mouth="shout",
    )  # fmt: skip


def _jump(t: float) -> Pose:
    height = sin(pi * (0.25 + 0.5 * t))
    return Pose(
        y=0.25 + 0.55 * height, lean=-4 + 8 * (t - 0.5), squash=-0.09 * height, arm=(0.02, 0.36), off_arm=(0.06, 0.4),
        weapon=-12, step=0.5, flap=1 - 1.6 * t, wag=-20 + 10 * t, mouth="shout",
    )  # fmt: skip


POSES: dict[str, Callable[[float], Pose]] = {
    "main": _main, "attack1": _attack, "die1": _die, "hit1": _hit, "stand": _stand, "move": _move, "skill1": _skill,
    "jump": _jump,
}  # fmt: skip


def frame_count(action: str, frames: int) -> int:
    """How many of at most `frames` an action has."""
    return min(frames, MAX_FRAMES.get(action, frames))


def pose(action: str, frame: int, count: int) -> Pose:
    """Frame `frame` of `count`: cyclic actions do not repeat their first frame, the others end in their last pose."""
    cyclic = action in ("stand", "move", "skill1")
    t = frame / count if cyclic else frame / max(1, count - 1)
    if count == 1 and action in ("attack1", "die1", "jump"):
        t = 0.6
    return POSES[action](t)
