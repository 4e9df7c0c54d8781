"""What the benchmarks generate: made-up prompts and label lists, or those of a request file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

LABELS = (["gray cube"], ["red cube", "blue sphere"], ["green cylinder"], ["yellow cube", "cyan sphere", "brown cube"])
WORDS = (
    ("red", "small green", "huge blue", "purple", "pale yellow", "grey", "black", "bright orange"),
    ("dragon", "slime", "robot", "insect", "knight", "plant", "ghost", "wolf"),
    (
        "wings and horns",
        "one big eye",
        "a sword and a shield",
        "many legs",
        "sharp teeth",
        "a long tail",
        "glowing claws",
    ),
    ("attacking", "idling", "moving", "dying", "casting a spell"),
)


def prompts(count: int) -> list[str]:
    """`count` prompts, the first 2240 of them distinct."""
    made = []
    for i in range(count):
        rest, words = i * 1009 % math.prod(map(len, WORDS)), []
        for column in WORDS:
            rest, place = divmod(rest, len(column))
            words.append(column[place])
        made.append("A {} {} with {}. The monster is {}.".format(*words))
    return made


def conditions(kind: str, count: int, requests: Path | None = None) -> dict[str, list[Any]]:
    """`count` prompts or label lists, for a model of this kind, as keywords of Pipeline.generate; from a request file, repeated
    if it is shorter."""
    keyword = "prompts" if kind == "text" else "labels"
    if requests is None:
        return {keyword: prompts(count) if kind == "text" else [LABELS[i % len(LABELS)] for i in range(count)]}
    from fastgen.generate.requests import read_requests

    found = read_requests(requests)
    values: list[Any] = [r.prompt if kind == "text" else list(r.labels or ()) for r in found]
    return {keyword: [values[i % len(values)] for i in range(count)]}
