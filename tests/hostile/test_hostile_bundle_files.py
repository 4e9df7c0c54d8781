"""Files of a bundle that lie, most of them under hashes that are right: refused in one line before anything is written."""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attacks import Attack
from bundle_edits import RECORD, Edit, copy, cut, forged, link, replace, reseal, set_path, then, write

LABELS = ["generate", "--model", "bundle", "--engine", "ort", "--labels", "red cube", "--out", "out.png"]
PROMPT = ["generate", "--model", "bundle", "--engine", "ort", "--prompt", "a red dragon", "--out", "out.png"]
UNET, WEIGHTS, FUSED = "unet/model.onnx", "unet/model.onnx.data", "unet/model.ort.onnx"
TABLES, TOKENIZER, CONFIG = "scheduler/tables.npz", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"
DATA = b"model.onnx.data"

Row = tuple[str, Edit, str]


def attacks(command: list[str], rows: Iterable[Row], engine: str = "ort") -> list[Attack]:
    argv = [engine if word == "ort" else word for word in command]
    return [Attack(f"{engine}:{name}", argv, word, edit) for name, edit, word in rows]


def nested(depth: int) -> bytes:
    """A graph in an attribute of a node of a graph in an attribute, ..., around the word that is looked for."""
    data = b"location"
    for number in (6, 5, 1) * depth:  # graph of an attribute, of a node, of a graph
        data = bytes([number << 3 | 2]) + varint(len(data)) + data
    return b"\x3a" + varint(len(data)) + data


def varint(value: int) -> bytes:
    data = b""
    while value > 0x7F:
        data += bytes([value & 0x7F | 0x80])
        value >>= 7
    return data + bytes([value])


GRAPHS: list[Row] = [
    ("cut off", cut(UNET, 0.5), "truncated or replaced"),
    ("cut off, with its hash", forged(cut(UNET, 0.5)), "ONNX graph"),
    ("nothing", forged(write(UNET, b"")), "ONNX graph"),
    ("a web page", forged(write(UNET, b"<html>not found</html>")), "ONNX graph"),
    ("noise", forged(write(UNET, bytes(range(256)) * 50)), "ONNX graph"),
    ("an endless number", forged(write(UNET, b"\xff" * 5000)), "ONNX graph"),
    ("a group of fields", forged(write(UNET, b"\x0b\x0c")), "ONNX graph"),
    ("messages 200 deep", forged(write(UNET, nested(200))), "ONNX graph"),
    ("no graph in it", forged(write(UNET, b"\x08\x08")), "0 graphs"),
    ("two graphs", forged(lambda w: write(UNET, (w / "bundle" / UNET).read_bytes() + b"\x3a\x00")(w)), "2 graphs"),
    ("another input", forged(replace(UNET, b"timestep", b"timestap")), "input"),
    ("another output", forged(replace(UNET, b"out_sample", b"sample_out")), "output"),
    ("weights above the bundle", forged(replace(UNET, DATA, b"../../../secret")), "does not list"),
    ("weights at a path", forged(replace(UNET, DATA, b"/tmp/secret.bin")), "does not list"),
    ("weights in a device", forged(replace(UNET, DATA, b"/dev/./././zero")), "does not list"),
    ("weights in another file", forged(replace(UNET, DATA, b"other.onnx.data")), "does not list"),
    ("weights with NUL", forged(replace(UNET, DATA, b"model.onnx\0data")), "does not list"),
    ("weights under no UTF-8", forged(replace(UNET, DATA, b"model.onnx\xffdata")), "ONNX graph"),
    ("weights by a detour", forged(replace(UNET, DATA, b"././bundle.json")), "does not list"),
    ("a folder", then(lambda w: (w / "bundle" / UNET).unlink(), lambda w: (w / "bundle" / UNET).mkdir()), "no file"),
    ("a pipe", then(lambda w: (w / "bundle" / UNET).unlink(), lambda w: os.mkfifo(w / "bundle" / UNET)), "no file"),
    ("a link that leaves the bundle", link(UNET, "../../moved"), "symlink"),
    ("weights behind a link", link(WEIGHTS, "../../moved"), "symlink"),
    ("a folder behind a link", link("unet", "../moved"), "symlink"),
    ("a link to nothing", link(UNET, "nothing"), "No such file"),
    ("a circle of links", link(UNET, "model.onnx"), "model.onnx"),
    ("a link to a device", link(WEIGHTS, "/dev/zero"), "symlink"),
]
LOADED: list[Row] = [  # what a runtime refuses: the interface is right
    ("an unknown operator", forged(replace(UNET, b"Conv", b"Konv"), replace(FUSED, b"Conv", b"Konv")), "unet/model"),
    ("weights cut off", forged(cut(WEIGHTS, 0.3)), "unet/model"),
    ("no weights", forged(write(WEIGHTS, b"")), "unet/model"),
]
FUSED_ONLY: list[Row] = [
    ("fused, cut off", forged(cut(FUSED, 0.7)), "model.ort.onnx"),
    ("fused, another input", forged(replace(FUSED, b"timestep", b"timestap")), "input"),
    ("fused, weights elsewhere", forged(replace(FUSED, DATA, b"/tmp/secret.bin")), "does not list"),
]
SWAPPED: list[Row] = [
    ("the encoder for the UNet", forged(copy("text_encoder/model.onnx", UNET)), "inputs"),
    ("the UNet for the encoder", forged(copy(UNET, "text_encoder/model.onnx")), "inputs"),
    ("the VAE's encoder for its decoder", forged(copy("vae_encoder/model.onnx", "vae_decoder/model.onnx")), "input"),
    ("another network's weights", copy("vae_decoder/model.onnx.data", WEIGHTS), "truncated or replaced"),
]


