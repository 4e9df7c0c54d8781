"""Files of weights that lie, files that are none, evaluators and checkpoints to import: refused in one line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attacks import Attack

OPTIONS = ["--model", "model", "--engine", "eager", "--out", "out.png", "--num-inference-steps", "1"]
PROMPT = ["generate", *OPTIONS, "--prompt", "a red dragon"]
UNET = "unet/diffusion_pytorch_model.safetensors"
Edit = Callable[[Path], object]


def header(change: Callable[[dict[str, Any]], object]) -> Edit:
    """Changes the header of a safetensors file; its data stay."""

    def edit(file: Path) -> None:
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        values = json.loads(data[8 : 8 + length])
        change(values)
        text = json.dumps(values).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return edit


def tensors(change: Callable[[dict[str, Any]], object]) -> Edit:
    """Changes the tensors of a safetensors file."""

    def edit(file: Path) -> None:
        from safetensors.numpy import load_file, save_file

        state = load_file(file)
        change(state)
        save_file(state, file)

    return edit


def first(values: dict[str, Any]) -> Any:
    return next(key for key in sorted(values) if key != "__metadata__")


def fill(number: float) -> Callable[[dict[str, Any]], object]:
    return lambda state: state[first(state)].fill(number)


def replaced(make: Callable[[Path], object]) -> Edit:
    def edit(path: Path) -> None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        make(path)

    return edit


def loop(path: Path) -> None:
    path.symlink_to(path)


def no_utf8(path: Path) -> None:
    path.write_bytes(b'{"a": "\xff\xfe"}')


FILES: dict[str, tuple[Edit, str]] = {
    "empty": (lambda f: f.write_bytes(b""), ""),
    "text": (lambda f: f.write_text("weights"), ""),
    "cut": (lambda f: f.write_bytes(f.read_bytes()[:-7]), ""),
    "longer": (lambda f: f.write_bytes(f.read_bytes() + b"x"), ""),
    "huge header": (lambda f: f.write_bytes((2**62).to_bytes(8, "little") + f.read_bytes()[8:]), ""),
    "long header": (lambda f: f.write_bytes((90 * 2**20).to_bytes(8, "little") + f.read_bytes()[8:]), ""),
    "header of another file": (lambda f: f.write_bytes((2).to_bytes(8, "little") + b"[]" + f.read_bytes()), ""),
    "pickle": (lambda f: f.write_bytes(b"\x80\x02cos\nsystem\nU\x04exitq\x00\x85q\x01Rq\x02."), ""),
    "overlap": (header(lambda h: h[first(h)].update(data_offsets=[0, 4])), ""),
    "negative": (header(lambda h: h[first(h)].update(data_offsets=[-4, 4])), ""),
    "dtype": (header(lambda h: h[first(h)].update(dtype="F31")), ""),
    "whole numbers": (header(lambda h: h[first(h)].update(dtype="I32")), "dtype"),
    "shape": (header(lambda h: h[first(h)].update(shape=[1, 10**9])), ""),
    "flat": (header(lambda h: h[first(h)].update(shape=[1, *h[first(h)]["shape"]])), "1, "),
    "nan": (tensors(fill(float("nan"))), "NaN"),
    "infinity": (tensors(fill(float("inf"))), "NaN"),
    "missing": (tensors(lambda s: s.pop(first(s))), ""),
    "none": (tensors(lambda s: [s.pop(key) for key in list(s)[1:]]), ""),
    "extra": (tensors(lambda s: s.update(another=s[first(s)])), "another"),
    "gone": (Path.unlink, ""),
    "folder": (replaced(Path.mkdir), ""),
    "pipe": (replaced(os.mkfifo), ""),
    "loop": (replaced(loop), ""),
}
PLACES = ["unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"]
PLACES.append("text_encoder/model.safetensors")


def files(prefix: str, argv: list[str], root: str, place: str) -> list[Attack]:
    """An attack for each row of FILES; the refusal names the folder of the file, and the row's word."""

    def edit(change: Edit) -> Edit:
        return lambda workspace: change(workspace / root / place)

    shown = place.partition("/")[0]
    return [
        Attack(f"{prefix}:{place}:{name}", argv, word or shown, edit(change)) for name, (change, word) in FILES.items()
    ]


