"""A whole monster in one frame of an action: shadow, parts from back to front, effects."""

from __future__ import annotations

import numpy as np
from PIL import Image

from fastgen.data.synthetic.bodies import BODIES, Body
from fastgen.data.synthetic.canvas import RGB, Ink, Pen, Shape, bounds, oval, paint, ribbon, shade
from fastgen.data.synthetic.faces import draw_face, draw_horns, star
from fastgen.data.synthetic.gear import WEAPONS, draw_tail, draw_wings
from fastgen.data.synthetic.poses import Pose, frame_count, pose
from fastgen.data.synthetic.traits import Look, Traits, tint

WHITE: RGB = (255, 255, 255)


def render_action(traits: Traits, look: Look, action: str, frames: int, size: int) -> list[Image.Image]:
    """The frames of one action (at most `frames`), each size x size RGB, framed alike so that the figure moves."""
    count = frame_count(action, frames)
    drawn = [draw_monster(traits, look, action, frame, count) for frame in range(count)]
    boxes = np.stack([bounds(shapes) for shapes in drawn])
    box = np.concatenate([boxes[:, :2].min(0), boxes[:, 2:].max(0)])
    return [paint(shapes, box, size) for shapes in drawn]


def draw_monster(traits: Traits, look: Look, action: str, frame: int, count: int) -> list[Shape]:
    """The shapes of frame `frame` of `count`, back to front."""
    shapes: list[Shape] = []
    ground = Pen(shapes)
    stance, body, colour = pose(action, frame, count), BODIES[traits.body], tint(traits, look)
    _shadow(ground, stance, action)
    _behind(ground, stance, action, traits.weapon != "none", frame, count)
    figure: list[Shape] = []
    wide, tall = look.width * (1 + stance.squash), look.height * (1 - stance.squash)
    pen = Pen(figure).at(stance.x, stance.y + body.hover, stance.lean, wide, tall)
    _figure(pen, traits, look, body, stance, colour, armed=action != "die1")
    if action == "die1":
        figure = _settle(figure)
    shapes += figure
    _in_front(ground, stance, action, traits, frame, count)
    return shapes


def _figure(pen: Pen, traits: Traits, look: Look, body: Body, stance: Pose, colour: RGB, armed: bool) -> None:
    draw_wings(pen, traits.wings, body.wing, stance.flap, sides=(-1,) if stance.lying else (-1, 1))
    draw_tail(pen, traits.tail, body.tail, stance.wag, colour)
    skin = Ink(shade(colour, -0.15), 0.8)
    off_hand = (-body.hand[0] - stance.off_arm[0], body.hand[1] + stance.off_arm[1])
    _arm(pen, (-body.shoulder[0], body.shoulder[1]), off_hand, body.arm_width, skin)
    draw_horns(pen, traits.horns, body.horn, body.top)
    body.legs(pen, colour, stance)
    body.torso(pen, colour, stance)
    draw_face(
        pen.at(*body.face, sx=body.face_scale), traits.eyes, stance.eyes, stance.mouth, look.iris, shade(colour, -0.1)
    )
    hand = (body.hand[0] + stance.arm[0], body.hand[1] + stance.arm[1])
    if armed and traits.weapon != "none":
        WEAPONS[traits.weapon](pen.at(*hand, angle=stance.weapon))
    _arm(pen, body.shoulder, hand, body.arm_width, skin)


def _arm(pen: Pen, shoulder: tuple[float, float], hand: tuple[float, float], width: float, ink: Ink) -> None:
    elbow = ((shoulder[0] + hand[0]) / 2, (shoulder[1] + hand[1]) / 2 - 0.08)
    arm = ribbon(np.array([shoulder, elbow, hand]), (width, width * 0.9, width))
    pen.polygon(arm, oval(*hand, width * 0.72), ink=ink)


def _settle(figure: list[Shape]) -> list[Shape]:
    """Let a fallen figure touch the ground in the middle of the picture."""
    left, bottom, right, _ = bounds(figure)
    shift = np.array([-(left + right) / 2, -bottom])
    return [Shape(tuple(p + shift for p in shape.polygons), shape.ink, shape.framed) for shape in figure]


