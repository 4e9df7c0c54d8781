"""What fastgen.data promises about the user's training data, good and bad."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fastgen.data import Dataset, Example, find_dataset, read_dataset, split
from fastgen.data.images import load_image, load_images
from fastgen.errors import InputError
from fastgen.files.names import ICLEVR_OBJECTS

REAL = Path(__file__).parents[3] / "shared" / "data"
real_files = pytest.mark.skipif(not REAL.is_dir(), reason="the tasks' own files are not here")
fuzz = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=4)
    | st.sampled_from(["a.png", "red cube", "../a.png"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3) | st.sampled_from(["a.png", "given_description", "num_frames"]), inner)
        | st.fixed_dictionaries({"file_name": inner, "text": inner}, optional={"labels": inner})
    ),
    max_leaves=12,
)


def write(root: Path, files: dict[str, Any]) -> Path:
    """JSON for .json, a line per item for .jsonl, an empty file for None."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = content if name.endswith(".jsonl") else [content]
        path.write_text("" if content is None else "\n".join(map(json.dumps, lines)))
    return root


def monsters(root: Path, frames: list[str], **entries: Any) -> Path:
    entry = {"given_description": ["Red.", "A red one."], "action_description": "It dies.", "num_frames": 2}
    info = {key: {**entry, **changes} for key, changes in (entries or {"0_die1": {}}).items()}
    return write(root, {"train_info.json": info, **{f"train/{name}": None for name in frames}})


def iclevr(root: Path, labels: Any, images: list[str], folder: str = "iclevr") -> Path:
    files = {"train.json": labels, "objects.json": ICLEVR_OBJECTS}
    return write(root, {**files, **{f"{folder}/{name}": None for name in images}})


def imagefolder(root: Path, rows: list[Any], images: list[str], folder: str = ".") -> Path:
    return write(root, {f"{folder}/metadata.jsonl": rows, **{f"{folder}/{name}": None for name in images}})


def error_of(root: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_dataset(root)
    message = str(caught.value)
    assert str(root) in message
    assert "\n" not in message
    return message


# --- monsters


def test_monsters_frames_are_grouped_by_key_in_file_order_with_every_caption_and_description(tmp_path):
    root = monsters(
        tmp_path,
        ["1_main_0.png", "0_die1_10.png", "0_die1_9.png"],
        **{"1_main": {"action_description": ""}, "0_die1": {}},
    )
    dataset = read_dataset(root)
    assert (dataset.kind, dataset.root, dataset.objects) == ("text", root, None)
    alone, dying = ("Red.", "A red one."), ("Red. It dies.", "A red one. It dies.")
    assert dataset.examples == (
        Example(root / "train/1_main_0.png", alone, (), "1_main", alone, "1"),
        Example(root / "train/0_die1_9.png", dying, (), "0_die1", alone, "0"),
        Example(root / "train/0_die1_10.png", dying, (), "0_die1", alone, "0"),
    )


def test_a_split_keeps_all_animations_of_a_monster_together(tmp_path):
    keys = [f"{monster}_{action}" for monster in (1, 10, 100, 2, 3) for action in ("main", "die1", "die_2")]
    dataset = read_dataset(
        monsters(
            tmp_path,
            [f"{key}_0.png" for key in [*keys, "x_main", "x_die1"]],
            **{key: {} for key in [*keys, "x_main", "x_die1"]},
        )
    )
    assert {example.subject for example in dataset.examples} == {"1", "10", "100", "2", "3", "x_main", "x_die1"}
    train, validation = ({example.subject for example in part.examples} for part in split(dataset, 0.4))
    assert (len(train), len(validation), train & validation) == (4, 3, set())


@pytest.mark.parametrize("base", [0, 1])
def test_monsters_files_without_a_row_and_rows_without_a_file_are_counted_not_refused(tmp_path, base):
    frames = [f"a_{base}.png", f"b_{base}.png", f"b_{base + 1}.png", f"z_{base}.png", "odd.png", "notes.txt"]
    root = monsters(tmp_path, frames, a={}, b={"num_frames": 1}, c={"num_frames": 0})
    dataset = read_dataset(root)
    assert [example.image.name for example in dataset.examples] == frames[:3]
    assert dataset.notes == (
        "1 keys with num_frames 0: c",
        f"1 frames listed in train_info.json but missing in train/: a_{base + 1}.png",
        f"1 frames used although num_frames in train_info.json is smaller: b_{base + 1}.png",
        f"2 files in train/ that match no key of train_info.json: odd.png, z_{base}.png",
    )


def test_a_note_lists_the_first_ten_names_and_counts_all(tmp_path):
    dataset = read_dataset(monsters(tmp_path, ["a_0.png"], a={"num_frames": 1236}))
    names = ", ".join(f"a_{i}.png" for i in range(1, 11))
    assert dataset.notes == (f"1,235 frames listed in train_info.json but missing in train/: {names}, ...",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (5, "key '0_die1': found 5"),
        ({"given_description": "Red."}, "given_description: found 'Red.'"),
        ({"given_description": []}, "given_description: found []"),
        ({"given_description": ["Red.", ""]}, "given_description: is empty"),
        ({"given_description": ["\ud800"]}, "lone surrogate"),
        ({"action_description": None}, "action_description: found None"),
        ({"num_frames": -1}, "num_frames: found -1"),
        ({"num_frames": True}, "num_frames: found True"),
        ({"num_frames": 10**30}, "num_frames: found 1000"),
    ],
)
def test_a_bad_monsters_entry_is_named(tmp_path, changes, message):
    root = monsters(tmp_path, ["0_die1_0.png"])
    if isinstance(changes, dict):
        monsters(tmp_path, [], **{"0_die1": changes})
    else:
        write(tmp_path, {"train_info.json": {"0_die1": changes}})
    assert message in error_of(root)