@pytest.mark.parametrize("attack", attacks(LABELS, GRAPHS + LOADED + FUSED_ONLY), ids=str)
def test_graphs_are_refused(attack, refused, label_bundle):
    refused(attack, bundle=label_bundle)


@pytest.mark.parametrize("attack", attacks(LABELS, GRAPHS[::5] + LOADED, "openvino"), ids=str)
def test_graphs_are_refused_by_openvino(attack, refused, label_bundle):
    refused(attack, bundle=label_bundle)


@pytest.mark.parametrize("attack", attacks(PROMPT, SWAPPED), ids=str)
def test_graphs_in_each_others_place_are_refused(attack, refused, text_bundle):
    refused(attack, bundle=text_bundle)


def tables(change: Callable[[dict[str, Any], dict[str, np.ndarray]], object]) -> Edit:
    """Change the index and the arrays of tables.npz."""

    def edit(workspace: Path) -> None:
        path = workspace / "bundle" / TABLES
        with np.load(path) as stored:
            arrays = dict(stored)
        index = json.loads(arrays["index"].tobytes())
        change(index, arrays)
        text = index if isinstance(index, bytes) else json.dumps(index).encode()
        np.savez_compressed(path, **arrays | {"index": np.frombuffer(text, np.uint8)})

    return forged(edit)


def entry(place: int, value: Any) -> Edit:
    """Change a value of the entry of the model's own solver: its offset, columns, rows, or one of its facts (from 3 on)."""

    def change(index: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        row = index["tables"]["ddpm:5"]
        if place < 3:
            row[place] = value
        else:
            row[3][place - 3] = value

    return tables(change)


def also(key: str) -> Edit:
    """Give the table of the model's own solver a second key."""
    return tables(lambda index, arrays: index["tables"].update({key: index["tables"]["ddpm:5"]}))


def archive(members: Mapping[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as out:
        for name, data in members.items():
            out.writestr(name, data)
    return buffer.getvalue()


def npy(header: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + data


def pickled() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}, print], object), allow_pickle=True)
    return buffer.getvalue()