RECORDS = ["model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json", "fastgen.json"]
RECORDS += ["scheduler/scheduler_config.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"]
BROKEN: dict[str, Edit] = {
    "empty": lambda f: f.write_bytes(b""),
    "not UTF-8": no_utf8,
    "NUL": lambda f: f.write_text('{"_class_name": "a\\u0000b"}'),
    "infinity": lambda f: f.write_text('{"a": 1e999}'),
    "twice": lambda f: f.write_text('{"a": 1, "a": 2}'),
    "deep": lambda f: f.write_text("[" * 100_000),
}


def records() -> list[Attack]:
    def edit(place: str, change: Edit) -> Edit:
        return lambda workspace: change(workspace / "model" / place)

    return [
        Attack(f"{place}:{name}", PROMPT, place, edit(place, change))
        for place in RECORDS
        for name, change in BROKEN.items()
        if (place, name) not in (("tokenizer/tokenizer.json", "twice"), ("tokenizer/tokenizer.json", "NUL"))
    ]


WEIGHTS = [attack for place in PLACES for attack in files("text", PROMPT, "model", place)]


@pytest.mark.parametrize("attack", [*WEIGHTS, *records()], ids=str)
def test_files_of_a_model_that_are_not_what_they_should_be_are_refused(attack, refused, text_model):
    refused(attack, model=text_model)


WITHIN = ("whole numbers", "flat", "missing", "none", "extra")  # a command that compares no config does not see these


def unreadable(prefix: str, argv: list[str], root: str, place: str) -> list[Attack]:
    return [attack for attack in files(prefix, argv, root, place) if attack.name.rpartition(":")[2] not in WITHIN]


@pytest.mark.parametrize("attack", unreadable("pack", ["pack", "model", "out"], "model", UNET)[:11], ids=str)
def test_a_model_that_cannot_be_packed_is_refused(attack, refused, text_model):
    refused(attack, model=text_model)


IMPORT = ["import", "model/unet", "--unconditional", "--schedule", "linear", "--vae", "none", "--out", "out"]


@pytest.mark.parametrize("attack", unreadable("import", IMPORT, "model", UNET), ids=str)
def test_a_checkpoint_that_lies_is_not_imported(attack, refused, text_model):
    refused(attack, model=text_model)


@pytest.fixture(scope="session")
def evaluator(once) -> Path:
    """An evaluator of two objects, 4 channels wide."""

    def fill(folder: Path) -> None:
        from fastgen.models.evaluator import ResNet18, save

        save(ResNet18(2, 4).eval(), folder, {"red": 0, "blue": 1}, {})

    return once("evaluator-small", fill)


@pytest.fixture(scope="session")
def pictures(once) -> Path:
    """One grey picture, and the file that asks for it."""

    def fill(folder: Path) -> None:
        from PIL import Image

        folder.mkdir(parents=True)
        Image.new("RGB", (64, 64), "grey").save(folder / "0.png")

    return once("pictures-grey", fill)


SCORE = ["score", "pictures", "--requests", "requests.json", "--evaluator", "model"]
OUTPUTS = ([], {}, "x", {"red": 0}, {"red": 0, "blue": 0}, {"red": 0, "blue": 7}, {"red": "0", "blue": 1}, {"red": []})
CONFIGS = ([], {}, {"architecture": 3}, {"architecture": "hub/id"}, {"architecture": None}, "resnet18")


def score(file: str, value: Any) -> Attack:
    def edit(workspace: Path) -> None:
        (workspace / "requests.json").write_text('[["red"]]')
        (workspace / "model" / file).write_text(json.dumps(value))

    return Attack(f"score:{file}={json.dumps(value)}", SCORE, file, edit)


def with_requests(attack: Attack) -> Attack:
    def edit(workspace: Path) -> None:
        (workspace / "requests.json").write_text('[["red"]]')
        attack.edit(workspace)

    return Attack(attack.name, attack.argv, attack.word, edit)


EVALUATORS = [*(score("labels.json", value) for value in OUTPUTS), *(score("config.json", value) for value in CONFIGS)]
EVALUATORS += [with_requests(attack) for attack in files("score", SCORE, "model", "model.safetensors")]


@pytest.mark.parametrize("attack", EVALUATORS, ids=str)
def test_an_evaluator_that_lies_is_refused(attack, refused, evaluator, pictures):
    refused(attack, model=evaluator, pictures=pictures)