@pytest.mark.parametrize("frames", [[], ["other_0.png"]])
def test_monsters_without_any_match_names_the_first_expected_file(tmp_path, frames):
    assert str(tmp_path / "train" / "0_die1_0.png") in error_of(monsters(tmp_path, frames))


# --- i-CLEVR


@pytest.mark.parametrize("folder", ["iclevr", "images", "."])
def test_iclevr_images_are_found_in_each_of_their_folders_and_grouped_by_scene(tmp_path, folder):
    labels = {"CLEVR_train_002066_0.png": ["cyan cube"], "CLEVR_train_002066_1.png": ["cyan cube", "red cube"]}
    dataset = read_dataset(iclevr(tmp_path, {**labels, "gone_0.png": ["red cube"]}, list(labels), folder))
    assert (dataset.kind, dataset.objects) == ("labels", ICLEVR_OBJECTS)
    assert [example.labels for example in dataset.examples] == [tuple(value) for value in labels.values()]
    assert {example.group for example in dataset.examples} == {"CLEVR_train_002066"}
    assert all(example.image.is_file() for example in dataset.examples)
    assert dataset.notes == ("1 images listed in train.json but missing: gone_0.png",)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "found []"),
        ({}, "found {}"),
        ({"a.png": []}, "key 'a.png': labels: found []"),
        ({"a.png": "red cube"}, "key 'a.png': labels: found 'red cube'"),
        ({"a.png": ["red cub"]}, "did you mean 'red cube'?"),
        ({"a.png": ["red cube"] * 2}, "occurs twice"),
        ({"../a.png": ["red cube"]}, "image name: found '../a.png'"),
        ({"/etc/a.png": ["red cube"]}, "image name: found '/etc/a.png'"),
        ({"b.png": ["red cube"]}, "iclevr/b.png"),
    ],
)
def test_a_bad_iclevr_file_is_named(tmp_path, labels, message):
    assert message in error_of(iclevr(tmp_path, labels, ["a.png"]))


def test_iclevr_images_and_labels_without_each_other_are_counted_and_the_first_ten_named(tmp_path):
    labels = {f"gone_{i}.png": ["red cube"] for i in range(12)} | {"a_0.png": ["red cube"]}
    root = iclevr(tmp_path, labels, ["a_0.png", "notes.txt", *[f"new_{i}.JPG" for i in range(1236)]])
    gone, new = (", ".join(sorted(f"{name}_{i}.{end}" for i in count)[:10]) for name, end, count in (
        ("gone", "png", range(10)), ("new", "JPG", range(1236))))  # fmt: skip
    assert read_dataset(root).notes == (
        f"12 images listed in train.json but missing: {gone}, ...",
        f"1,236 images not listed in train.json: {new}, ...",
    )


