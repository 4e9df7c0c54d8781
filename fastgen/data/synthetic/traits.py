"""The attributes of a monster, which combinations are kept for testing, and its actions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastgen.data.synthetic.canvas import RGB

COLOURS: dict[str, RGB] = {
    "red": (222, 52, 48),
    "orange": (250, 140, 32),
    "yellow": (252, 212, 44),
    "green": (74, 182, 66),
    "cyan": (54, 208, 216),
    "blue": (48, 92, 226),
    "purple": (142, 66, 204),
    "pink": (252, 138, 186),
    "brown": (138, 86, 48),
    "gray": (142, 146, 154),
}
VALUES: dict[str, tuple[str, ...]] = {
    "body": ("round", "slime", "mushroom", "ghost", "robot", "octopus", "spider", "cat"),
    "colour": tuple(COLOURS),
    "eyes": ("one", "two", "three"),
    "horns": ("none", "curved", "unicorn", "antlers"),
    "wings": ("none", "bat", "feathered"),
    "tail": ("none", "pointed", "fluffy"),
    "weapon": ("none", "axe", "sword", "trident", "hammer", "staff"),
}
ACTIONS: dict[str, str] = {
    "main": "",
    "attack1": "The monster is attacking.",
    "die1": "The monster is dying.",
    "hit1": "The monster is being hit.",
    "stand": "The monster is standing still.",
    "move": "The monster is moving.",
    "skill1": "The monster is using a skill.",
    "jump": "The monster is jumping.",
}
HELD_OUT_SHARE = 8  # one combination in so many is kept for testing


@dataclass(frozen=True)
class Traits:
    """One value of VALUES per attribute; what a description names."""

    body: str
    colour: str
    eyes: str
    horns: str
    wings: str
    tail: str
    weapon: str

    def held_out(self) -> bool:
        """Whether the combination is for testing only; every pair of values occurs both in training and in testing."""
        checksum = sum(
            (2 * i + 1) * values.index(getattr(self, name)) for i, (name, values) in enumerate(VALUES.items())
        )
        return checksum % HELD_OUT_SHARE == 0


@dataclass(frozen=True)
class Look:
    """What differs between monsters of the same traits and is not described."""

    width: float
    height: float
    tint: tuple[float, float, float]  # added to the colour: to all channels, red, blue
    iris: RGB


def draw_traits(rng: np.random.Generator, held_out: bool) -> Traits:
    """Random traits from the training combinations or from the held-out ones."""
    while True:
        traits = Traits(**{name: str(rng.choice(values)) for name, values in VALUES.items()})
        if traits.held_out() == held_out:
            return traits


def draw_look(rng: np.random.Generator) -> Look:
    """Random proportions and tints."""
    irises: tuple[RGB, ...] = ((52, 120, 200), (70, 150, 60), (176, 92, 30), (150, 50, 150), (200, 44, 40))
    return Look(
        width=float(rng.uniform(0.93, 1.08)),
        height=float(rng.uniform(0.93, 1.08)),
        tint=(float(rng.uniform(-12, 12)), float(rng.uniform(-5, 5)), float(rng.uniform(-5, 5))),
        iris=irises[int(rng.integers(len(irises)))],
    )


def tint(traits: Traits, look: Look) -> RGB:
    """The body colour of one monster."""
    value, red, blue = look.tint
    r, g, b = COLOURS[traits.colour]
    return _byte(r + value + red), _byte(g + value), _byte(b + value + blue)


def _byte(value: float) -> int:
    return round(min(max(value, 0), 255))
