"""Bundles that lie: every one is refused in one line before anything is written."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from attacks import REMOVE, Attack, json_attacks, text_attacks
from bundle_edits import RECORD, reseal, set_path, then

LABELS = ["generate", "--model", "bundle", "--engine", "ort", "--labels", "red cube", "--out", "out.png"]
HUGE, DEEP = 10**30, [[[[[[[[[[[[]]]]]]]]]]]]
HEX = "0" * 64

# (field, value, word) of a bundle of labels; the digest is computed again, as somebody who means it does.
FIELDS: list[tuple[str, Any, str]] = [
    ("", [], "format_version"),
    ("", "bundle", "format_version"),
    ("", {}, "format_version"),
    *(("format_version", value, "format_version") for value in (3, -1, "2", None, 2.5, True, [2], HUGE, {})),
    ("format_version", 1, "condition"),
    ("format_version", REMOVE, "format_version"),
    ("surprise", 1, "surprise"),
    ("filez", {}, "filez"),
    *((name, REMOVE, name) for name in ("condition", "space", "sampling", "scheduler_config", "signatures", "files")),
    ("source_sha256", REMOVE, "source_sha256"),
    *(
        ("source_sha256", value, "source_sha256")
        for value in (None, 1, "", "abc", "G" * 64, "0" * 65, [HEX], "\n" * 64)
    ),
    *(("checkpoint", value, "checkpoint") for value in (1, "", [], "x" * 2000, False)),
    *(("image_mode", value, "image_mode") for value in (1, "", {}, "x" * 2000)),
    *(("component_sha256", value, "component_sha256") for value in (None, [], {"vae": 1}, {"vae": "abc"}, {"": HEX})),
    *(("versions", value, "versions") for value in (None, [], {"torch": 1}, {"torch": "x" * 2000}, {"torch": None})),
    *(("sampling", value, "sampling") for value in (None, [], 3, "ddim", {"schedular": "ddim"})),
    *(("sampling.scheduler", value, "scheduler") for value in (None, 1, "", [], "x" * 5000, {})),
    *(
        ("sampling.num_inference_steps", value, "num_inference_steps")
        for value in (0, -1, 1.5, "5", None, HUGE, 10_001, True, [5])
    ),
    *(("sampling.guidance_scale", value, "guidance_scale") for value in (-1, "3", None, 1e300, [3], True, HUGE)),
    *(("scheduler_config", value, "scheduler_config") for value in (None, [], "ddpm", 3)),
    *(("signatures", value, "signatures") for value in (None, [], {}, {"unet": None}, {"unet": []}, DEEP)),
    ("signatures.unet.inputs", [], "signatures"),
    ("signatures.unet.inputs", {}, "inputs"),
    ("signatures.unet.inputs.0", None, "inputs[0]"),
    ("signatures.unet.inputs.0.name", "simple", "signatures"),
    ("signatures.unet.inputs.0.name", 3, "name"),
    ("signatures.unet.inputs.0.dtype", "float64", "dtype"),
    ("signatures.unet.inputs.0.dtype", "int64", "signatures"),
    ("signatures.unet.inputs.0.shape", ["batch", 3, 16, 17], "signatures"),
    ("signatures.unet.inputs.0.shape", ["batch", 3, -16, 16], "shape"),
    ("signatures.unet.inputs.0.shape", ["batch", HUGE, 16, 16], "shape"),
    ("signatures.unet.inputs.0.shape", ["batch", 1_000_000, 1_000_000, 1_000_000], "2^30"),
    ("signatures.unet.inputs.0.shape", "batch", "shape"),
    ("signatures.unet.outputs.0.shape", ["rows", 3, 16, 16], "shape"),
    ("signatures.unet.outputs.0.high", -1, "high"),
    ("signatures.unet.outputs.0.low", 1, "low"),
    ("signatures.vae_decoder", {"inputs": [], "outputs": []}, "vae_decoder"),
    ("signatures.../unet", {"inputs": [], "outputs": []}, "signatures"),
    *(("condition", value, "condition") for value in (None, [], 3, "labels", {"text": None, "labels": None, "x": 1})),
    *(("condition.labels", value, "labels") for value in ([], 3, "red cube", {"red cube": -1}, {"red cube": 1.5}, {})),
    ("condition.labels", {"red cube": 0, "blue cube": 0}, "blue cube"),
    ("condition.labels", {"red cube": 0}, "signatures"),
    ("condition.text", {"tokens": [77]}, "text"),
    ("condition.number", True, "condition"),
    ("condition.guidance_width", HUGE, "guidance_width"),
    ("condition.null_class", 3, "null_class"),
    *(("space", value, "space") for value in (None, [], 3, {"shape": [3, 16, 16]})),
    ("space.shape", [3, 16], "shape"),
    ("space.shape", [3, 16, 16, 16], "shape"),
    ("space.shape", [3, 0, 16], "shape"),
    ("space.shape", [3, 16, "16"], "shape"),
    ("space.shape", [3, 8, 8], "shape"),
    ("space.image", [3, 32, 32], "space"),
    ("space.image", [3, 10**9, 10**9], "image"),
    ("space.latent", True, "signatures"),
    ("space.latent", "false", "latent"),
    ("space.scaling_factor", 0, "scaling_factor"),
    ("space.scaling_factor", "1", "scaling_factor"),
    ("space.scaling_factor", 1e300, "scaling_factor"),
    ("space.mean", [0.0], "mean"),
    ("space.std", "1", "std"),
    *(("files", value, "files") for value in (None, [], 3, "all", {"unet/model.onnx": None})),
    ("files", {}, "unet"),
    *(("files.unet/model~onnx.bytes", value, "bytes") for value in (-1, "many", None, 1.5, HUGE, True)),
    ("files.unet/model~onnx.bytes", 5, "truncated or replaced"),
    *(("files.unet/model~onnx.sha256", value, "sha256") for value in (None, 3, "abc", HEX, "F" * 64)),
    ("files.unet/model~onnx.mode", 0o777, "mode"),
    ("files.unet/model~onnx", REMOVE, "unet"),
    ("files.unet/model~onnx~data", REMOVE, "does not list"),
    ("files.scheduler/tables~npz", REMOVE, "tables.npz"),
    *(
        (f"files.{name}", {"bytes": 1, "sha256": HEX}, "files")
        for name in (
            "../secret",
            "/etc/passwd",
            "unet/../../secret",
            "unet//model",
            "./unet",
            "unet\\model",
            "C:model",
            "unet/",
            "",
            " ",
            "a" * 300,
            "a/" * 600 + "a",
            "new\nline",
            "UNET/model~onnx",
        )
    ),
    ("extends", ["abc"], "extends"),
    ("extends", 3, "extends"),
]
# the same fields, with the digest as it was: what an editor of the file gets
EDITED: list[tuple[str, Any, str]] = [
    ("sampling.guidance_scale", 7.5, "changed after the export"),
    ("sampling.num_inference_steps", 3, "changed after the export"),
    ("sampling.scheduler", "euler", "changed after the export"),
    ("checkpoint", "best@1", "changed after the export"),
    ("image_mode", "crop", "changed after the export"),
    ("versions.torch", "9.9", "changed after the export"),
    ("scheduler_config.prediction_type", "epsilon", "changed after the export"),
    ("source_sha256", HEX, "changed after the export"),
    ("files.notes", {"bytes": 0, "sha256": HEX}, "changed after the export"),
    ("extends", [HEX], "changed after the export"),
    ("record_sha256", HEX, "record_sha256"),
    ("record_sha256", "abc", "record_sha256"),
    ("record_sha256", 5, "record_sha256"),
]


def fields(prefix: str, rows: Iterable[tuple[str, Any, str]], seal: bool) -> list[Attack]:
    """An attack per row on bundle.json; in a field's name `~` stands for a dot. `seal`: the digest is right again."""
    attacks = []
    for where, value, word in rows:
        edit = set_path(where, value)
        (named,) = json_attacks(prefix, LABELS, [("bundle.json", where, value, word)])
        attacks.append(Attack(named.name, LABELS, word, then(edit, reseal) if seal else edit))
    return attacks


@pytest.mark.parametrize("attack", fields("sealed", FIELDS, True) + fields("edited", EDITED, False), ids=str)
def test_a_bundle_json_that_lies_is_refused(attack, refused, label_bundle):
    refused(attack, bundle=label_bundle)


TEXTS = [
    (RECORD, content, word)
    for content, word in (
        ("", "empty"),
        (b"\xff\xfe{", "UTF-16"),
        ("[" * 5000, "nested"),
        ('{"format_version": 2, "format_version": 2}', "twice"),
        ('{"format_version": 1e400}', "1e400"),
        ('{"format_version": NaN}', "NaN"),
        ('{"format_version": "\\u0000"}', "NUL"),
        ("null", "format_version"),
        ('{"format_version": 2} trailing', "malformed"),
    )
]


@pytest.mark.parametrize("attack", text_attacks("text", LABELS, TEXTS), ids=str)
def test_a_bundle_json_that_is_none_is_refused(attack, refused, label_bundle):
    refused(attack, bundle=label_bundle)