def test_a_folder_that_matches_nothing_counts_and_names_the_first_ten_of_both_sides(tmp_path):
    listed, there = ([f"{name}{i}.png" for i in range(12)] for name in "ab")
    first, other = ", ".join(listed[:10]), ", ".join(sorted(there)[:10])
    counts = f"; 12 are listed: {first}, ...; 12 other images are in "
    message = error_of(iclevr(tmp_path / "i", {name: ["red cube"] for name in listed}, there))
    assert f"{counts}{tmp_path / 'i' / 'iclevr'}: {other}, ..." in message
    message = error_of(imagefolder(tmp_path / "f", [{"file_name": name, "text": "x"} for name in listed], there))
    assert f"{counts}{tmp_path / 'f'}: {other}, ..." in message
    message = error_of(monsters(tmp_path / "m", there, a={"num_frames": 12}))
    frames = ", ".join(f"a_{i}.png" for i in range(10))
    assert f"; 12 are listed: {frames}, ...; 12 other images are in {tmp_path / 'm' / 'train'}: {other}" in message
    assert "no image is in " in error_of(iclevr(tmp_path / "e", {"a.png": ["red cube"]}, []))


# --- imagefolder


@pytest.mark.parametrize("folder", [".", "train"])
@pytest.mark.parametrize("field", ["text", "caption", "prompt"])
def test_imagefolder_captions_are_read_from_any_of_their_fields(tmp_path, folder, field):
    rows = [{"file_name": "0.png", field: "one"}, {"file_name": "sub/1.jpg", field: ["two", "2"], "extra": None}]
    dataset = read_dataset(
        imagefolder(tmp_path, [*rows, {"file_name": "2.png", field: "x"}], ["0.png", "sub/1.jpg"], folder)
    )
    assert dataset.examples == (
        Example(tmp_path / folder / "0.png", ("one",), (), "0.png"),
        Example(tmp_path / folder / "sub/1.jpg", ("two", "2"), (), "sub/1.jpg"),
    )
    assert dataset.notes == ("1 images listed in metadata.jsonl but missing: 2.png",)


def test_imagefolder_images_without_a_line_are_counted_in_every_folder_that_is_mentioned(tmp_path):
    rows = [{"file_name": "0.png", "text": "x"}, {"file_name": "sub/1.png", "text": "x"}]
    images = ["0.png", "sub/1.png", "sub/2.webp", "3.png", "elsewhere/4.png", "readme.md"]
    dataset = read_dataset(imagefolder(tmp_path, rows, images))
    assert dataset.notes == ("2 images not listed in metadata.jsonl: 3.png, sub/2.webp",)


def test_imagefolder_labels_are_numbered_by_objects_json_or_by_name(tmp_path):
    rows = [{"file_name": "0.png", "labels": ["b", "a"]}, {"file_name": "1.png", "labels": ["c"]}]
    root = imagefolder(tmp_path, rows, ["0.png", "1.png"], "train")
    assert read_dataset(root).objects == {"a": 0, "b": 1, "c": 2}
    write(root, {"objects.json": {"c": 0, "b": 1, "a": 2}})
    assert read_dataset(root).objects == {"c": 0, "b": 1, "a": 2}
    write(root, {"objects.json": {"b": 0, "a": 1}})
    assert "line 2: unknown label 'c'" in error_of(root)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "is empty"),
        ([5], "line 1: found 5"),
        ([{"file_name": "a.png"}], "line 1: found"),
        ([{"file_name": "a.png", "text": "x"}, {"file_name": "b.png", "caption": "y"}], "line 2: found"),
        ([{"file_name": "a.png", "text": ""}], "line 1: text: is empty"),
        ([{"file_name": "a.png", "text": []}], "line 1: text: found []"),
        ([{"file_name": "a.png", "labels": "x"}], "line 1: labels: found 'x'"),
        ([{"file_name": "a.png", "text": "x"}] * 2, "line 2: file_name 'a.png' was on line 1"),
        ([{"file_name": "../a.png", "text": "x"}], "line 1: file_name: found '../a.png'"),
        ([{"file_name": "a\0.png", "text": "x"}], "line 1, column 15: found NUL"),
        ([{"file_name": 3, "text": "x"}], "line 1: file_name: found 3"),
        ([{"file_name": "b.png", "text": "x"}], "b.png"),
    ],
)  # fmt: skip
def test_a_bad_metadata_line_is_named(tmp_path, rows, message):
    assert message in error_of(imagefolder(tmp_path, rows, ["a.png"]))


