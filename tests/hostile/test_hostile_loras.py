"""LoRA files, indices of sharded weights, and tables of a training set that lie."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attacks import REMOVE, Attack, json_attacks, text_attacks

from fastgen.files.names import ICLEVR_OBJECTS

LORA, RANK = "lora.safetensors", 2
PROMPT = ["--engine", "eager", "--prompt", "a red dragon", "--out", "out.png"]
COMMAND = ["generate", "--model", "model", "--lora", LORA, *PROMPT]
LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
WIDTH = 32
METADATA = "lora_adapter_metadata"


def lora(settings: Any = None, **changes: Any) -> Callable[[Path], object]:
    """Writes the LoRA weights of one layer. `settings`: PEFT's, a text or an object; `changes`: other tensors, by `down`, `up`
    or their whole name."""

    def write(workspace: Path) -> None:
        from safetensors.numpy import save_file

        state: dict[str, Any] = {"down": np.zeros((RANK, WIDTH), np.float32), "up": np.ones((WIDTH, RANK), np.float32)}
        state = {key: value for key, value in (state | changes).items() if value is not REMOVE}
        names = {"down": f"{LAYER}.lora_A.weight", "up": f"{LAYER}.lora_B.weight"}
        text = settings if isinstance(settings, str) else json.dumps(settings)
        metadata = None if settings is None else {METADATA: text}
        save_file({names.get(key, key): value for key, value in state.items()}, workspace / LORA, metadata=metadata)

    return write


PATTERNS = {
    r"(\w+)+!": "repetitions",
    ".*" * 20 + "x": "repetitions",
    "(": "regular expression",
    "[": "regular expression",
    "a" * 600: "repetitions",
    "": "text of 1",
}
SETTINGS: list[tuple[Any, str]] = [
    ("", "JSON"),
    ("[", "malformed"),
    ([], "expected an object"),
    ({"unet.lora_alpha": "8"}, "lora_alpha"),
    ({"unet.lora_alpha": [8]}, "lora_alpha"),
    ({"unet.lora_alpha": True}, "lora_alpha"),
    ('{"unet.lora_alpha": 1e400}', "too large"),
    ('{"unet.lora_alpha": NaN}', "NaN"),
    ({"unet.lora_alpha": 1e9}, "lora_alpha"),
    ({"unet.use_rslora": 1}, "use_rslora"),
    ({"unet.use_dora": True}, "DoRA"),
    ({"unet.use_dora": "no"}, "use_dora"),
    ({"unet.alpha_pattern": []}, "alpha_pattern"),
    ({"unet.alpha_pattern": {"to_q": "8"}}, "alpha_pattern"),
    ('{"unet.alpha_pattern": {"to_q\\u0000": 8}}', "NUL"),
    *(({"unet.alpha_pattern": {pattern: 8}}, word) for pattern, word in PATTERNS.items()),
]
TENSORS: list[tuple[dict[str, Any], str]] = [
    ({"down": REMOVE}, "lora"),
    ({"up": REMOVE}, "lora"),
    ({"down": np.zeros((RANK, 5), np.float32)}, "made for another model"),
    ({"up": np.zeros((5, RANK), np.float32)}, "made for another model"),
    ({"down": np.zeros((0, WIDTH), np.float32), "up": np.zeros((WIDTH, 0), np.float32)}, "lora"),
    ({"down": np.zeros((), np.float32)}, "lora"),
    ({"down": np.full((RANK, WIDTH), np.nan, np.float32)}, "NaN"),
    ({"down": np.full((RANK, WIDTH), np.inf, np.float32)}, "NaN"),
    ({f"{LAYER}.alpha": np.array("inf", np.float32)}, "NaN"),
    ({f"{LAYER}.alpha": np.zeros(3, np.float32)}, "lora"),
    ({f"{LAYER}.dora_scale": np.ones(WIDTH, np.float32)}, "DoRA"),
    ({"unet.nowhere.lora_A.weight": np.zeros((RANK, 4), np.float32)}, "lora"),
]
LORAS = [
    *(Attack(f"settings {json.dumps(s)[:40]}", COMMAND, word, lora(s)) for s, word in SETTINGS),
    *(Attack(f"tensors {i}", COMMAND, word, lora(**changes)) for i, (changes, word) in enumerate(TENSORS)),
    *text_attacks("lora", COMMAND, [(LORA, b"", LORA), (LORA, b"{}", LORA), (LORA, b"\xff" * 100, LORA)]),
    Attack("folder", COMMAND, "expected FILE", lambda workspace: (workspace / LORA).mkdir()),
    Attack("nothing", COMMAND, "is no file"),
]


@pytest.mark.parametrize("attack", LORAS, ids=str)
def test_lora_weights_that_lie_are_refused(attack, refused, text_model):
    refused(attack, model=text_model)


@pytest.mark.parametrize("settings", [None, {"unet.lora_alpha": 4, "unet.alpha_pattern": {r"mid.*\.to_q": 2}}])
def test_honest_lora_weights_are_fused(settings, fork_server, text_model, tmp_path):
    (tmp_path / "model").symlink_to(text_model)
    lora(settings)(tmp_path)
    outcome = fork_server.run([*COMMAND, "--num-inference-steps", "1"], tmp_path, {"FASTGEN_CACHE": str(tmp_path)})
    assert (outcome.code, outcome.stderr) == (0, "")


UNET = "model/unet/diffusion_pytorch_model.safetensors"
SHARDS = f"{UNET}.index.json"
INDEX = {"metadata": {"total_size": 1}, "weight_map": {"conv_in.weight": "shard.safetensors"}}
WEIGHT_MAP: list[tuple[str, Any, str]] = [
    ("", [], "expected an object"),
    ("weight_map", REMOVE, "weight_map is missing"),
    ("metadata", REMOVE, "metadata is missing"),
    ("metadata", 3, "metadata"),
    ("weight_map", {}, "weight_map"),
    ("weight_map", [], "weight_map"),
    ("weight_map", {"a": 3}, "weight_map['a']"),
    ("weight_map", {"a": None, "b": "x"}, "weight_map['a']"),
    ("weight_map", {"a": "../../x.safetensors"}, "weight_map"),
    ("weight_map", {"a": "/etc/passwd"}, "weight_map"),
    ("weight_map", {"a": ""}, "weight_map"),
    ("weight_map", {"a": "nowhere.safetensors"}, "no such file"),
    ("weight_map", {"a": "config.json"}, "config.json"),
]


@pytest.mark.parametrize(
    "attack",
    json_attacks("shards", ["generate", "--model", "model", *PROMPT], [(SHARDS, *row) for row in WEIGHT_MAP]),
    ids=str,
)
def test_an_index_of_weights_that_lies_is_refused(attack, refused, text_model, tmp_path):
    def edit(workspace: Path) -> None:
        (workspace / UNET).rename((workspace / UNET).with_name("shard.safetensors"))
        (workspace / SHARDS).write_text(json.dumps(INDEX))
        attack.edit(workspace)

    refused(Attack(attack.name, attack.argv, attack.word, edit), model=text_model)


TRAIN = ["train", "iclevr-pixels", "--data", "data", "--out", "out", "--device", "cpu"]
OBJECTS: list[tuple[str, Any, str]] = [
    ("", [], "expected"),
    ("", {}, "expected"),
    ("", "x", "expected"),
    ("red cube", -1, "expected 0 to"),
    ("red cube", 24, "expected 0 to"),
    ("red cube", 0.5, "expected 0 to"),
    ("red cube", "1", "expected 0 to"),
    ("red cube", True, "expected 0 to"),
    ("red cube", None, "expected 0 to"),
    ("red cube", 0, "is that of"),
    ("red cube", REMOVE, "expected 0 to"),
    ("", {" ": 0}, "is empty"),
]
LABELS: list[tuple[str, Any, str]] = [
    ("", [], "train.json"),
    ("", {}, "train.json"),
    ("", {"0.png": "red cube"}, "0.png"),
    ("", {"0.png": []}, "0.png"),
    ("", {"0.png": ["red cub"]}, "did you mean 'red cube'"),
    ("", {"0.png": ["red cube", "red cube"]}, "twice"),
    ("", {"0.png": [3]}, "0.png"),
    ("", {"../0.png": ["red cube"]}, "../0.png"),
    ("", {"/etc/passwd": ["red cube"]}, "passwd"),
]


@pytest.mark.parametrize(
    "attack",
    [
        *json_attacks("objects", TRAIN, [("data/objects.json", *row) for row in OBJECTS]),
        *json_attacks("train", TRAIN, [("data/train.json", *row) for row in LABELS]),
        *text_attacks("train", TRAIN, [("data/objects.json", "{", "malformed"), ("data/train.json", "", "is empty")]),
    ],
    ids=str,
)
def test_labels_of_training_data_that_lie_are_refused(attack, refused, tmp_path):
    from scoring_helpers import make_images

    data = tmp_path / "data"
    make_images(data / "iclevr", size=(16, 16), count=2)
    (data / "objects.json").write_text(json.dumps(ICLEVR_OBJECTS))
    (data / "train.json").write_text(json.dumps({f"{i}.png": ["red cube"] for i in range(2)}))
    refused(attack, data=data)
