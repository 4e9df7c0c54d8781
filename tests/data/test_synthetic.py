"""The rendered datasets: schemas, determinism, held-out combinations, and that pictures show what their labels say."""

from __future__ import annotations

import colorsys
import hashlib
import json
import shutil
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastgen.data.synthetic import iclevr as iclevr_module
from fastgen.data.synthetic import label_lists, write_iclevr, write_monsters
from fastgen.data.synthetic.creature import render_action
from fastgen.data.synthetic.descriptions import PHRASES
from fastgen.data.synthetic.monsters import draw_monster
from fastgen.data.synthetic.scenes import COLOURS, HALF_VIEW, camera_axes, draw_scene, place_objects, render
from fastgen.data.synthetic.traits import ACTIONS, VALUES, Look, Traits
from fastgen.errors import FastgenError, InputError
from fastgen.files.names import ICLEVR_OBJECTS, SHAPES

REAL = Path(__file__).parents[3] / "shared" / "data"
PLAIN_LOOK = Look(1.0, 1.0, (0.0, 0.0, 0.0), (52, 120, 200))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def load(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def monsters(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("monsters")
    write_monsters(out, count=3, size=32, frames=3, test_count=10, workers=1, progress=False)
    return out


@pytest.fixture(scope="module")
def iclevr(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("iclevr")
    write_iclevr(out, count=20, size=32, workers=1, progress=False)
    return out


# --- both -------------------------------------------------------------------------------------------------------------


def test_monsters_are_the_same_bytes_for_any_number_of_workers(monsters, tmp_path):
    write_monsters(tmp_path, count=3, size=32, frames=3, test_count=10, workers=2, progress=False)
    assert contents(tmp_path) == contents(monsters)


def test_iclevr_is_the_same_bytes_for_any_number_of_workers(iclevr, tmp_path):
    write_iclevr(tmp_path, count=20, size=32, workers=2, progress=False)
    assert contents(tmp_path) == contents(iclevr)


def test_a_monster_and_a_scene_do_not_depend_on_the_count(monsters, iclevr, tmp_path):
    write_monsters(tmp_path / "m", count=1, size=32, frames=3, test_count=1, workers=1, progress=False)
    write_iclevr(tmp_path / "i", count=2, size=32, workers=1, progress=False)
    for small, large, folder in ((tmp_path / "m", monsters, "train"), (tmp_path / "i", iclevr, "iclevr")):
        names = contents(small / folder)
        assert names
        assert all((large / folder / name).read_bytes() == data for name, data in names.items())


def test_another_seed_gives_other_pictures(iclevr, tmp_path):
    write_iclevr(tmp_path, count=1, size=32, seed=1, workers=1, progress=False)
    name = "iclevr/CLEVR_train_000000_0.png"
    assert (tmp_path / name).read_bytes() != (iclevr / name).read_bytes()


def test_a_rerun_overwrites_and_removes_what_a_larger_run_left(iclevr, tmp_path):
    shutil.copytree(iclevr, tmp_path, dirs_exist_ok=True)
    (tmp_path / "iclevr" / "CLEVR_train_000000_0.png").write_bytes(b"damaged")
    write_iclevr(tmp_path, count=2, size=32, workers=1, progress=False)
    assert {p.name for p in (tmp_path / "iclevr").iterdir()} == set(load(tmp_path / "train.json"))
    name = "iclevr/CLEVR_train_000000_0.png"
    assert (tmp_path / name).read_bytes() == (iclevr / name).read_bytes()


def test_a_failed_run_leaves_no_json_that_claims_images(iclevr, tmp_path, monkeypatch):
    def disk_full(path: Path, image: Image.Image) -> None:
        raise OSError(28, "No space left on device", str(path))

    shutil.copytree(iclevr, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(iclevr_module, "write_image", disk_full)
    with pytest.raises(FastgenError, match=r"cannot write .*CLEVR_train_000000_0.png: No space left"):
        write_iclevr(tmp_path, count=20, size=32, seed=5, workers=1, progress=False)
    assert [p.name for p in tmp_path.glob("*.json")] == ["synthetic.json"]


@pytest.mark.parametrize("write", [write_monsters, write_iclevr])
def test_a_folder_with_other_files_is_refused_and_left_alone(write, tmp_path):
    (tmp_path / "train.json").write_text("{}")
    with pytest.raises(InputError, match="choose a new folder"):
        write(tmp_path, count=1, size=32, progress=False)
    assert contents(tmp_path) == {"train.json": b"{}"}


def test_the_other_dataset_and_a_file_are_refused_as_output(iclevr, tmp_path):
    with pytest.raises(InputError, match="neither empty nor rendered monsters data"):
        write_monsters(iclevr, count=1, size=32, progress=False)
    with pytest.raises(InputError, match="is a file"):
        write_iclevr(iclevr / "train.json", count=1, size=32, progress=False)


@pytest.mark.parametrize(
    ("option", "value"), [("size", 31), ("size", 257), ("count", 0), ("seed", -1), ("workers", 0), ("workers", -2)]
)
@pytest.mark.parametrize("write", [write_monsters, write_iclevr])
def test_values_out_of_range_are_named_before_anything_is_written(write, option, value, tmp_path):
    with pytest.raises(InputError, match=f"{option} is {value}, expected"):
        write(tmp_path / "new", **{"progress": False, option: value})
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("option", "value"), [("frames", 0), ("frames", 17), ("test_count", 0)])
def test_monster_options_out_of_range_are_named(option, value, tmp_path):
    with pytest.raises(InputError, match=f"{option} is {value}, expected"):
        write_monsters(tmp_path / "new", progress=False, **{option: value})


@pytest.mark.parametrize("size", [32, 50, 256])
def test_pictures_have_the_size_asked_for(size, tmp_path):
    write_iclevr(tmp_path / "i", count=1, size=size, workers=1, progress=False)
    write_monsters(tmp_path / "m", count=1, size=size, frames=1, test_count=1, workers=1, progress=False)
    for path in [*tmp_path.rglob("*.png")]:
        with Image.open(path) as image:
            assert (image.size, image.mode) == ((size, size), "RGB")


# --- monsters ---------------------------------------------------------------------------------------------------------


def test_train_info_and_the_frames_on_disk_agree(monsters):
    info = load(monsters / "train_info.json")
    expected = {f"{key}_{i}.png" for key, record in info.items() for i in range(record["num_frames"])}
    assert {p.name for p in (monsters / "train").iterdir()} == expected
    assert [info[f"0_{a}"]["num_frames"] for a in ACTIONS] == [1, 3, 3, 2, 3, 3, 3, 3]
    assert [info[f"0_{a}"]["action_description"] for a in ACTIONS] == list(ACTIONS.values())


def test_monsters_have_the_schema_of_the_real_files(monsters):
    info, tests = load(monsters / "train_info.json"), load(monsters / "test.json")
    assert {frozenset(r) for r in info.values()} == {
        frozenset({"original_name", "given_description", "action_description", "num_frames"})
    }
    assert {frozenset(r) for r in tests.values()} == {
        frozenset({"image_name", "given_description", "action_description", "text_prompt"})
    }
    for key, request in tests.items():
        assert request["image_name"] == f"{key}.png"
        assert request["text_prompt"] == f"{request['given_description']} {request['action_description']}".strip()


def test_monsters_agree_with_the_real_files(monsters):
    if not (REAL / "monsters").is_dir():
        pytest.skip("the real JSON files are not here")
    for name in ("train_info.json", "test.json"):
        real, ours = load(REAL / "monsters" / name), load(monsters / name)
        assert {frozenset(r) for r in ours.values()} == {frozenset(r) for r in real.values()}
        sentences = {(key.split("_")[1], r["action_description"]) for key, r in real.items()}
        assert {(key.split("_")[1], r["action_description"]) for key, r in ours.items()} <= sentences
        types = {k: type(v) for k, v in next(iter(real.values())).items()}
        assert {k: type(v) for k, v in next(iter(ours.values())).items()} == types


def test_attributes_cover_the_keys_of_training_and_testing(monsters):
    info, tests = load(monsters / "train_info.json"), load(monsters / "test.json")
    attributes = load(monsters / "attributes.json")
    assert set(attributes) == set(info) | set(tests)
    assert not set(info) & set(tests)
    for key, values in attributes.items():
        assert values["action"] == key.split("_")[1]
        assert all(values[name] in options for name, options in VALUES.items())


def test_combinations_of_the_tests_never_occur_in_training():
    training = {draw_monster(seed, i).traits for seed in range(3) for i in range(300)}
    testing = {draw_monster(seed, i, held_out=True).traits for seed in range(3) for i in range(300)}
    assert not training & testing


def test_every_pair_of_values_occurs_in_training_and_in_testing():
    rng = np.random.default_rng(0)
    names = list(VALUES)
    seen: dict[bool, set] = {False: set(), True: set()}
    for _ in range(12_000):
        traits = Traits(**{n: VALUES[n][int(rng.integers(len(VALUES[n])))] for n in names})
        seen[traits.held_out()] |= {(a, getattr(traits, a), b, getattr(traits, b)) for a, b in combinations(names, 2)}
    pairs = {(a, x, b, y) for a, b in combinations(names, 2) for x in VALUES[a] for y in VALUES[b]}
    assert seen[False] == pairs
    assert seen[True] == pairs


def test_each_of_three_paraphrases_names_every_attribute():
    for i in range(400):
        monster = draw_monster(0, i)
        assert len(set(monster.descriptions)) == 3
        for text in monster.descriptions:
            assert monster.traits.colour in text.lower()
            for attribute, phrases in PHRASES.items():
                value = getattr(monster.traits, attribute)
                if value != "none":
                    assert any(p in text[0].lower() + text[1:] for p in phrases[value]), (text, attribute, value)
                for other in set(phrases) - {value}:
                    assert not any(p in text.lower() for p in phrases[other]), (text, attribute, other)
            assert len(text.split()) <= 35
            assert text.endswith(".")
            assert text[0].isupper()
            assert "none" not in text


@pytest.mark.parametrize("body", VALUES["body"])
def test_every_attribute_changes_the_picture(body):
    plain = Traits(body, "green", "two", "none", "none", "none", "none")

    def draw(**changes: str) -> np.ndarray:
        return np.asarray(render_action(replace(plain, **changes), PLAIN_LOOK, "main", 1, 64)[0], int)

    for attribute, values in VALUES.items():
        pictures = [draw(**{attribute: value}) for value in values]
        for a, b in combinations(pictures, 2):
            assert (np.abs(a - b).max(-1) > 40).mean() > 0.02, attribute


@pytest.mark.parametrize("colour", VALUES["colour"])
def test_the_body_has_the_colour_that_is_named(colour):
    from fastgen.data.synthetic.traits import COLOURS as PALETTE

    traits = Traits("ghost", colour, "two", "none", "none", "none", "none")
    pixels = np.asarray(render_action(traits, PLAIN_LOOK, "main", 1, 64)[0], float)
    mean = pixels[24:44, 20:44].reshape(-1, 3).mean(0)
    distance = {name: np.linalg.norm(mean - rgb) for name, rgb in PALETTE.items()}
    assert min(distance, key=distance.__getitem__) == colour


def test_frames_move_and_fill_the_picture():
    monster = draw_monster(0, 4)
    for action in set(ACTIONS) - {"main"}:
        frames = [np.asarray(f, int) for f in render_action(monster.traits, monster.look, action, 4, 64)]
        for a, b in combinations(frames, 2):
            assert (np.abs(a - b).max(-1) > 30).mean() > 0.004, action
        inked = np.argwhere(np.min(frames, 0).min(-1) < 200)
        assert (inked.max(0) - inked.min(0)).max() > 0.85 * 64, action


# --- i-CLEVR ----------------------------------------------------------------------------------------------------------


def test_objects_are_the_official_mapping():
    assert ICLEVR_OBJECTS["gray cube"] == 0
    assert ICLEVR_OBJECTS["yellow cylinder"] == 23
    if (REAL / "iclevr").is_dir():
        assert list(ICLEVR_OBJECTS.items()) == list(load(REAL / "iclevr" / "objects.json").items())


def test_scenes_come_in_groups_that_gain_one_object(iclevr):
    train = load(iclevr / "train.json")
    assert list(train)[:4] == [*(f"CLEVR_train_000000_{k}.png" for k in range(3)), "CLEVR_train_000001_0.png"]
    assert {p.name for p in (iclevr / "iclevr").iterdir()} == set(train)
    for name, labels in train.items():
        k = int(name[-5])
        assert len(set(labels)) == k + 1
        assert labels == train[name[:-5] + "2.png"][: k + 1] if name[:-5] + "2.png" in train else True
    assert load(iclevr / "objects.json") == ICLEVR_OBJECTS


def test_an_image_of_a_group_differs_from_the_next_around_one_object(iclevr):
    a, b = (np.asarray(Image.open(iclevr / "iclevr" / f"CLEVR_train_000001_{k}.png"), int) for k in range(2))
    changed = (np.abs(a - b).max(-1) > 6).mean()
    assert 0.02 < changed < 0.35


def test_label_sets_of_the_tests_do_not_occur_in_training(tmp_path):
    requests = tmp_path / "held.json"
    held = [["red cube"], ["blue sphere", "gray cube"], ["cyan cube", "green sphere", "yellow cylinder"]]
    requests.write_text(json.dumps(held))
    tests = iclevr_module._draw_tests(0, avoid=set())
    sets = {frozenset(x) for lists in tests.values() for x in lists}
    assert [len(lists) for lists in tests.values()] == [32, 32]
    assert len(sets) == 64
    forbidden = sets | {frozenset(x) for x in held}
    train = iclevr_module._draw_train(0, 6000, forbidden)
    assert len(train) == 6000
    assert not forbidden & {frozenset(x) for x in train.values()}
    write_iclevr(tmp_path / "out", count=60, size=32, hold_out=[requests], workers=1, progress=False)
    written = {frozenset(x) for x in load(tmp_path / "out" / "train.json").values()}
    for name in ("test.json", "new_test.json"):
        assert not written & {frozenset(x) for x in load(tmp_path / "out" / name)}
    assert not written & {frozenset(x) for x in held}


def test_label_lists_give_files_and_labels_and_held_out_sets_are_dropped(tmp_path):
    lists = {
        "CLEVR_train_000341_0.png": ["gray sphere"],
        "CLEVR_train_000341_1.png": ["gray sphere", "green cylinder"],
        "CLEVR_train_000051_0.png": ["purple sphere"],
        "CLEVR_train_000051_1.png": ["purple sphere", "red cube"],
    }
    (tmp_path / "lists.json").write_text(json.dumps(lists))
    (tmp_path / "held.json").write_text(json.dumps([["purple sphere"], ["green cylinder", "gray sphere"]]))
    options = {"size": 32, "label_lists": tmp_path / "lists.json", "workers": 1, "progress": False}
    write_iclevr(tmp_path / "all", count=3, **options)
    assert load(tmp_path / "all" / "train.json") == dict(list(lists.items())[:3])
    write_iclevr(tmp_path / "some", hold_out=[tmp_path / "held.json"], **options)
    assert list(load(tmp_path / "some" / "train.json")) == ["CLEVR_train_000341_0.png", "CLEVR_train_000051_1.png"]
    name = "iclevr/CLEVR_train_000341_0.png"
    assert (tmp_path / "all" / name).read_bytes() == (tmp_path / "some" / name).read_bytes()


def test_the_real_label_lists_leave_enough_sets_for_testing():
    if not (REAL / "iclevr").is_dir():
        pytest.skip("the real JSON files are not here")
    train = label_lists.read_train(REAL / "iclevr" / "train.json", 18009)
    used = {frozenset(x) for x in train.values()}
    tests = iclevr_module._draw_tests(0, avoid=used)
    assert len(train) == 18009
    assert not used & {frozenset(x) for lists in tests.values() for x in lists}


@pytest.fixture(scope="module")
def reference_tests() -> list[Path]:
    """The i-CLEVR task's own request files."""
    files = [REAL / "iclevr" / name for name in ("test.json", "new_test.json")]
    if not all(file.is_file() for file in files):
        pytest.skip("the real JSON files are not here")
    return files


def held_sets(*sources: Path | str) -> set[frozenset[str]]:
    return {labels for source in sources for labels in label_lists.read_held_out(source)}


def test_a_fingerprint_is_that_of_the_documentation_whatever_the_order():
    digest = hashlib.sha256(b"blue sphere,red cube").hexdigest()[:16]
    assert label_lists.fingerprint(["red cube", "blue sphere"]) == digest
    assert label_lists.fingerprint(("blue sphere", "red cube")) == digest
    prints = {label_lists.fingerprint(labels) for labels in label_lists.all_label_sets()}
    assert len(prints) == 24 + 276 + 2024


def test_the_reference_list_holds_out_the_tasks_own_tests(reference_tests):
    assert held_sets("reference") == held_sets(*reference_tests)
    assert held_sets(Path("reference")) == held_sets(label_lists.HELD_OUT)
    assert len(held_sets("reference")) == 64


def test_the_reference_list_gives_the_data_that_the_tasks_own_files_give(reference_tests, tmp_path, monkeypatch):
    monkeypatch.setattr(
        iclevr_module, "render_all", lambda *_, **__: None
    )  # a picture depends on seed, name and labels alone
    write_iclevr(tmp_path / "files", count=30000, hold_out=reference_tests, progress=False)
    write_iclevr(tmp_path / "list", count=30000, hold_out=["reference"], progress=False)
    assert contents(tmp_path / "files") == contents(tmp_path / "list")
    assert len(load(tmp_path / "list" / "train.json")) == 30000


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_no_training_image_has_a_set_of_the_reference_list(seed):
    held = held_sets("reference")
    train = iclevr_module._draw_train(seed, 300, held)
    assert len(train) == 300
    assert not held & {frozenset(labels) for labels in train.values()}


def test_fingerprints_of_a_file_hold_out_like_the_label_sets_themselves(tmp_path):
    (tmp_path / "held.txt").write_text("# two sets\n" + label_lists.fingerprint(["red cube"]).upper() + "  # one\n\n")
    assert held_sets(tmp_path / "held.txt") == {frozenset(["red cube"])}
    (tmp_path / "held.txt").write_text("# none\n0123456789abcdef\n")
    with pytest.raises(InputError, match=r"held\.txt: line 2: '0123456789abcdef' is not the fingerprint of"):
        write_iclevr(tmp_path / "out", hold_out=[tmp_path / "held.txt"], progress=False)
    with pytest.raises(InputError, match=r"none\.txt: no such file"):
        write_iclevr(tmp_path / "out", hold_out=[tmp_path / "none.txt"], progress=False)
    assert not (tmp_path / "out").exists()


def test_the_command_takes_the_reference_list_by_name(fastgen, tmp_path):
    arguments = ["--count", 3, "--size", 32, "--hold-out", "reference", "--workers", 1]
    code, _, err = fastgen("data", "iclevr", tmp_path / "out", *arguments)
    assert code == 0, err
    assert not held_sets("reference") & held_sets(tmp_path / "out" / "test.json", tmp_path / "out" / "new_test.json")


def object_pixels(labels: list[str], seed: int, size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """The mean colour at the middle of the first object, and the picture."""
    scene = draw_scene(np.random.default_rng(seed))
    solid = place_objects(scene, labels)[0]
    right, up, forward = camera_axes(scene.eye, scene.target)
    ray = solid.centre - scene.eye
    depth = float((ray * forward).sum()) * HALF_VIEW
    x = (float((ray * right).sum()) / depth + 1) / 2 * size
    y = (1 - float((ray * up).sum()) / depth) / 2 * size
    pixels = np.asarray(render(scene, labels, size), float)
    return pixels[int(y) - 1 : int(y) + 3, int(x) - 1 : int(x) + 2].reshape(-1, 3).mean(0), pixels


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("colour", COLOURS)
def test_an_object_has_the_hue_of_its_label(colour, shape):
    for seed in range(4):
        mean, _ = object_pixels([f"{colour} {shape}"], seed)
        hue, saturation, _ = colorsys.rgb_to_hsv(*mean / 255)
        target, _, _ = colorsys.rgb_to_hsv(*np.array(COLOURS[colour]) / 255)
        if colour == "gray":
            assert saturation < 0.12
        else:
            assert saturation > 0.3
            assert abs((hue - target + 0.5) % 1 - 0.5) < 0.045


def test_objects_lie_in_view_and_apart():
    for seed in range(200):
        scene = draw_scene(np.random.default_rng(seed))
        right, up, forward = camera_axes(scene.eye, scene.target)
        rays = np.concatenate([scene.position, scene.radius[:, None]], 1) - scene.eye
        depth = (rays @ forward) * HALF_VIEW
        place, radius = np.stack([rays @ right, rays @ up], -1) / depth[:, None], scene.radius / depth
        assert (np.abs(place) + radius[:, None] < 1).all()
        for i, j in combinations(range(3), 2):
            assert np.linalg.norm(place[i] - place[j]) > 0.95 * (radius[i] + radius[j])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "malformed JSON"),
        ("[]", "holds a JSON list, expected"),
        ('{"../a.png": ["red cube"]}', "not a plain .png file name"),
        ('{"a.png": ["red cubes"]}', "unknown object 'red cubes'; did you mean 'red cube'"),
        ('{"a.png": []}', "expected a list of 1 to 3 labels"),
        ('{"a.png": [["red cube"]]}', "unknown object"),
        ("{}", "no images are left"),
    ],
)
def test_malformed_label_lists_are_named(content, message, tmp_path):
    path = tmp_path / "lists.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        write_iclevr(tmp_path / "out", size=32, label_lists=path, progress=False)
    assert not (tmp_path / "out").exists()


def test_malformed_and_missing_hold_out_files_are_named(tmp_path):
    (tmp_path / "held.json").write_text('{"0": ["red cube"]}')
    with pytest.raises(InputError, match=r"held\.json holds a JSON dict, expected a list of label lists"):
        write_iclevr(tmp_path / "out", size=32, hold_out=[tmp_path / "held.json"], progress=False)
    with pytest.raises(InputError, match=r"none\.json: no such file"):
        write_iclevr(tmp_path / "out", size=32, hold_out=[tmp_path / "none.json"], progress=False)
    everything = [[label] for label in ICLEVR_OBJECTS]
    (tmp_path / "held.json").write_text(json.dumps(everything))
    with pytest.raises(InputError, match="leaves no label sets for training"):
        write_iclevr(tmp_path / "out", size=32, hold_out=[tmp_path / "held.json"], progress=False)