# --- any dataset


@fuzz
@given(json_values, st.sampled_from(["train_info.json", "train.json", "metadata.jsonl"]))
def test_any_json_gives_a_dataset_or_an_input_error(tmp_path, value, name):
    root = tmp_path / name
    shutil.rmtree(root, ignore_errors=True)
    iclevr(root, {}, ["a.png"], "train") if name == "train.json" else write(
        root, {"train/a_0.png": None, "a.png": None}
    )
    write(root, {name: value if not name.endswith("l") or isinstance(value, list) else [value]})
    try:
        dataset = read_dataset(root)
    except InputError:
        return
    assert dataset.examples
    assert all(example.image.resolve().is_relative_to(root.resolve()) for example in dataset.examples)


def test_looking_for_files_costs_scans_of_folders_not_a_call_per_image(tmp_path, monkeypatch):
    names = [f"{folder}/{i}_0.png" for folder in "ab" for i in range(100)]
    iclevr(tmp_path, {name: ["red cube"] for name in names}, names)
    stat = Mock(wraps=os.stat)
    monkeypatch.setattr(os, "stat", stat)
    assert len(read_dataset(tmp_path).examples) == 200
    assert 0 < stat.call_count < 20


def test_limit_keeps_the_first_examples(tmp_path):
    root = imagefolder(
        tmp_path, [{"file_name": f"{i}.png", "text": "x"} for i in range(5)], [f"{i}.png" for i in range(5)]
    )
    assert read_dataset(root, limit=2).examples == read_dataset(root).examples[:2]
    with pytest.raises(InputError, match="limit"):
        read_dataset(root, limit=0)


def test_a_folder_without_a_dataset_is_refused_and_one_below_is_suggested(tmp_path):
    assert "no known dataset" in error_of(tmp_path)
    assert "is no folder" in error_of(tmp_path / "nothing")
    monsters(tmp_path / "data", ["0_die1_0.png"])
    assert f"is it {tmp_path / 'data'}?" in error_of(tmp_path)


@pytest.mark.parametrize("below", [".", "data", "public_data", "data/mine"])
@pytest.mark.parametrize("kind", ["monsters", "iclevr", "imagefolder"])
def test_find_dataset_finds_each_format_where_people_put_it(tmp_path, below, kind):
    assert find_dataset(tmp_path) is None
    if kind == "monsters":
        monsters(tmp_path / below, ["0_die1_0.png"])
    elif kind == "iclevr":
        iclevr(tmp_path / below, {"a.png": ["red cube"]}, ["a.png"])
    else:
        imagefolder(tmp_path / below, [{"file_name": "a.png", "text": "x"}], ["a.png"])
    assert find_dataset(tmp_path) == tmp_path / below
    assert read_dataset(tmp_path / below).examples


def test_find_dataset_ignores_captions_without_images_and_refuses_to_choose(tmp_path):
    write(tmp_path, {"train_info.json": {}, "data/train.json": {}, "data/objects.json": {}})
    assert find_dataset(tmp_path) is None
    monsters(tmp_path / "data" / "a", ["0_die1_0.png"])
    monsters(tmp_path / "public_data" / "b", ["0_die1_0.png"])
    with pytest.raises(InputError, match=r"data/a, .*public_data/b"):
        find_dataset(tmp_path)