def _shadow(pen: Pen, stance: Pose, action: str) -> None:
    wide = 1.45 if action == "die1" else 1.05 / (1 + 0.45 * stance.y)
    ink = Ink((86, 84, 104), 0, 0, soft=0.1, alpha=0.42 / (1 + 0.5 * stance.y))
    pen.ellipse(stance.x * 0.8, 0.0, wide, 0.13, ink=ink)


def _behind(pen: Pen, stance: Pose, action: str, armed: bool, frame: int, count: int) -> None:
    if action == "attack1" and armed:
        _slash(pen, frame / max(1, count - 1))
    elif action == "skill1":
        pen.ellipse(0, 1.1, 1.5, 1.5, ink=Ink((255, 222, 90), 0, 0, soft=0.3, alpha=0.75), framed=False)
        pen.polygon(oval(0, 0.02, 1.5, 0.32), ink=Ink((255, 232, 120), 0, 0.05, alpha=0.9, edge=(240, 170, 30)))
        pen.polygon(oval(0, 0.02, 1.2, 0.24), ink=Ink((255, 246, 190), 0, 0.03, edge=(240, 170, 30)))
    elif action == "move":
        for i, (x, y, r) in enumerate(((-1.2, 0.16, 0.2), (-1.5, 0.28, 0.15), (-1.42, 0.1, 0.13))):
            grow = 0.8 + 0.35 * ((frame + i) % 3)
            pen.ellipse(x, y, r * grow, ink=Ink((222, 214, 204), 0.5, 0.025, edge=(170, 160, 152)))
    elif action == "jump":
        for x in (-0.6, 0.0, 0.6):
            pen.stroke(
                [(x, 0.16), (x * 0.9, 0.16 + 0.6 * stance.y)], (0.02, 0.07), ink=Ink((176, 190, 214), 0, 0, alpha=0.9)
            )


def _in_front(pen: Pen, stance: Pose, action: str, traits: Traits, frame: int, count: int) -> None:
    if action == "attack1" and traits.weapon == "none":
        _slash(pen, frame / max(1, count - 1))
    elif action == "hit1":
        flash = pen.at(-0.68, 1.2, 12 * frame, 0.66 + 0.1 * frame)
        flash.polygon(star(9, 0.5), ink=Ink((255, 214, 50), 0, 0.05, edge=(232, 110, 30)))
        flash.at(sx=0.62).polygon(star(9, 0.5), ink=Ink(WHITE, 0, 0))
    elif action == "die1":
        if traits.weapon != "none":
            WEAPONS[traits.weapon](pen.at(-0.75, 0.14, 84, 0.85))
        for i, (x, y) in enumerate(((0.5, 2.0), (1.0, 2.2), (1.45, 1.95))):
            pen.at(x, y, 25 * (frame + i), 0.17).polygon(star(5, 0.45), ink=Ink((255, 214, 60), 0.4, 0.03))
    elif action == "skill1":
        for i in range(7):
            angle = np.radians(i * 360 / 7 + 360 * frame / (7 * count))
            x, y = 1.62 * np.cos(angle), 1.2 + 1.2 * np.sin(angle)
            pen.at(x, y, 0, 0.2 if i % 2 else 0.14).polygon(
                star(4, 0.3), ink=Ink((255, 250, 214), 0, 0.03, edge=(240, 170, 30))
            )


def _slash(pen: Pen, t: float) -> None:
    """A crescent that the swing leaves in the air."""
    start, sweep = 78.0, 50 + 75 * t
    turn = np.radians(np.linspace(start, start - sweep, 24))
    outer = np.stack([np.cos(turn), np.sin(turn)], -1)
    taper = np.sin(np.linspace(0, np.pi, 24))[:, None]
    crescent = np.concatenate([outer * 1.5, (outer * (1.5 - 0.5 * taper))[::-1]])
    pen.at(0.45, 0.9).polygon(crescent, ink=Ink((214, 240, 255), 0, 0.03, alpha=0.92, edge=(110, 170, 226)))
