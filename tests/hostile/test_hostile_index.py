"""Indices of training images that lie, and images, folders and data that are not what `score`, `compare`, `copies` and `index`
expect."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attacks import REMOVE, Attack, check, json_attacks, set_field, text_attacks
from PIL import Image, PngImagePlugin
from scoring_helpers import make_evaluator, make_images

METADATA = {"image_name": "0.png", "prompt": "a red dragon", "seed": 0, "scheduler": "ddim"}
MODEL = ["--model", "model", "--engine", "eager"]
RAG = [
    "generate",
    "--prompt",
    "a red dragon",
    *MODEL,
    "--num-inference-steps",
    "2",
    "--out",
    "out.png",
    "--rag",
    "index",
]
COPIES = ["copies", "images", "--index", "index", "--out", "found.json"]
INFO, ROWS = "index/index.json", "index/images.jsonl"


@pytest.fixture(scope="session")
def made(fork_server, text_model, once) -> Path:
    """A folder with a model of text, four training images, their index, two folders of images, and an evaluator."""

    def fill(folder: Path) -> None:
        shutil.copytree(text_model, folder / "model")
        (folder / "data").mkdir()
        texts = ["a red dragon", "a blue slime", "a green robot", "a purple insect"]
        rows = [json.dumps({"file_name": f"{i}.png", "text": text}) for i, text in enumerate(texts)]
        make_images(folder / "data" / "x", size=(32, 32), count=4)
        for i in range(4):
            (folder / "data" / "x" / f"{i}.png").rename(folder / "data" / f"{i}.png")
        (folder / "data" / "x").rmdir()
        (folder / "data" / "metadata.jsonl").write_text("\n".join(rows))
        make_images(folder / "images", size=(32, 32), count=2, metadata=METADATA)
        make_images(folder / "others", size=(32, 32), count=2, seed=1, metadata=METADATA)
        make_evaluator(folder / "judge")
        (folder / "labels.json").write_text(json.dumps([["red cube"], ["gray cube"]]))
        command = ["index", "data", *MODEL, "--image-mode", "stretch", "--out", "index"]
        outcome = fork_server.run(command, folder, {"FASTGEN_CACHE": str(folder.parent / "cache")}, 100)
        assert outcome.code == 0, outcome

    return once("hostile-index", fill)


@pytest.fixture
def refused_there(made, fork_server, tmp_path) -> Callable[[Attack], None]:
    def run(attack: Attack) -> None:
        shutil.copytree(made, tmp_path / "workspace", symlinks=True)
        check(attack, tmp_path / "workspace", fork_server, tmp_path / "cache")

    return run


def recorded(name: str, data: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """Changes a file of the index, and its size and hash in index.json too."""

    def edit(workspace: Path) -> None:
        path, record = workspace / "index" / name, workspace / INFO
        path.write_bytes(data(path.read_bytes()))
        info = json.loads(record.read_text())
        content = path.read_bytes()
        info["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        record.write_text(json.dumps(info))

    return edit


def array(name: str, change: Callable[[np.ndarray], Any]) -> Callable[[Path], object]:
    """Changes an array of the index, and what index.json says of its file."""

    def edit(workspace: Path) -> None:
        path = workspace / "index" / name
        value = np.load(path)
        np.save(path, np.asarray(change(value)), allow_pickle=True)
        recorded(name, lambda data: data)(workspace)

    return edit


def put(value: Any, *place: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(old: np.ndarray) -> np.ndarray:
        new = old.copy()
        new[place] = value
        return new

    return change


def rag(name: str, word: str, edit: Callable[[Path], object]) -> Attack:
    return Attack(f"index:{name}", RAG, word, edit)


HEADER = b"{'descr': '<f2', 'fortran_order': False, 'shape': (4, 4, 8, 8), }"
ARRAYS = [
    *((name, "as float64", lambda a: a.astype(np.float64), "float64") for name in ("embeddings.npy", "latents.npy")),
    *((name, "one row less", lambda a: a[:-1], "expected") for name in ("embeddings.npy", "latents.npy", "pairs.npy")),
    *((name, "a scalar", lambda a: np.float32(1), "expected") for name in ("embeddings.npy", "thumbnails.npy")),
    *((name, "objects", lambda a: np.array([{}]), "expected") for name in ("embeddings.npy", "pairs.npy")),
    *((name, "Fortran", np.asfortranarray, "expected") for name in ("embeddings.npy", "latents.npy", "thumbnails.npy")),
    *(
        (name, "big endian", lambda a: a.astype(a.dtype.newbyteorder(">")), "expected")
        for name in ("pairs.npy", "latents.npy")
    ),
    ("embeddings.npy", "NaN", put(np.nan, 0, 0), "not of length 1"),
    ("embeddings.npy", "infinity", put(np.inf, 0, 0), "not of length 1"),
    ("embeddings.npy", "zero", put(0, 0), "not of length 1"),
    ("embeddings.npy", "long", put(1000, 0), "not of length 1"),
    ("latents.npy", "NaN", put(np.nan), "is not finite"),
    ("latents.npy", "infinity", put(np.inf), "is not finite"),
    ("pairs.npy", "image of none", put(4, 0, 1), "an image that the index does not have"),
    ("pairs.npy", "text of none", put(9, 3, 0), "does not have"),
    ("pairs.npy", "negative", put(-1, 0, 1), "does not have"),
    ("pairs.npy", "negative text", put(-1, 0, 0), "does not have"),
    ("pairs.npy", "a text without images", put(0, 1, 0), "lacks"),
    ("pairs.npy", "not sorted", lambda a: a[::-1], "not sorted"),
    ("thumbnails.npy", "signed", lambda a: a.astype(np.int8), "int8"),
]
FILES = [
    *((name, "empty", lambda data: b"", "cannot be read") for name in ("embeddings.npy", "latents.npy", "pairs.npy")),
    *((name, "half", lambda data: data[: len(data) // 2], "too few") for name in ("latents.npy", "thumbnails.npy")),
    *((name, "more", lambda data: data + b"x", "too many") for name in ("latents.npy", "embeddings.npy")),
    *((name, "zip", lambda data: b"PK\x03\x04" + data, "no .npy file") for name in ("latents.npy", "embeddings.npy")),
    *((name, "pickle", lambda data: b"\x80\x04N." + data, "no .npy") for name in ("latents.npy", "pairs.npy")),
    ("latents.npy", "huge", lambda d: d.replace(b"(4, ", b"(9" + b"9" * 12 + b", "), "expected float16"),
    ("latents.npy", "code", lambda d: d.replace(b"False", b"print"), "malformed"),
    ("latents.npy", "nested", lambda d: d[:8] + b"\xff\x26" + b"(" * 9983 + d, "malformed"),
    ("latents.npy", "version", lambda d: d[:6] + b"\x09" + d[7:], "no .npy file"),
    ("images.jsonl", "one less", lambda d: d[d.index(b"\n") + 1 :], "found 3 images, expected 4"),
    ("images.jsonl", "empty", lambda d: b"", "found 0 images"),
    ("images.jsonl", "text", lambda d: b"x" + d, "malformed JSON"),
    ("images.jsonl", "no object", lambda d: b"3\n" + d, "line 1: found 3"),
    ("images.jsonl", "outside", lambda d: d.replace(b'"0.png"', b'"../0.png"', 1), "found '../0.png'"),
    ("images.jsonl", "no text", lambda d: d.replace(b'"0.png"', b"5", 1), "id: found 5"),
    ("images.jsonl", "negative", lambda d: d.replace(b'"subject": 0', b'"subject": -1'), "subject: found -1"),
    ("images.jsonl", "UTF-16", lambda d: d.decode().encode("utf-16"), "UTF-16"),
]
INDEX = [
    *(rag(f"{name}:{what}", word, array(name, change)) for name, what, change, word in ARRAYS),
    *(rag(f"{name}:{what}", word, recorded(name, change)) for name, what, change, word in FILES),
    *json_attacks(
        "index",
        RAG,
        [
            *((INFO, "", value, "format_version is None") for value in (None, 3, [], "x")),
            *((INFO, "format_version", value, "format_version is") for value in (2, "1", None, [], 10**30)),
            *(
                (INFO, "latent_shape", value, "latent_shape")
                for value in (None, [], [4, 8], [4, 8, 0], [4, 8, 1e9], "x")
            ),
            *((INFO, "scaling_factor", value, "scaling_factor") for value in (0, -1, "x", None, 1e300, [])),
            *((INFO, "counts.images", value, "counts.images") for value in (0, -1, 1.5, "4", 10**12)),
            *((INFO, "width", value, "width") for value in (0, -1, 2**40, "x")),
            *((INFO, "thumbnail_size", value, "thumbnail_size") for value in (0, 10**6, "x", None)),
            *((INFO, "copies", value, "copies") for value in (3, [], {"distance": 1}, {"distance": "x"})),
            *((INFO, "text", value, "text: found") for value in ("words", 3, None)),
            *((INFO, "frames", value, "frames: found") for value in ("none", [])),
            *((INFO, "image_mode", value, "image_mode: found") for value in ("strech", None, 3)),
            *(
                (INFO, "files", value, "files: found")
                for value in (None, {}, [], {"../x": {"bytes": 1, "sha256": "0" * 64}})
            ),
            *((INFO, "component_sha256", value, "component_sha256") for value in (None, [], {"vae": 3})),
            *((INFO, field, REMOVE, f"{field} is missing") for field in ("counts", "files", "copies", "model_sha256")),
            (INFO, "component_sha256.text_encoder", "0" * 64, "another text encoder"),
            (INFO, "scaling_factor", 0.5, "scaling factor 0.5"),
            (INFO, "extra", 1, "unknown field"),
        ],
    ),
    *text_attacks(
        "index", RAG, [(INFO, "", "is empty"), (INFO, "{", "malformed"), (INFO, '{"a": 1, "a": 1}', "twice")]
    ),
    rag("missing array", "No such file", lambda w: (w / "index/latents.npy").unlink()),
    rag(
        "array is a folder",
        "index/pairs.npy",
        lambda w: ((w / "index/pairs.npy").unlink(), (w / "index/pairs.npy").mkdir()),
    ),
    rag("altered", "altered or damaged", lambda w: (w / "index/pairs.npy").write_bytes(bytes(160))),
    rag("no index", "is no index", lambda w: (w / INFO).unlink()),
    rag("fifo", "is a pipe", lambda w: ((w / INFO).unlink(), os.mkfifo(w / INFO))),
    Attack("copies of a broken index", COPIES, "counts is missing", set_field(INFO, "counts", REMOVE)),
]


@pytest.mark.parametrize("attack", INDEX, ids=str)
def test_an_index_that_lies_is_refused(attack, refused_there):
    refused_there(attack)


def chunked(name: str, *texts: str, kind: str = "itxt") -> Callable[[Path], object]:
    """An image with these texts as its metadata."""

    def edit(workspace: Path) -> None:
        info = PngImagePlugin.PngInfo()
        for text in texts:
            add = info.add_itxt if kind == "itxt" else info.add_text
            add("fastgen", text, zip=len(text) > 10**6)
        Image.new("RGB", (32, 32)).save(workspace / name, pnginfo=info)

    return edit


def special(name: str, kind: str) -> Callable[[Path], object]:
    def edit(workspace: Path) -> None:
        path = workspace / name
        path.unlink(missing_ok=True)
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "loop":
            path.symlink_to(path.name)
        elif kind == "size":
            Image.new("RGB", (16, 16)).save(path)
        elif kind == "16 bit":
            Image.fromarray(np.zeros((32, 32), np.uint16)).save(path)
        elif kind == "bomb":
            Image.new("1", (20_000, 20_000)).save(path)
        elif kind == "half":
            data = (workspace / "images/1.png").read_bytes()
            path.write_bytes(data[: len(data) // 2])
        else:
            path.write_bytes(kind.encode())

    return edit


COMPARE = ["compare", "images", "others", "--out", "out/x.png"]
SCORE = ["score", "images", "--requests", "labels.json", "--evaluator", "judge", "--out", "out/x.json"]
KINDS = {"fifo": ("is a pipe", "missing"), "folder": ("is a folder", "missing"), "loop": ("", "missing")}
IMAGES = [
    *(Attack(f"compare {kind}", COMPARE, words[0], special("images/0.png", kind)) for kind, words in KINDS.items()),
    *(Attack(f"score {kind}", SCORE, words[1], special("images/0.png", kind)) for kind, words in KINDS.items()),
    Attack("compare sizes", COMPARE, "16 x 16 px", special("images/0.png", "size")),
    *(
        Attack(f"{command[0]} {kind or 'empty'}", command, "images/0.png", special("images/0.png", kind))
        for command in (COMPARE, SCORE)
        for kind in ("16 bit", "bomb", "half", "", "text", "\x89PNG\r\n\x1a\n")
    ),
    *(
        Attack(f"{command[0]} metadata {text[:30]}", command, word, chunked("images/0.png", text))
        for command in (COMPARE, SCORE)
        for text, word in (
            ("{", "malformed JSON"),
            ("[1]", "expected the JSON of"),
            ("[" * 100_000, "nested too deeply"),
            ('{"seed": NaN}', "found NaN"),
            ('{"seed": 1e400}', "too large"),
            ('{"seed": 1, "seed": 2}', "twice"),
            ('{"scheduler": "\\ud800"}', "lone surrogate"),
            ('{"prompt": "\\u0000"}', "NUL"),
            ('{"x": "' + "x" * (2**21) + '"}', "images/0.png"),
        )
    ),
    Attack("compare nothing", ["compare", "images", "data/none", "--out", "x.png"], "no such folder"),
    Attack("compare no name in common", ["compare", "images", "judge", "--out", "x.png"], "no image name in common"),
    Attack("compare a file", ["compare", "images", "labels.json", "--out", "x.png"], "no such folder"),
    Attack("score twice", ["score", "images", "images", *SCORE[2:]], "given twice"),
    Attack("score too few", SCORE, "are missing", lambda w: (w / "images/1.png").unlink()),
    Attack("score prompts", SCORE, "holds prompts", lambda w: (w / "labels.json").write_text('[{"prompt": "a"}]')),
    Attack("score unknown label", SCORE, "unknown label", lambda w: (w / "labels.json").write_text('[["x"], ["y"]]')),
    Attack("score requests fifo", SCORE, "is a pipe", special("labels.json", "fifo")),
    Attack("score for others", SCORE, "was generated for", chunked("images/0.png", '{"labels": ["gray cube"]}')),
    *(
        Attack(f"copies {line[:40]}", COPIES, word, lambda w, line=line: (w / "images/manifest.jsonl").write_text(line))
        for line, word in (
            ("3", "line 1: found 3"),
            ("{", "malformed"),
            ("{}", "image_name: found None"),
            ('{"image_name": "../0.png"}', "found '../0.png'"),
            ('{"image_name": "0.png", "retrieved": [1]}', "retrieved: found"),
            ('{"image_name": "0.png"}\n{"image_name": "0.png"}', "occurs twice"),
            ('{"image_name": "7.png"}', "no such image"),
            ('{"image_name": "0.png", "error": "x"}', "holds no images"),
            ('{"image_name": "0.png", "seed": NaN}', "NaN"),
        )
    ),
    *(
        Attack(f"copies {kind or 'empty'}", COPIES, "images/0.png", special("images/0.png", kind))
        for kind in ("fifo", "folder", "half", "", "text")
    ),
]


@pytest.mark.parametrize("attack", IMAGES, ids=str)
def test_images_that_are_none_are_refused(attack, refused_there):
    refused_there(attack)


BUILD = ["index", "data", *MODEL, "--image-mode", "stretch", "--out", "new"]
TABLE, CSV = "data/metadata.jsonl", "data/metadata.csv"


def csv(text: str | bytes) -> Callable[[Path], object]:
    def edit(workspace: Path) -> None:
        (workspace / TABLE).unlink()
        (workspace / CSV).write_bytes(text if isinstance(text, bytes) else text.encode())

    return edit


def data_file(name: str, text: str) -> Callable[[Path], object]:
    def edit(workspace: Path) -> None:
        (workspace / TABLE).unlink()
        (workspace / "data" / name).write_text(text)

    return edit


INFO_FILE = "train_info.json"
DATA = [
    *text_attacks(
        "data",
        BUILD,
        [
            (TABLE, "", "is empty"),
            (TABLE, "{", "malformed"),
            (TABLE, "3", "found 3"),
            (TABLE, "[]", "found []"),
            (TABLE, '{"file_name": "0.png"}', "found the columns"),
            (TABLE, '{"text": "a"}', "found the columns"),
            (TABLE, '{"file_name": "../0.png", "text": "a"}', "found '../0.png'"),
            (TABLE, '{"file_name": 5, "text": "a"}', "file_name: found 5"),
            (TABLE, '{"file_name": "0.png", "text": 5}', "text: found 5"),
            (TABLE, '{"file_name": "0.png", "text": ""}', "text: is empty"),
            (TABLE, '{"file_name": "0.png", "text": []}', "text: found []"),
            (TABLE, '{"file_name": "0.png", "text": "\\u0000"}', "NUL"),
            (TABLE, '{"file_name": "0.png", "text": "\\ud800"}', "lone surrogate"),
            (TABLE, '{"file_name": "0.png", "text": "' + "x" * 100_001 + '"}', "100,001 characters"),
            (TABLE, '{"file_name": "0.png", "text": "a"}\n' * 2, "was on line 1"),
            (TABLE, '{"file_name": "9.png", "text": "a"}', "no image matches"),
            (TABLE, b"\xff\xfe{\x00}\x00", "UTF-16"),
        ],
    ),
    *(
        Attack(f"csv {text[:40]!r}", BUILD, word, csv(text))
        for text, word in (
            ("", "is empty"),
            ("file_name;text\n0.png;a", "separated by commas"),
            ("file_name,text,text\n0.png,a,b", "occurs twice"),
            ("file_name,text\n0.png", "found 1 cells"),
            ('file_name,text\n0.png,"a', "malformed CSV"),
            ('file_name,captions\n0.png,"[1, NaN]"', "captions"),
            ('file_name,captions\n0.png,"[' + "[" * 50_000 + '"', "captions"),
            ("file_name,text\n0.png," + "x" * 200_000, "malformed CSV"),
            (b"file_name,text\n0.png,\xff", "byte 0xff"),
            ("file_name,text\n0.png,a\x00b", "NUL"),
        )
    ),
    *(
        Attack(f"monsters {text[:50]}", BUILD, word, data_file(INFO_FILE, text))
        for text, word in (
            ("[]", "found []"),
            ("{}", "found {}"),
            ('{"0_main": 3}', "found 3"),
            ('{"0_main": {}}', "given_description: found None"),
            ('{"0_main": {"given_description": "a"}}', "given_description"),
            ('{"0_main": {"given_description": [5]}}', "given_description: found 5"),
            ('{"0_main": {"given_description": ["a"], "action_description": 3}}', "action_description: found 3"),
            ('{"0_main": {"given_description": ["a"], "num_frames": -1}}', "num_frames: found -1"),
            ('{"0_main": {"given_description": ["a"], "num_frames": 1e9}}', "num_frames"),
            ('{"": {"given_description": ["a"]}}', "is empty"),
            ('{"0_main": {"given_description": ["a"]}}', "no image matches"),
        )
    ),
    *(
        Attack(f"data image {kind or 'empty'}", BUILD, "0.png", special("data/0.png", kind))
        for kind in ("half", "", "text", "bomb")
    ),
    Attack("no data", ["index", "judge", *BUILD[2:]], "holds no known dataset"),
    Attack("data is a file", ["index", "labels.json", *BUILD[2:]], "is no folder"),
    Attack("labels", BUILD, "holds labels", lambda w: (w / TABLE).write_text('{"file_name": "0.png", "label": "cat"}')),
    Attack("out is a file", [*BUILD[:-1], "labels.json"], "exists and is no index"),
    Attack("out is a fifo", [*BUILD[:-1], "fifo"], "exists and is no index", lambda w: os.mkfifo(w / "fifo")),
    Attack("out is full", [*BUILD[:-1], "images"], "exists and is no index"),
    Attack("out is another index", [*BUILD[:-1], "index", "--frames", "first"], "frames is 'all' there"),
    Attack("out is a broken index", [*BUILD[:-1], "index"], "counts is missing", set_field(INFO, "counts", REMOVE)),
]


@pytest.mark.parametrize("attack", DATA, ids=str)
def test_data_that_lie_are_refused(attack, refused_there):
    refused_there(attack)


def test_an_honest_index_is_used(made, fork_server, tmp_path):
    folder = shutil.copytree(made, tmp_path / "workspace")
    sheet = ["copies", "images", "--index", "index", "--out", "copies.json", "--sheet", "sheet.png", "--data", "data"]
    for command in (RAG, sheet, COMPARE, [*SCORE[:-1], "out/y.json"], BUILD, [*BUILD[:-1], "index"], sheet):
        outcome = fork_server.run(command, folder, {"FASTGEN_CACHE": str(tmp_path / "cache")}, 60)
        assert outcome.code == 0, (command, outcome)
    assert json.loads((folder / "copies.json").read_text())["folders"]["images"]["images"] == 2


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 16 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", disk], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


FULL = {
    "index": [*BUILD[:-1], "../disk/new"],
    "score": [*SCORE[:-1], "../disk/score.json"],
    "compare": [*COMPARE[:-1], "../disk/x.png"],
    "copies": [*COPIES[:-1], "../disk/copies.json"],
}


@pytest.mark.parametrize("command", FULL.values(), ids=FULL.keys())
def test_a_full_disk_is_one_line_and_the_command_continues_when_there_is_room(
    command, made, fork_server, small_disk, tmp_path
):
    folder = shutil.copytree(made, tmp_path / "workspace")
    environment = {"FASTGEN_CACHE": str(tmp_path / "cache")}
    (small_disk / "theirs").write_bytes(bytes(16 * 2**10))
    outcome = fork_server.run(command, folder, environment, 60)
    lines = [line for line in outcome.stderr.splitlines() if not line.startswith("warning: ")]
    assert (outcome.code, len(lines)) == (1, 1), outcome
    assert "No space left on device" in lines[0]
    assert lines[0].startswith("fastgen: error: ../disk/")
    assert [path.name for path in small_disk.iterdir()] == ["theirs"]
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    outcome = fork_server.run(command, folder, environment, 60)
    assert outcome.code == 0, outcome
    assert len(list(small_disk.iterdir())) >= 2