def test_the_fingerprint_follows_content_not_place(tmp_path):
    root = imagefolder(tmp_path / "a", [{"file_name": "a.png", "text": "x"}], ["a.png"])
    first = read_dataset(root).fingerprint
    assert read_dataset(shutil.copytree(root, tmp_path / "b")).fingerprint == first
    (root / "a.png").write_bytes(b"longer")
    assert read_dataset(root).fingerprint != first
    other = imagefolder(tmp_path / "c", [{"file_name": "a.png", "text": "y"}], ["a.png"])
    assert read_dataset(other).fingerprint != first
    dataset = read_dataset(other)
    (other / "a.png").unlink()
    with pytest.raises(InputError, match=r"a\.png"):
        _ = dataset.fingerprint


# --- split


def labelled(groups: list[int], in_file_order: bool) -> Dataset:
    examples = tuple(Example(Path(f"{g}_{i}.png"), (), ("a",), str(g)) for g, n in enumerate(groups) for i in range(n))
    return Dataset("labels", Path(), examples, {"a": 0}, (), in_file_order)


@fuzz
@given(st.lists(st.integers(1, 4), min_size=1, max_size=30), st.floats(0, 0.99), st.booleans())
def test_a_split_is_a_partition_that_keeps_groups_whole(groups, fraction, in_file_order):
    dataset = labelled(groups, in_file_order)
    train, validation = split(dataset, fraction)
    assert sorted(train.examples + validation.examples, key=str) == sorted(dataset.examples, key=str)
    train_groups = {example.group for example in train.examples}
    assert train_groups.isdisjoint(example.group for example in validation.examples)
    assert len(train_groups) == max(1, int(len(groups) * (1 - fraction)))
    assert split(dataset, fraction) == (train, validation)
    if in_file_order:
        assert train.examples + validation.examples == dataset.examples


def test_a_split_outside_iclevr_is_spread_over_the_file_and_does_not_depend_on_its_order():
    dataset = labelled([1] * 200, in_file_order=False)
    backwards = Dataset("labels", Path(), dataset.examples[::-1], {"a": 0})
    chosen = {example.group for example in split(dataset)[1].examples}
    assert chosen == {example.group for example in split(backwards)[1].examples}
    assert len(chosen) == 20
    assert 70 < np.mean([int(group) for group in chosen]) < 130
    assert chosen != {example.group for example in split(dataset, seed=1)[1].examples}


def test_the_iclevr_split_is_the_reference_implementations_16206_and_1803():
    dataset = labelled([3] * 6003, in_file_order=True)
    count = int(18_009 / 3 * 0.9) * 3
    train, validation = split(dataset)
    assert (len(train.examples), len(validation.examples)) == (count, 18_009 - count) == (16_206, 1_803)
    assert train.examples == dataset.examples[:count]


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_a_split_without_training_data_is_refused(fraction):
    with pytest.raises(InputError, match="fraction"):
        split(labelled([1, 1], True), fraction)


# --- images


def png(array: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", **options)
    return buffer.getvalue()


def image_file(folder: Path, data: bytes | Image.Image, name: str = "a.png", **options: Any) -> Path:
    path = folder / name
    path.write_bytes(data) if isinstance(data, bytes) else data.save(path, **options)
    return path


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def image_error(path: Path, **kwargs: Any) -> str:
    with pytest.raises(InputError) as caught:
        load_image(path, 8, **kwargs)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_rgb_of_the_right_size_is_returned_unchanged(tmp_path):
    pixels = noise(8, 8, 3)
    image = load_image(image_file(tmp_path, png(pixels)), 8)
    assert (image.mode, image.size) == ("RGB", (8, 8))
    assert np.array_equal(np.asarray(image), pixels)


def test_every_kind_of_transparency_becomes_white(tmp_path):
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:, 4:] = (10, 20, 30, 255)
    rgba[0, 4:] = (10, 20, 30, 128)
    expected = np.full((8, 8, 3), 255, np.uint8)
    expected[:, 4:] = (10, 20, 30)
    full = np.asarray(load_image(image_file(tmp_path, png(rgba)), 8))
    assert np.array_equal(full[1:], expected[1:])
    assert np.abs(full[0, 4:].astype(float) - (np.array([10, 20, 30]) * 128 + 255 * 127) / 255).max() <= 1
    indices = Image.fromarray((rgba[..., 3] == 0).astype(np.uint8))
    indices.putpalette([10, 20, 30, 0, 0, 0])
    palette = load_image(image_file(tmp_path, indices, "p.png", transparency=1), 8)
    keyed = load_image(image_file(tmp_path, Image.fromarray(rgba[..., :3]), "k.png", transparency=(0, 0, 0)), 8)
    expected[0, 4:] = (10, 20, 30)
    assert np.array_equal(np.asarray(palette)[1:], expected[1:])
    assert np.array_equal(np.asarray(keyed), expected)


