"""English for the traits of a monster: short captions in the style of the real task's, each naming every attribute."""

from __future__ import annotations

import numpy as np

from fastgen.data.synthetic.traits import Traits

PHRASES: dict[str, dict[str, tuple[str, ...]]] = {
    "body": {
        "round": ("round monster", "ball-shaped monster", "ball-shaped creature"),
        "slime": ("slime monster", "slime", "slime creature"),
        "mushroom": ("mushroom monster", "mushroom creature", "mushroom"),
        "ghost": ("ghost monster", "ghost", "floating ghost"),
        "robot": ("robot monster", "robot", "boxy robot"),
        "octopus": ("octopus monster", "octopus", "octopus-like creature"),
        "spider": ("spider monster", "spider", "spider-like creature"),
        "cat": ("cat monster", "cat-like creature", "cat-like monster"),
    },
    "eyes": {
        "one": ("one big eye", "a single large eye", "one large round eye"),
        "two": ("two eyes", "a pair of eyes", "two round eyes"),
        "three": ("three eyes", "three round eyes", "a trio of eyes"),
    },
    "horns": {
        "curved": ("curved horns", "two curved horns", "a pair of curved horns"),
        "unicorn": ("a unicorn horn", "a single golden horn", "one long golden horn"),
        "antlers": ("antlers", "brown antlers", "branching antlers"),
    },
    "wings": {
        "bat": ("bat wings", "dark bat wings", "bat-like wings"),
        "feathered": ("feathered wings", "feathery wings", "pale feathered wings"),
    },
    "tail": {
        "pointed": ("a pointed tail", "an arrow-shaped tail", "a long pointed tail"),
        "fluffy": ("a fluffy tail", "a bushy tail", "a fluffy white-tipped tail"),
    },
    "weapon": {
        "axe": ("an axe", "a steel axe", "a large axe"),
        "sword": ("a sword", "a steel sword", "a large sword"),
        "trident": ("a trident", "a golden trident", "a large trident"),
        "hammer": ("a hammer", "a heavy hammer", "a large hammer"),
        "staff": ("a staff", "a magic staff", "a staff with a green orb"),
    },
}
HOLDING = ("holding", "wielding", "carrying", "armed with")
SYLLABLES = ("bo", "gru", "zor", "mi", "ka", "lum", "pip", "ra", "thu", "vex", "nob", "dri", "sha", "quo", "fen", "wob")


def draw_descriptions(rng: np.random.Generator, traits: Traits, count: int = 3) -> list[str]:
    """`count` different captions (at most six) of one sentence, naming the colour and all attributes but "none"."""
    chosen = rng.permutation(6)[:count]
    return [_caption(rng, traits, int(style)) for style in chosen]


def draw_name(rng: np.random.Generator) -> str:
    """A name of two or three syllables."""
    return "".join(str(s) for s in rng.choice(SYLLABLES, int(rng.integers(2, 4)))).capitalize()


def _caption(rng: np.random.Generator, traits: Traits, style: int) -> str:
    def phrase(attribute: str) -> str:
        return str(rng.choice(PHRASES[attribute][getattr(traits, attribute)]))

    colour, body = traits.colour, phrase("body")
    present = [a for a in ("eyes", "horns", "wings", "tail") if getattr(traits, a) != "none"]
    features = [phrase(str(a)) for a in rng.permutation(present)]
    weapon = phrase("weapon") if traits.weapon != "none" else ""
    held = f"{rng.choice(HOLDING)} {weapon}" if weapon else ""
    with_weapon = [*features, weapon] if weapon else features
    tail = f", {held}" if held else ""
    match style:
        case 0:
            text = f"{_article(colour)} {colour} {body} with {_listed(features)}{tail}"
        case 1:
            text = f"{colour} {body} with {_listed(with_weapon)}"
        case 2:
            text = f"cartoon {colour} {body}{' ' + held if held else ''}, featuring {_listed(features)}"
        case 3:
            text = f"small, {colour} {body} with {_listed(features)}{tail}"
        case 4:
            looks = [f"{_article(colour)} {colour} body", *features]
            text = f"{_article(body)} {body} with {_listed(looks)}{tail}"
        case _:
            text = f"{colour} {body}{' ' + held if held else ''}, with {_listed(features)}"
    return text[0].upper() + text[1:] + "."


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def _listed(items: list[str]) -> str:
    if len(items) < 3:
        return " and ".join(items)
    return ", ".join(items[:-1]) + ", and " + items[-1]