def solver(change: Callable[[np.ndarray], object]) -> Edit:
    """Change the numbers of the solver that the model samples with."""

    def edit(index: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        values = arrays["solver_ddpm"].copy()
        change(values)
        arrays["solver_ddpm"] = values

    return tables(edit)


def set_all(value: float) -> Callable[[np.ndarray], object]:
    return lambda values: values.fill(value)


HUGE_HEADER = "{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999,), }\n"
ARCHIVES: list[Row] = [
    ("no archive", forged(write(TABLES, b"PK nothing")), "npz"),
    ("nothing", forged(write(TABLES, b"")), "npz"),
    ("cut off", forged(cut(TABLES, 0.6)), "npz"),
    ("an empty archive", forged(write(TABLES, archive({}))), "index"),
    ("no index", forged(write(TABLES, archive({"solver_ddpm.npy": b""}))), "index"),
    ("a bomb", forged(write(TABLES, archive({"index.npy": bytes(2**27)}))), "MiB"),
    ("many bombs", forged(write(TABLES, archive({f"{i}.npy": bytes(2**22) for i in range(20)}))), "MiB"),
    ("many members", forged(write(TABLES, archive({f"{i}": b"" for i in range(10_001)}))), "10,001"),
    ("bzip2", forged(write(TABLES, archive({"index.npy": b"{}"}, zipfile.ZIP_BZIP2))), "deflate"),
    ("lzma", forged(write(TABLES, archive({"index.npy": b"{}"}, zipfile.ZIP_LZMA))), "deflate"),
    ("a pickle", forged(write(TABLES, archive({"index.npy": pickled()}))), "index"),
    (
        "an array of objects",
        forged(write(TABLES, archive({"index.npy": npy("{'descr': '|O', 'shape': (1,)}")}))),
        "index",
    ),
    ("a shape of 100 GB", forged(write(TABLES, archive({"index.npy": npy(HUGE_HEADER)}))), "index"),
    ("a header that runs", forged(write(TABLES, archive({"index.npy": npy("__import__('os')")}))), "index"),
    ("an index that is no JSON", forged(lambda w: _index(w, b"{not json")), "index"),
    ("an index that is no UTF-8", forged(lambda w: _index(w, b"\xff\xfe")), "UTF-8"),
    ("an index that is a list", forged(lambda w: _index(w, b"[]")), "object"),
    ("an index with NaN", forged(lambda w: _index(w, b'{"format": NaN}')), "NaN"),
    ("a key twice", forged(lambda w: _index(w, b'{"format": 1, "format": 1}')), "twice"),
    ("another format", tables(lambda index, arrays: index.update(format=2)), "format"),
    ("no tables", tables(lambda index, arrays: index.update(tables={})), "tables"),
    ("tables that are a list", tables(lambda index, arrays: index.update(tables=[])), "tables"),
    ("a field too many", tables(lambda index, arrays: index.update(more=1)), "more"),
    ("a key that is no solver", also("x"), "'x'"),
    ("a key of another table", also("ddim:5"), "ddpm:5"),
    ("a key with a NUL", also("ddpm\0:5"), "NUL"),
    ("an offset before the array", entry(0, -1), "-1"),
    ("an offset behind the array", entry(0, 10**9), "cut off"),
    ("an offset that is a text", entry(0, "0"), "whole number"),
    ("too few columns", entry(1, 3), "expected"),
    ("too many columns", entry(1, 10**6), "expected"),
    ("no rows", entry(2, 0), "expected"),
    ("too many rows", entry(2, 10**8), "expected"),
    ("rows beyond the array", entry(2, 30_000), "cut off"),
    ("no name", entry(3, ""), "expected"),
    ("another number of steps", entry(4, 7), "ddpm:7"),
    ("no number of steps", entry(4, None), "whole number"),
    ("noise steps", entry(5, 3), "ddpm:5:3"),
    ("a kind of prediction that is a number", entry(6, 1), "text"),
    ("an unknown basis", entry(7, "network"), "net"),
    ("a clip that is a text", entry(8, "1"), "number"),
    ("an init_alpha that is a text", entry(9, "1"), "number"),
    ("an infinite init_sigma", forged(lambda w: _edit_text(w, b"1.0]]", b"1e999]]")), "1e999"),
    ("NaN coefficients", solver(set_all(np.nan)), "ddpm:5"),
    ("infinite coefficients", solver(set_all(np.inf)), "ddpm:5"),
    ("coefficients beyond float32", solver(set_all(1e200)), "ddpm:5"),
    ("streams that are no whole numbers", solver(set_all(0.5)), "streams"),
    (
        "the arrays of another dtype",
        tables(lambda index, arrays: arrays.update(solver_ddpm=arrays["solver_ddpm"].astype(np.float32))),
        "<f4",
    ),
    (
        "the arrays of two dimensions",
        tables(lambda index, arrays: arrays.update(solver_ddpm=arrays["solver_ddpm"].reshape(1, -1))),
        "one dimension",
    ),
    ("no array of the solver", tables(lambda index, arrays: arrays.pop("solver_ddpm")), "solver_ddpm"),
]


def _index(workspace: Path, text: bytes) -> None:
    path = workspace / "bundle" / TABLES
    with np.load(path) as stored:
        arrays = dict(stored)
    np.savez_compressed(path, **arrays | {"index": np.frombuffer(text, np.uint8)})


def _edit_text(workspace: Path, old: bytes, new: bytes) -> None:
    with np.load(workspace / "bundle" / TABLES) as stored:
        text = stored["index"].tobytes()
    assert old in text
    _index(workspace, text.replace(old, new, 1))


@pytest.mark.parametrize("attack", attacks(LABELS, ARCHIVES), ids=str)
def test_solver_tables_are_refused(attack, refused, label_bundle):
    refused(attack, bundle=label_bundle)


TOKENIZERS: list[Row] = [
    ("missing", then(lambda w: (w / "bundle" / TOKENIZER).unlink()), "No such file"),
    ("not listed", then(lambda w: _unlist(w, TOKENIZER), reseal), "not listed"),
    ("changed", write(TOKENIZER, b"{}"), "truncated or replaced"),
    ("empty", forged(write(TOKENIZER, b"{}")), "tokenizer.json"),
    ("no JSON", forged(write(TOKENIZER, b"\xff\xff")), "tokenizer.json"),
    ("a list", forged(write(TOKENIZER, b"[]")), "tokenizer.json"),
    ("an unknown model", forged(replace(TOKENIZER, b'"BPE"', b'"BPX"')), "tokenizer.json"),
    ("a file beside it", write("tokenizer/special_tokens_map.json", b'{"pad_token": "a"}'), "not listed"),
    ("a padding token that is not there", forged(write(CONFIG, b'{"pad_token": "<nothing>"}')), "<nothing>"),
]


def _unlist(workspace: Path, name: str) -> None:
    value = json.loads((workspace / RECORD).read_text())
    del value["files"][name]
    (workspace / RECORD).write_text(json.dumps(value))


@pytest.mark.parametrize("attack", attacks(PROMPT, TOKENIZERS), ids=str)
def test_tokenizers_are_refused(attack, refused, text_bundle):
    refused(attack, bundle=text_bundle)


COMPILED = [*LABELS, "--scheduler", "euler", "--num-inference-steps", "7"]  # a table that is not stored
SCHEDULES: list[tuple[str, Any]] = [
    ("_class_name", 3),
    ("_class_name", "NoSuchScheduler"),
    ("_class_name", None),
    ("_class_name", "os.system"),
    ("_class_name", "DDPMScheduler; import os"),
    *(("num_train_timesteps", value) for value in (0, -5, "1000", None, 1.5, 10**9, 10**30, [1000], True)),
    ("beta_schedule", "nonsense"),
    ("beta_schedule", 3),
    ("beta_schedule", ["linear"]),
    ("beta_start", "0.1"),
    ("beta_start", -1),
    ("beta_end", 1e300),
    ("beta_end", []),
    ("trained_betas", "many"),
    ("trained_betas", [0.1]),
    ("trained_betas", ["a"] * 1000),
    ("trained_betas", [2.0] * 1000),
    ("prediction_type", "noise"),
    ("prediction_type", 5),
    ("timestep_spacing", "random"),
    ("timestep_spacing", 3),
    ("steps_offset", "1"),
    ("steps_offset", 10**12),
    ("rescale_betas_zero_snr", "yes"),
    ("clip_sample_range", "1"),
    ("thresholding", "x"),
]


def schedule(name: str, value: Any) -> Edit:
    def edit(workspace: Path) -> None:
        content = json.loads((workspace / RECORD).read_text())
        content["scheduler_config"][name] = value
        (workspace / RECORD).write_text(json.dumps(content))

    return then(edit, reseal)


@pytest.mark.parametrize(("name", "value"), SCHEDULES, ids=lambda value: str(value)[:20])
def test_noise_schedules_are_refused_where_a_solver_is_compiled(name, value, refused, label_bundle):
    refused(Attack(f"{name}={value!r:.30}", COMPILED, "", schedule(name, value)), bundle=label_bundle)


def _version_1(workspace: Path) -> None:
    """bundle.json as fastgen wrote it when it knew two families of models, without a digest."""
    value = json.loads((workspace / RECORD).read_text())
    condition, space = value.pop("condition"), value.pop("space")
    del value["record_sha256"]
    text = condition["text"] is not None
    value |= {"format_version": 1, "family": "text" if text else "labels", "objects": condition["labels"]}
    (workspace / RECORD).write_text(json.dumps(value | {"scaling_factor": space["scaling_factor"]}))


ACCEPTED: dict[str, Edit] = {
    "as it was exported": lambda workspace: None,
    "of version 2 without a digest": lambda workspace: _unseal(workspace),
    "of version 1": _version_1,
    "with a file that is not listed": write("notes.txt", b"mine"),
    "written in other spaces": lambda workspace: _reformat(workspace),
    "with a link inside": lambda workspace: _link_inside(workspace),
    "behind a link": lambda workspace: _behind_link(workspace),
    "with extensions": then(set_path("extends", ["0" * 64] * 50), reseal),
}


def _unseal(workspace: Path) -> None:
    value = json.loads((workspace / RECORD).read_text())
    del value["record_sha256"]
    (workspace / RECORD).write_text(json.dumps(value))


def _reformat(workspace: Path) -> None:
    value = json.loads((workspace / RECORD).read_text())
    (workspace / RECORD).write_text(json.dumps(dict(reversed(value.items())), indent=9))


def _link_inside(workspace: Path) -> None:
    (workspace / "bundle" / UNET).rename(workspace / "bundle" / "blob")
    (workspace / "bundle" / UNET).symlink_to("../blob")


def _behind_link(workspace: Path) -> None:
    (workspace / "bundle").rename(workspace / "elsewhere")
    (workspace / "bundle").symlink_to("elsewhere")


@pytest.mark.parametrize("name", ACCEPTED)
def test_honest_bundles_are_read(name, fork_server, label_bundle, tmp_path):
    shutil.copytree(label_bundle, tmp_path / "bundle")
    ACCEPTED[name](tmp_path)
    outcome = fork_server.run(LABELS, tmp_path, {"FASTGEN_CACHE": str(tmp_path / "cache")})
    assert (outcome.code, outcome.stderr) == (0, ""), outcome
    assert (tmp_path / "out.png").is_file()