def test_sixteen_bit_grey_keeps_its_brightness(tmp_path):
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    image = np.asarray(load_image(image_file(tmp_path, Image.fromarray(values), "a.png"), 8))
    assert np.abs(image[..., 0] - values / 257).max() <= 0.51
    assert (image == image[..., :1]).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "RGBA"])
def test_every_usual_mode_is_converted(tmp_path, mode):
    name = "a.tiff" if mode == "CMYK" else "a.png"
    image = load_image(image_file(tmp_path, Image.new(mode, (5, 9)), name), 8)
    assert (image.mode, image.size) == ("RGB", (8, 8))


def test_stretch_pad_and_crop_do_what_they_say(tmp_path):
    wide = np.zeros((10, 20, 3), np.uint8)
    wide[:, 5:15] = 100
    path = image_file(tmp_path, png(wide))
    stretched, padded, cropped = (
        np.asarray(load_image(path, 20, mode=mode))[..., 0] for mode in ("stretch", "pad", "crop")
    )
    assert (stretched[:, 0].max(), stretched[10, 10]) == (0, 100)
    assert (padded[:5] == 255).all()
    assert np.array_equal(padded[5:15], wide[..., 0])
    assert (padded[15:] == 255).all()
    assert (cropped[:, 2:-2] == 100).all()
    assert load_image(image_file(tmp_path, png(noise(1, 3000, 3))), 8, mode="pad").size == (8, 8)


def test_the_orientation_of_a_photograph_is_respected(tmp_path):
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    path = image_file(tmp_path, Image.fromarray(pixels), "a.jpg", exif=exif)
    image = np.asarray(load_image(path, 16))
    assert image[:7].max() < 30
    assert image[-7:].min() > 225


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif"])
def test_a_file_cut_anywhere_is_refused_or_has_lost_no_pixel(tmp_path, suffix):
    path = image_file(tmp_path, Image.fromarray(noise(24, 24, 3)), f"a.{suffix}")
    whole, data = np.asarray(load_image(path, 8)), path.read_bytes()
    refused = 0
    for end in range(0, len(data), 13):
        path.write_bytes(data[:end])
        try:
            image = load_image(path, 8, row="example 5")
        except InputError as error:
            refused += "example 5" in str(error)
        else:
            assert np.array_equal(np.asarray(image), whole)
    assert refused > 0.9 * len(range(0, len(data), 13))


@fuzz
@given(st.data())
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's own remarks on damaged EXIF
def test_damaged_bytes_give_an_image_or_an_input_error(tmp_path, data):
    suffix = data.draw(st.sampled_from(["png", "gif", "bmp", "tiff", "webp", "jpg"]))
    path = image_file(tmp_path, Image.fromarray(noise(12, 12, 3)), f"a.{suffix}")
    damaged = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, min(len(damaged) - 1, 120)))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    try:
        assert load_image(path, 8).size == (8, 8)
    except InputError as error:
        if path.name not in str(error):
            pytest.fail(f"an error that does not help: {error}")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # the promise must not depend on the filter
@pytest.mark.parametrize("side", [10_000, 15_000, 60_000])
def test_a_decompression_bomb_is_refused_without_decoding(tmp_path, side):
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    path = image_file(
        tmp_path, b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )
    assert "a decompression bomb?" in image_error(path)
    assert "example 3" in image_error(path, row="example 3")


