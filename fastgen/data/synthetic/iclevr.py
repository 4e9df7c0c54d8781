"""Label-conditional training data: scenes of one to three coloured solids in the schema of i-CLEVR."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from fastgen.data.synthetic.label_lists import Labels, LabelSet, all_label_sets, read_held_out, read_train
from fastgen.data.synthetic.output import check_range, claim, remove_others, render_all, write_image
from fastgen.data.synthetic.scenes import SLOTS, draw_scene, render
from fastgen.errors import InputError
from fastgen.files.jsonfiles import write_json
from fastgen.files.names import ICLEVR_OBJECTS

# {number of objects: how many lists}, as in the real files
TEST_SIZES = {"test.json": {1: 6, 2: 12, 3: 14}, "new_test.json": {2: 12, 3: 20}}
TRIES = 1000


def write_iclevr(
    out: Path,
    *,
    count: int = 18009,
    size: int = 64,
    seed: int = 0,
    label_lists: Path | None = None,
    hold_out: Sequence[Path | str] = (),
    workers: int | None = None,
    progress: bool = True,
) -> None:
    """Render a dataset in the schema of i-CLEVR into `out`.

    Writes `iclevr/CLEVR_train_<scene>_<k>.png`, `train.json` ({file: labels}), `objects.json`, and `test.json` and
    `new_test.json` with 32 lists each whose label sets do not occur in training. The images of a scene, k = 0, 1, 2,
    share camera, light and positions, and each has one object more. The same arguments give the same bytes, whatever
    `workers` (None: one per CPU core) is; a picture depends on `seed`, its name and its labels alone.

    `count` is the number of images and `size` their edge in pixels, 32 to 256. `label_lists`, a `train.json`, gives
    files and labels, its first `count`, instead of the seed. The label sets of `hold_out` do not occur in training: they
    are drawn again, or dropped if they come from `label_lists`. Each of its entries is a request file (a list of label
    lists), a .txt file of fingerprints (see `label_lists`), or "reference": the sets of the i-CLEVR task's own tests.

    Raises InputError for arguments out of range, malformed files, and if `out` holds anything else.
    """
    out = Path(out)
    check_range("count", count, 1)
    check_range("size", size, 32, 256)
    check_range("seed", seed, 0)
    check_range("workers", workers if workers is not None else 1, 1)
    held_out = {labels for source in hold_out for labels in read_held_out(source)}
    if label_lists is None:
        tests = _draw_tests(seed, avoid=held_out)
        train = _draw_train(seed, count, held_out | {frozenset(labels) for lists in tests.values() for labels in lists})
    else:
        train = {n: v for n, v in read_train(label_lists, count).items() if frozenset(v) not in held_out}
        tests = _draw_tests(seed, avoid={frozenset(labels) for labels in train.values()})
    if not train:
        raise InputError("no images are left to render: label_lists is empty, or hold_out has all of its label sets")

    arguments = {"dataset": "iclevr", "count": count, "size": size, "seed": seed}
    claim(out, arguments, ["train.json", "objects.json", *tests], "iclevr")
    scenes = list(_by_scene(train).items())
    draw = partial(_write_scene, out / "iclevr", size, seed)
    render_all(draw, scenes, total=len(train), workers=workers, progress=progress, label="iclevr")
    remove_others(out / "iclevr", train.keys(), r"CLEVR_[a-z]+_\d+_\d+\.png")
    write_json(out / "objects.json", ICLEVR_OBJECTS, indent=1)
    for name, lists in tests.items():
        write_json(out / name, lists, indent=1)
    write_json(out / "train.json", train, indent=1)


def _write_scene(folder: Path, size: int, seed: int, group: tuple[str, dict[str, Labels]]) -> int:
    prefix, images = group
    scene = draw_scene(_generator(seed, prefix))
    for name, labels in images.items():
        write_image(folder / name, render(scene, labels, size))
    return len(images)


def _generator(seed: int, name: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def _by_scene(train: dict[str, Labels]) -> dict[str, dict[str, Labels]]:
    """CLEVR_train_002066_0.png belongs to the scene CLEVR_train_002066."""
    scenes: dict[str, dict[str, Labels]] = {}
    for name, labels in train.items():
        scenes.setdefault(name.rsplit("_", 1)[0], {})[name] = labels
    return scenes


def _draw_tests(seed: int, avoid: set[LabelSet]) -> dict[str, list[Labels]]:
    """32 lists for each test file, all different, none in `avoid`; of the sizes TEST_SIZES where as many are left."""
    rng = _generator(seed, "tests")
    free = [labels for labels in all_label_sets() if frozenset(labels) not in avoid]
    places = [(name, k) for name, sizes in TEST_SIZES.items() for k, number in sizes.items() for _ in range(number)]
    if len(free) < len(places):
        raise InputError(
            f"training leaves {len(free)} of the label sets for test.json and new_test.json, expected at least "
            f"{len(places)}; take fewer images (count) or hold some sets out (hold_out)"
        )
    tests: dict[str, list[Labels]] = {name: [] for name in TEST_SIZES}
    for name, k in places:
        fitting = [i for i, labels in enumerate(free) if len(labels) == k] or list(range(len(free)))
        labels = free.pop(int(rng.choice(fitting)))
        tests[name].append(tuple(str(label) for label in rng.permutation(labels)))
    return tests


def _draw_train(seed: int, count: int, avoid: set[LabelSet]) -> dict[str, Labels]:
    train: dict[str, Labels] = {}
    for scene in range(-(-count // SLOTS)):
        prefix = f"CLEVR_train_{scene:06d}"
        labels = _draw_labels(_generator(seed, f"{prefix}:labels"), avoid)
        for k in range(min(SLOTS, count - len(train))):
            train[f"{prefix}_{k}.png"] = labels[: k + 1]
    return train


def _draw_labels(rng: np.random.Generator, avoid: set[LabelSet]) -> Labels:
    for _ in range(TRIES):
        labels = tuple(str(label) for label in rng.choice(list(ICLEVR_OBJECTS), SLOTS, replace=False))
        if not any(frozenset(labels[:k]) in avoid for k in range(1, SLOTS + 1)):
            return labels
    raise InputError(f"hold_out leaves no label sets for training ({TRIES} draws were all held out); hold out fewer")
