"""Text-conditional training data: cartoon monsters in eight actions, in the schema of the monsters task."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastgen.data.synthetic.creature import render_action
from fastgen.data.synthetic.descriptions import draw_descriptions, draw_name
from fastgen.data.synthetic.output import check_range, claim, remove_others, render_all, write_image
from fastgen.data.synthetic.poses import frame_count
from fastgen.data.synthetic.traits import ACTIONS, Look, Traits, draw_look, draw_traits
from fastgen.files.jsonfiles import write_json


@dataclass(frozen=True)
class Monster:
    """One monster of a dataset."""

    name: str
    traits: Traits
    look: Look
    descriptions: tuple[str, ...]  # three


def draw_monster(seed: int, index: int, held_out: bool = False) -> Monster:
    """Monster `index` of the training or the held-out set of a seed; its traits are never those of the other set."""
    rng = np.random.default_rng([seed, int(held_out), index])
    traits = draw_traits(rng, held_out)
    return Monster(draw_name(rng), traits, draw_look(rng), tuple(draw_descriptions(rng, traits)))


def write_monsters(
    out: Path,
    *,
    count: int = 500,
    size: int = 256,
    seed: int = 0,
    frames: int = 4,
    test_count: int = 64,
    workers: int | None = None,
    progress: bool = True,
) -> None:
    """Render a dataset in the schema of the monsters task into `out`.

    Writes `train/<key>_<frame>.png` and `train_info.json` for `count` monsters in eight actions (key
    `<monster>_<action>`; one frame of `main`, at most two of `hit1`, `frames` of the others), `test.json` with
    `test_count` requests, each for another monster whose combination of attributes is in no training set of any seed, and
    `attributes.json` with the attributes and the action of every key of both. The monsters of the tests are numbered
    on from `count`. The same arguments give the same bytes, whatever `workers` (None: one per CPU core) is; monster i
    depends on `seed` and i alone.

    `size` is the edge in pixels, 32 to 256. Raises InputError for arguments out of range, and if `out` has other files.
    """
    out = Path(out)
    check_range("count", count, 1)
    check_range("size", size, 32, 256)
    check_range("seed", seed, 0)
    check_range("frames", frames, 1, 16)
    check_range("test_count", test_count, 1)
    check_range("workers", workers if workers is not None else 1, 1)
    train = {f"{i}_{action}": (draw_monster(seed, i), action) for i in range(count) for action in ACTIONS}
    tests = {}
    for j in range(test_count):
        action = list(ACTIONS)[j % len(ACTIONS)]
        tests[f"{count + j}_{action}"] = draw_monster(seed, j, held_out=True), action

    arguments = {"count": count, "size": size, "seed": seed, "frames": frames, "test_count": test_count}
    claim(out, {"dataset": "monsters", **arguments}, ["train_info.json", "test.json", "attributes.json"], "train")
    draw = partial(_write_monster, out / "train", seed, frames, size)
    names = {f"{key}_{i}.png" for key, (_, action) in train.items() for i in range(frame_count(action, frames))}
    render_all(draw, range(count), total=len(names), workers=workers, progress=progress, label="monsters")
    remove_others(out / "train", names, r"\d+_[a-z]+\d*_\d+\.png")
    write_json(out / "attributes.json", {key: _attributes(*about) for key, about in (train | tests).items()}, indent=1)
    write_json(out / "test.json", {key: _request(key, *about) for key, about in tests.items()}, indent=1)
    write_json(out / "train_info.json", {key: _record(*about, frames) for key, about in train.items()}, indent=1)


def _write_monster(folder: Path, seed: int, frames: int, size: int, index: int) -> int:
    monster = draw_monster(seed, index)
    for action in ACTIONS:
        for frame, image in enumerate(render_action(monster.traits, monster.look, action, frames, size)):
            write_image(folder / f"{index}_{action}_{frame}.png", image)
    return sum(frame_count(action, frames) for action in ACTIONS)


def _record(monster: Monster, action: str, frames: int) -> dict[str, Any]:
    return {
        "original_name": monster.name,
        "given_description": list(monster.descriptions),
        "action_description": ACTIONS[action],
        "num_frames": frame_count(action, frames),
    }


def _request(key: str, monster: Monster, action: str) -> dict[str, str]:
    description = monster.descriptions[0]
    return {
        "image_name": f"{key}.png",
        "given_description": description,
        "action_description": ACTIONS[action],
        "text_prompt": f"{description} {ACTIONS[action]}".strip(),
    }


def _attributes(monster: Monster, action: str) -> dict[str, str]:
    return {**asdict(monster.traits), "action": action}
