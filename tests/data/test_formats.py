"""The layouts of Hugging Face's imagefolder and of common trainers, and which folders are not taken for one."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastgen.data import find_dataset, read_dataset
from fastgen.data.class_folders import NO_CLASSES
from fastgen.data.folders import OTHERS, SPLITS
from fastgen.data.readers import FORMATS
from fastgen.errors import InputError
from fastgen.files.installing import hint

fuzz = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
TABLES = ["jsonl", "csv", "parquet"]
names = st.text("aä猫 '\"#%&(),;=é", min_size=1, max_size=8).map(lambda text: f"{text}.png")
captions = st.text("a,\"'\n\r\t;|猫é \\", min_size=1, max_size=12).filter(str.strip)


def touch(root: Path, *files: str) -> Path:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def text_file(root: Path, name: str, text: str | bytes) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def table(root: Path, kind: str, rows: list[dict[str, Any]], folder: str = ".") -> Path:
    """metadata.`kind` with these rows; lists as JSON in CSV."""
    path = root / folder / f"metadata.{kind}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()})
        path.write_text(text.getvalue(), encoding="utf-8", newline="")
    return root


def error_of(root: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_dataset(root)
    message = str(caught.value)
    assert str(root) in message
    assert "\n" not in message
    return message


def pairs(root: Path) -> dict[str, tuple[str, ...]]:
    """Image, relative to the root -> its captions or labels."""
    dataset = read_dataset(root)
    assert [e for e in dataset.examples if not e.image.is_file()] == []
    assert dataset.fingerprint
    return {e.image.relative_to(root).as_posix(): e.captions or e.labels for e in dataset.examples}


# --- metadata


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("column", ["text", "caption", "captions", "prompt", "description"])
def test_captions_are_read_from_each_kind_of_metadata_and_column(tmp_path, kind, column):
    rows = [{"file_name": f"{i}.JPG", column: f'a "red" dragon, flying {i}\nhigh', "size": i} for i in range(3)]
    table(touch(tmp_path, "0.JPG", "1.JPG", "3.JPG"), kind, rows)
    assert pairs(tmp_path) == {f"{i}.JPG": (f'a "red" dragon, flying {i}\nhigh',) for i in range(2)}
    assert read_dataset(tmp_path).kind == "text"
    assert read_dataset(tmp_path).notes == (
        f"1 images listed in metadata.{kind} but missing: 2.JPG",
        f"1 images not listed in metadata.{kind}: 3.JPG",
    )


@pytest.mark.parametrize("kind", TABLES)
def test_a_row_may_have_several_captions(tmp_path, kind):
    table(touch(tmp_path, "0.png"), kind, [{"file_name": "0.png", "captions": ["one, of two", "two"]}])
    assert pairs(tmp_path) == {"0.png": ("one, of two", "two")}


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("column", ["label", "class", "class_name"])
def test_a_column_of_one_class_gives_labels_with_one_entry(tmp_path, kind, column):
    rows = [{"file_name": f"{i}.png", column: name} for i, name in enumerate(["dog", "cat", "dog"])]
    dataset = read_dataset(table(touch(tmp_path, "0.png", "1.png", "2.png"), kind, rows))
    assert [e.labels for e in dataset.examples] == [("dog",), ("cat",), ("dog",)]
    assert (dataset.kind, dataset.objects) == ("labels", {"cat": 0, "dog": 1})


@pytest.mark.parametrize("kind", TABLES)
def test_numbers_of_classes_keep_their_order(tmp_path, kind):
    rows = [{"file_name": f"{i}.png", "label": i} for i in range(11)]
    dataset = read_dataset(table(touch(tmp_path, *(f"{i}.png" for i in range(11))), kind, rows))
    assert dataset.objects == {str(i): i for i in range(11)}


@pytest.mark.parametrize("kind", TABLES)
def test_labels_are_a_list_in_each_kind_of_metadata(tmp_path, kind):
    rows = [
        {"file_name": "0.png", "labels": ["red cube", "blue sphere"]},
        {"file_name": "1.png", "labels": ["cyan cube"]},
    ]
    assert pairs(table(touch(tmp_path, "0.png", "1.png"), kind, rows)) == {
        "0.png": ("red cube", "blue sphere"),
        "1.png": ("cyan cube",),
    }


def test_labels_in_csv_may_be_separated_by_commas(tmp_path):
    text_file(touch(tmp_path, "0.png"), "metadata.csv", 'file_name,labels\n0.png,"red cube, blue sphere"\n')
    assert pairs(tmp_path) == {"0.png": ("red cube", "blue sphere")}


@fuzz
@given(st.dictionaries(names, captions, min_size=1, max_size=4), st.sampled_from(["jsonl", "csv"]))
def test_any_name_and_caption_is_read_as_it_was_written(tmp_path, content, kind):
    root = tmp_path / "any"
    shutil.rmtree(root, ignore_errors=True)
    touch(root, *content)
    table(root, kind, [{"file_name": name, "text": text} for name, text in content.items()])
    assert pairs(root) == {name: (text,) for name, text in content.items()}


@fuzz
@given(
    st.binary(max_size=60) | st.text('file_nametext,"\n\r;.png', max_size=60).map(str.encode), st.sampled_from(TABLES)
)
def test_any_bytes_give_a_dataset_or_an_input_error(tmp_path, content, kind):
    root = tmp_path / "bytes"
    shutil.rmtree(root, ignore_errors=True)
    text_file(touch(root, "a.png"), f"metadata.{kind}", content)
    try:
        assert read_dataset(root).examples
    except InputError:
        assert str(root) in error_of(root)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_byte_order_mark_crlf_and_blank_lines_are_no_obstacle(tmp_path, kind):
    row = '{"file_name": "images/0.jpg", "text": "one"}' if kind == "jsonl" else "file_name,text\r\nimages/0.jpg,one"
    text_file(touch(tmp_path, "images/0.jpg"), f"metadata.{kind}", f"\ufeff{row}\r\n\r\n")
    assert pairs(tmp_path) == {"images/0.jpg": ("one",)}


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize(
    ("folder", "name", "image"),
    [
        (".", "images/0.jpg", "images/0.jpg"),
        (".", "train/0.jpg", "train/0.jpg"),
        (".", "mine/0.jpg", "0.jpg"),
        (".", "0.jpg", "images/0.jpg"),
        (".", "0.jpg", "train/0.jpg"),
        ("train", "0.jpg", "train/0.jpg"),
        ("train", "train/0.jpg", "train/0.jpg"),
        ("train", "sub/0.jpg", "train/sub/0.jpg"),
        ("train", "images/0.jpg", "images/0.jpg"),
    ],
)
def test_names_are_relative_to_the_metadata_or_begin_with_its_folder(tmp_path, kind, folder, name, image):
    root = tmp_path / "mine"
    table(touch(root, image, f"{Path(image).parent}/more.png"), kind, [{"file_name": name, "text": "x"}], folder)
    assert pairs(root) == {image: ("x",)}
    beside = (Path(image).parent / "more.png").as_posix()
    assert read_dataset(root).notes == (f"1 images not listed in metadata.{kind}: {beside}",)


def test_names_with_and_without_the_folder_may_be_mixed_but_not_for_one_image(tmp_path):
    touch(tmp_path, "train/0.png", "train/1.png")
    rows = [{"file_name": "0.png", "text": "x"}, {"file_name": "train/1.png", "text": "y"}]
    assert pairs(table(tmp_path, "jsonl", rows, "train")) == {"train/0.png": ("x",), "train/1.png": ("y",)}
    table(tmp_path, "jsonl", [*rows, {"file_name": "train/0.png", "text": "z"}], "train")
    assert "line 3: file_name 'train/0.png' means " in error_of(tmp_path)
    assert error_of(tmp_path).endswith("train/0.png, as line 1 does")


def test_other_splits_and_what_is_not_read_are_noted(tmp_path):
    touch(tmp_path, "train/0.png", "test/1.png", "validation/2.png")
    rows = [{"file_name": f"{name}.png", "text": "x", "label": "y"} for name in ("train/0", "test/1", "validation/2")]
    table(tmp_path, "csv", rows)
    table(tmp_path, "csv", rows[:1], "train")
    assert pairs(tmp_path) == {"train/0.png": ("x",)}
    assert read_dataset(tmp_path).notes == (
        "2 images of other splits left out, those of train/ are read: test/1.png, validation/2.png",
        "1 metadata files not read, metadata.csv is: train/metadata.csv",
        "1 columns of metadata.csv not read, text is: label",
    )
    (tmp_path / "metadata.csv").unlink()
    assert read_dataset(tmp_path).notes[0] == "2 folders of other splits left out, train/ is read: test/, validation/"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty, expected rows such as"),
        ("file_name,text\n", "is empty, expected rows such as"),
        ("file_name;text\na.png;x\n", "line 1: found 'file_name;text', expected the names of columns, separated by commas"),
        ("file_name,text\na.png,red, flying\n", "line 2: found 3 cells, expected 2 (file_name, text); a text with a comma"),
        ('file_name,text\na.png,"x" y\n', "line 2: malformed CSV"),
        ('file_name,text\na.png,"x\n', "line 2: malformed CSV"),
        ("file_name,text\na.png," + "x" * 200_000, "line 2: malformed CSV: field larger"),
        ("file_name,text,text\na.png,x,y\n", "line 1: column 'text' occurs twice"),
        ("image,text\na.png,x\n", "line 2: found the columns ['image', 'text'], expected file_name and one of text, "),
        ("file_name,tags\na.png,x\n", "line 2: found the columns ['file_name', 'tags'], expected file_name and one of text, "),
        ('file_name,text\nb.png,"x\ny"\na.png,\n', "line 4: text: is empty"),
        ('file_name,text\nb.png,"x\ny"\n\nb.png,z\n', "line 5: file_name 'b.png' was on line 2"),
        ("file_name,text\n../a.png,x\n", "line 2: file_name: found '../a.png'"),
        ("file_name,text\n/etc/a.png,x\n", "line 2: file_name: found '/etc/a.png'"),
        ("file_name,text\n,x\n", "line 2: file_name: is empty"),
        ("file_name,label\na.png,\n", "line 2: label: is empty"),
        ('file_name,labels\na.png,"red, red"\n', "line 2: labels: 'red' occurs twice"),
        ('file_name,captions\na.png,"[x"\n', "line 2: captions: found '[x', expected a list as JSON"),
        ("file_name,text\nb.png,x\n", "b.png; 1 are listed: b.png; 1 other images are in "),
        (b"file_name,text\na.png,\xff\n", "line 2, column 7: not UTF-8"),
    ],
)  # fmt: skip
def test_a_bad_csv_file_is_named_with_its_line(tmp_path, text, message):
    assert message in error_of(text_file(touch(tmp_path, "a.png"), "metadata.csv", text))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"file_name": "a.png", "text": "x"}, {"file_name": "b.png", "text": None}], "row 2: text: found None"),
        ([{"file_name": "a.png", "text": "x"}] * 2, "row 2: file_name 'a.png' was on row 1"),
        ([{"file_name": "../a.png", "text": "x"}], "row 1: file_name: found '../a.png'"),
        ([{"file_name": 3, "text": "x"}], "row 1: file_name: found 3"),
        ([{"file_name": "a.png", "label": 0.5}], "row 1: label: found 0.5"),
        ([{"image": "a.png", "text": "x"}], "row 1: found the columns ['image', 'text'], expected file_name"),
    ],
)
def test_a_bad_row_of_parquet_is_named(tmp_path, rows, message):
    assert message in error_of(table(touch(tmp_path, "a.png"), "parquet", rows))


def test_without_pyarrow_parquet_is_one_line_that_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    text_file(touch(tmp_path, "a.png"), "metadata.parquet", "x")
    path = tmp_path / "metadata.parquet"
    assert error_of(tmp_path) == f"{path}: needs pyarrow, not installed here: {hint('parquet')}"


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    pytest.importorskip("pyarrow")
    text_file(touch(tmp_path, "a.png"), "metadata.parquet", "file_name,text\n")
    assert "metadata.parquet: cannot be read as Parquet: " in error_of(tmp_path)


# --- captions beside the images


@pytest.mark.parametrize("base", ["", "train/", "images/", "10_dragon/", "img/10_dragon/"])
def test_a_text_file_beside_an_image_holds_a_caption_on_each_line(tmp_path, base):
    touch(tmp_path, *(f"{base}{name}" for name in ("0.jpg", "1.PNG", "b c.é.webp", "none.png")))
    text_file(tmp_path, f"{base}0.txt", "\ufeffa red dragon, flying\r\n\r\n a dragon \r\n")
    text_file(tmp_path, f"{base}1.TXT", 'a "cat"')
    text_file(tmp_path, f"{base}b c.é.caption", "猫\n")
    assert pairs(tmp_path) == {
        f"{base}0.jpg": ("a red dragon, flying", "a dragon"),
        f"{base}1.PNG": ('a "cat"',),
        f"{base}b c.é.webp": ("猫",),
    }
    dataset = read_dataset(tmp_path)
    assert (dataset.kind, dataset.objects) == ("text", None)
    assert dataset.notes[0] == f"1 images without a caption file left out: {base}none.png"
    assert len(dataset.notes) == (2 if "10_dragon" in base else 1)


def test_what_lies_beside_images_with_captions_is_noted(tmp_path):
    touch(
        tmp_path, "0.png", "0.caption", "readme.txt", "0.npz", ".hidden", "test/1.png", "more/2.png", "more/deep/3.png"
    )
    text_file(tmp_path, "0.txt", "a dragon")
    assert pairs(tmp_path) == {"0.png": ("a dragon",)}
    assert read_dataset(tmp_path).notes == (
        "1 images without a caption file left out: more/2.png",
        "1 caption files left out, the image has another one: 0.caption",
        "2 files that are no image and no image's caption: 0.npz, readme.txt",
        "2 folders left out: test/, more/deep/",
    )


def test_pictures_of_a_job_in_a_dataset_are_not_its_images(tmp_path):
    touch(tmp_path, "0.png", "out/0.png", "out/manifest.jsonl")
    text_file(tmp_path, "0.txt", "a dragon")
    assert (pairs(tmp_path), read_dataset(tmp_path).notes) == ({"0.png": ("a dragon",)}, ())


def test_two_images_of_one_caption_stay_on_one_side_of_a_split(tmp_path):
    text_file(touch(tmp_path, "0.png", "0.jpg"), "0.txt", "a dragon")
    assert {e.group for e in read_dataset(tmp_path).examples} == {"0"}


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "0.txt: is empty"), (b" \r\n\n", "0.txt: is empty"), (b"\xe9", "0.txt: line 1, column 1: not UTF-8")],
)
def test_a_bad_caption_file_is_named(tmp_path, content, message):
    assert message in error_of(text_file(touch(tmp_path, "0.png"), "0.txt", content))


# --- a folder per class


@pytest.mark.parametrize("base", ["", "train/"])
def test_a_folder_per_class_gives_labels_with_one_entry(tmp_path, base):
    touch(tmp_path, *(f"{base}{name}" for name in ("dog/1.JPG", "cat/0.png", "猫, é/0.webp", "dog/0.png")))
    assert pairs(tmp_path) == {
        f"{base}cat/0.png": ("cat",),
        f"{base}dog/0.png": ("dog",),
        f"{base}dog/1.JPG": ("dog",),
        f"{base}猫, é/0.webp": ("猫, é",),
    }
    dataset = read_dataset(tmp_path)
    assert (dataset.kind, dataset.objects, dataset.notes) == ("labels", {"cat": 0, "dog": 1, "猫, é": 2}, ())


def test_classes_are_numbered_by_objects_json(tmp_path):
    touch(tmp_path, "cat/0.png", "dog/0.png")
    text_file(tmp_path, "objects.json", '{"dog": 0, "cat": 1}')
    assert read_dataset(tmp_path).objects == {"dog": 0, "cat": 1}
    text_file(tmp_path, "objects.json", '{"dog": 0, "car": 1}')
    assert "cat/0.png: unknown label 'cat'" in error_of(tmp_path)


def test_what_lies_beside_the_images_of_classes_is_noted(tmp_path):
    touch(tmp_path, "train/cat/0.png", "train/dog/0.png", "train/dog/a.heic", "train/dog/old/1.png", "test/cat/2.png")
    (tmp_path / "train/bird").mkdir()
    (tmp_path / "train/.cache").mkdir()
    assert read_dataset(tmp_path).notes == (
        "1 folders of classes without an image left out: train/bird/",
        "1 files in folders of classes that are no images: train/dog/a.heic",
        "1 folders in folders of classes left out: train/dog/old/",
        "1 folders of other splits left out, train/ is read: test/",
    )


@pytest.mark.parametrize(
    "files",
    [
        ["cat/0.png"],
        ["cat/0.png", "dog/readme.md"],
        ["cat/0.png", "dog/0.png", "preview.png"],
        ["cat/0.png", "dog/0.png", "src/main.py"],
        ["cat/0.png", "dog/0.png", "pyproject.toml"],
        ["runs/a/0.png", "runs/b/0.png", "generated/a/0.png", "generated/b/0.png"],
        *(["a/0.png", "b/0.png", f"b/{name}"] for name in sorted({*OTHERS, "metadata.csv"})),
        *([f"{name}/0.png", "b/0.png", "c/0.png"] for name in sorted(NO_CLASSES)),
        *([f"{name}/0.png", "other/0.png", "c/0.png"] for name in sorted(SPLITS)),
    ],
)
def test_folders_of_images_that_may_be_something_else_are_no_classes(tmp_path, files):
    touch(tmp_path, *files)
    assert "holds no known dataset, expected " in error_of(tmp_path)
    assert not any(format_.recognise(tmp_path) for format_ in FORMATS)


def test_images_that_nothing_describes_are_counted_in_the_error(tmp_path):
    assert error_of(touch(tmp_path, "0.png", "1.JPG")).endswith("; found 2 images and nothing that describes them")


# --- where it is found


def sidecars(root: Path) -> Path:
    return text_file(touch(root, "0.png"), "0.txt", "a dragon")


@pytest.mark.parametrize("below", [".", "data", "public_data", "data/mine"])
@pytest.mark.parametrize("kind", ["csv", "parquet", "train/csv", "sidecars", "train/sidecars", "train/classes"])
def test_find_dataset_finds_what_describes_itself_where_people_put_it(tmp_path, below, kind):
    root = tmp_path / below
    split, _, last = kind.rpartition("/")
    if last == "sidecars":
        sidecars(root / split)
    elif last == "classes":
        touch(root, "train/cat/0.png", "train/dog/0.png")
    else:
        table(touch(root, f"{split or '.'}/0.png"), last, [{"file_name": "0.png", "text": "x"}], split or ".")
    assert find_dataset(tmp_path) == root
    assert read_dataset(root).examples


@pytest.mark.parametrize("files", [["cat/0.png", "dog/0.png"], ["10_dragon/0.png", "10_dragon/0.txt"]])
def test_folders_of_images_are_found_in_data_but_not_in_a_folder_that_may_be_anything(tmp_path, files):
    for name in files:
        text_file(tmp_path, name, "x")
        text_file(tmp_path, f"data/mine/{name}", "x")
    assert find_dataset(tmp_path) == tmp_path / "data" / "mine"
    shutil.rmtree(tmp_path / "data")
    assert find_dataset(tmp_path) is None
    assert read_dataset(tmp_path).examples


def test_classes_directly_in_data_are_found(tmp_path):
    touch(tmp_path, "data/cat/0.png", "data/dog/0.png")
    assert find_dataset(tmp_path) == tmp_path / "data"


def test_a_described_dataset_goes_before_folders_of_images_beside_it(tmp_path):
    sidecars(tmp_path / "data" / "mine")
    touch(tmp_path, "data/other/a/0.png", "data/other/b/0.png", "data/pictures/0.png")
    assert find_dataset(tmp_path) == tmp_path / "data" / "mine"
    sidecars(tmp_path / "data" / "yours")
    with pytest.raises(InputError, match=r"found several datasets: .*mine, .*yours; choose one with --data"):
        find_dataset(tmp_path)


def test_a_folder_of_runs_and_generated_pictures_is_no_dataset(tmp_path):
    for job in ("generated/a", "generated/b"):
        touch(tmp_path, f"{job}/0.png", f"{job}/job.json", f"{job}/manifest.jsonl", f"{job}/contact_sheet.png")
    touch(tmp_path, "runs/m/previews/0.png", "runs/m/training.json", "monster.png", "test.json", "data/test.json")
    assert find_dataset(tmp_path) is None
    for folder in (".", "generated", "generated/a", "runs", "runs/m"):
        assert not any(format_.recognise(tmp_path / folder) for format_ in FORMATS), folder