def test_what_is_no_image_is_refused(tmp_path):
    assert "no such image" in image_error(tmp_path / "nothing.png")
    assert str(tmp_path) in image_error(tmp_path)
    assert "no image" in image_error(image_file(tmp_path, b""))
    assert "no image" in image_error(
        image_file(tmp_path, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a.eps")
    )
    assert "floating-point" in image_error(image_file(tmp_path, Image.new("F", (4, 4)), "f.tiff"))
    with pytest.raises(InputError, match="stretch, pad, crop, figure"):
        load_image(tmp_path / "nothing.png", 8, mode="fit")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="size"):
        load_image(tmp_path / "nothing.png", 0)


def folder_of_images(root: Path, bad: set[int], count: int = 12) -> Dataset:
    rows = [{"file_name": f"{i}.png", "text": "x"} for i in range(count)]
    imagefolder(root, rows, [])
    for i in range(count):
        data = png(np.full((9, 9, 3), 10 * i, np.uint8))
        image_file(root, data[: len(data) // 2] if i in bad else data, f"{i}.png")
    return read_dataset(root)


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_load_images_returns_the_examples_in_order(tmp_path, workers):
    images, kept, remarks = load_images(folder_of_images(tmp_path, set()), 8, workers=workers)
    assert (images.dtype, images.shape, remarks.notes) == (np.uint8, (12, 8, 8, 3), ())
    assert images[:, 0, 0, 0].tolist() == [10 * i for i in range(12)]
    assert kept.tolist() == list(range(12))


def test_a_bad_image_stops_or_is_skipped_and_counted(tmp_path):
    dataset = folder_of_images(tmp_path, bad={0, 5, 6, 11})
    with pytest.raises(InputError, match=r"0\.png \(example 0\)"):
        load_images(dataset, 8)
    images, kept, remarks = load_images(dataset, 8, skip_bad=True)
    notes = remarks.notes
    assert kept.tolist() == [1, 2, 3, 4, 7, 8, 9, 10]
    assert images[:, 4, 4, 1].tolist() == [10 * i for i in kept]
    assert len(notes) == 1
    assert notes[0].startswith("4 bad images skipped: ")
    assert "5.png (example 5)" in notes[0]


def test_only_bad_images_are_an_error_even_if_skipped(tmp_path):
    with pytest.raises(InputError, match="none of the 3 images"):
        load_images(folder_of_images(tmp_path, {0, 1, 2}, count=3), 8, skip_bad=True)


# --- the tasks' own files


@real_files
def test_the_real_iclevr_labels_give_18009_examples_and_the_reference_split(tmp_path):
    for name in ("train.json", "objects.json"):
        shutil.copy(REAL / "iclevr" / name, tmp_path)
    (tmp_path / "iclevr").mkdir()
    for name in json.loads((tmp_path / "train.json").read_text()):
        (tmp_path / "iclevr" / name).touch()
    assert find_dataset(tmp_path) == tmp_path
    dataset = read_dataset(tmp_path)
    train, validation = split(dataset)
    assert (len(dataset.examples), dataset.notes) == (18_009, ())
    assert len({example.group for example in dataset.examples}) == 6_003
    assert train.examples == dataset.examples[:16_206]
    assert validation.examples == dataset.examples[16_206:]


@real_files
def test_the_real_monsters_captions_match_by_file_with_11_empty_keys_noted(tmp_path):
    shutil.copy(REAL / "monsters" / "train_info.json", tmp_path)
    info = json.loads((tmp_path / "train_info.json").read_text())
    (tmp_path / "train").mkdir()
    chosen = list(info)[:300] + [key for key in info if not info[key]["num_frames"]]
    frames = [f"{key}_{i}.png" for key in chosen for i in range(info[key]["num_frames"])]
    for name in frames:
        (tmp_path / "train" / name).touch()
    dataset = read_dataset(tmp_path)
    assert [example.image.name for example in dataset.examples] == frames
    assert dataset.notes[0].startswith("11 keys with num_frames 0: 163_die1, ")
    assert dataset.notes[1].startswith(f"{43_295 - len(frames):,} frames listed")
    assert all(len(example.captions) == 3 for example in dataset.examples)
