"""A bundle is read only when it is whole, and hands out the solver tables that were stored."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys

import numpy as np
import pytest

from fastgen.errors import InputError
from fastgen.files.names import ICLEVR_OBJECTS
from fastgen.generate.pipeline import load
from fastgen.models.bundle import is_bundle, read_bundle
from fastgen.models.bundle_record import sealed
from fastgen.models.condition import Condition, Text
from fastgen.models.space import Space
from fastgen.models.spec import Spec
from fastgen.sampling.compile import TableCompiler

FILES = ["unet/model.onnx", "text_encoder/model.onnx", "vae_decoder/model.onnx"]
FILES += ["scheduler/tables.npz", "tokenizer/tokenizer.json", "model_index.json"]


@pytest.fixture
def copy(text_bundle, tmp_path):
    return shutil.copytree(text_bundle, tmp_path / "bundle")


def version_1(manifest):
    """bundle.json as fastgen wrote it when it knew two families of models."""
    condition, space = manifest.pop("condition"), manifest.pop("space")
    manifest.pop("record_sha256", None)
    text = condition["text"] is not None
    return {
        "format_version": 1,
        "family": "text" if text else "labels",
        "scaling_factor": space["scaling_factor"],
        "objects": None if text else condition["labels"],
    } | {key: value for key, value in manifest.items() if key != "format_version"}


def edit(bundle, **changes):
    manifest = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps(sealed(manifest | changes)))


def test_a_bundle_says_what_its_model_folder_says(text_bundle, text_model, label_bundle, label_model):
    from fastgen.models.folder import load_model

    for bundle, model in ((text_bundle, text_model), (label_bundle, label_model)):
        assert is_bundle(bundle)
        assert not is_bundle(model)
        found, expected = read_bundle(bundle).spec, load_model(model).spec
        assert found == expected
        assert found.component_sha256 == expected.component_sha256
        assert found.signatures == expected.signatures
    assert read_bundle(text_bundle).spec.space == Space((4, 8, 8), (3, 32, 32), latent=True, scaling_factor=0.7)
    assert read_bundle(label_bundle).spec.space == Space((3, 16, 16), (3, 16, 16), latent=False)
    assert read_bundle(text_bundle).spec.condition == Condition(Text((77,), (546,), 32, 32))
    assert read_bundle(label_bundle).spec.condition == Condition(labels=ICLEVR_OBJECTS)


@pytest.mark.parametrize("kind", ["text", "labels"])
def test_a_bundle_of_version_1_says_the_same(kind, request, tmp_path):
    bundle = shutil.copytree(
        request.getfixturevalue({"text": "text_bundle", "labels": "label_bundle"}[kind]), tmp_path / "b"
    )
    expected = read_bundle(bundle)
    manifest = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps(version_1(manifest)))
    found = read_bundle(bundle)
    for field in dataclasses.fields(Spec):
        if field.name == "bundle_sha256":  # bundle.json has other fields
            continue
        assert getattr(found.spec, field.name) == getattr(expected.spec, field.name), field.name
    assert found.spec.signatures == expected.spec.signatures
    assert found.files == expected.files
    found.verify()


@pytest.mark.parametrize("name", [*FILES, "unet/model.onnx.data"])
def test_one_flipped_bit_is_found_before_anything_runs(copy, name):
    if not (copy / name).exists():
        pytest.skip("the weights are inside the graphs")
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(InputError, match=rf"{name}: sha256 differs"):
        load(copy, "ort")


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_named_with_both_sizes(copy, name):
    size = (copy / name).stat().st_size
    with (copy / name).open("r+b") as file:
        file.truncate(size - 1)
    with pytest.raises(InputError, match=rf"{name}: {size - 1} bytes, bundle.json says {size}"):
        load(copy, "ort")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(InputError, match=rf"{name}: No such file"):
        load(copy, "ort")


def test_a_file_that_bundle_json_does_not_list_is_not_used(copy):
    (copy / "extra.onnx").write_bytes(b"")
    with pytest.raises(InputError, match=r"extra\.onnx is not listed"):
        read_bundle(copy).file("extra.onnx")


@pytest.mark.parametrize("version", [0, 3, "1", None, [1]])
def test_a_foreign_format_version_is_named(copy, version):
    edit(copy, format_version=version)
    with pytest.raises(InputError, match=r"format_version is .*, this fastgen reads 1 and 2"):
        read_bundle(copy)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"signatures": None}, "signatures"),
        ({"signatures": {}}, "signatures: text_encoder is not what"),
        ({"signatures": {"unet": {"inputs": [], "outputs": 3}}}, "signatures"),
        ({"sampling": {"scheduler": "ddim", "steps": 3}}, "sampling"),
        ({"sampling": {"scheduler": "ddim", "num_inference_steps": 0}}, "num_inference_steps"),
        ({"files": ["unet/model.onnx"]}, "files"),
        ({"files": {"unet/model.onnx": {"bytes": "many"}}}, "files"),
        ({"condition": None}, "condition"),
        ({"condition": {"text": None, "video": None}}, "condition"),
        ({"condition": {"text": {"tokens": [77]}}}, "condition"),
        ({"condition": {"text": None}}, "signatures: unet is not what condition and space say"),
        ({"space": [3, 32, 32]}, "space"),
        ({"space": {"shape": 3, "image": [3, 32, 32], "latent": True}}, "space"),
        ({"space": {"shape": [4, 8, 8], "image": [3, 64, 64], "latent": True}}, "signatures: vae_decoder is not what"),
    ],
)
def test_a_malformed_field_is_named_in_one_line(copy, changes, field):
    edit(copy, **changes)
    with pytest.raises(InputError, match=rf"bundle\.json: .*{field}") as error:
        read_bundle(copy)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"family": "video"}, "family"),
        ({"family": ["text"]}, "family"),
        ({"family": "labels", "objects": {"red cube": 0}}, "signatures"),
        ({"family": "labels"}, "objects"),
        ({"scaling_factor": "x"}, "scaling_factor"),
        ({"signatures": {}}, "signatures"),
    ],
)
def test_a_malformed_field_of_version_1_is_named_in_one_line(copy, changes, field):
    manifest = version_1(json.loads((copy / "bundle.json").read_text()))
    (copy / "bundle.json").write_text(json.dumps(manifest | changes))
    with pytest.raises(InputError, match=rf"bundle\.json: .*{field}") as error:
        read_bundle(copy)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("field", ["sampling", "source_sha256", "versions", "files"])
def test_an_edited_bundle_json_is_refused_by_its_digest(copy, field):
    manifest = json.loads((copy / "bundle.json").read_text())
    changes = {
        "sampling": manifest["sampling"] | {"guidance_scale": 3.5},
        "source_sha256": "0" * 64,
        "versions": {},
        "files": {name: file for name, file in manifest["files"].items() if name != "model_index.json"},
    }
    (copy / "bundle.json").write_text(json.dumps(manifest | {field: changes[field]}))
    with pytest.raises(InputError, match=r"record_sha256: the content has .* changed after the export"):
        read_bundle(copy)


def test_a_bundle_without_a_digest_is_an_older_one_and_says_so(copy):
    manifest = json.loads((copy / "bundle.json").read_text())
    digest = manifest.pop("record_sha256")
    (copy / "bundle.json").write_text(json.dumps(manifest, indent=7))
    assert not read_bundle(copy).sealed
    assert read_bundle(copy).spec.bundle_sha256 == digest
    (copy / "bundle.json").write_text(json.dumps(sealed(manifest)))
    assert read_bundle(copy).sealed


@pytest.mark.parametrize("content", ["", "[]", "3", "{", '{"format_version": 1', '{"format_version": 1}'])
def test_a_bundle_json_that_is_none_is_one_line(copy, content):
    (copy / "bundle.json").write_text(content)
    with pytest.raises(InputError, match=r"bundle\.json") as error:
        read_bundle(copy)
    assert "\n" not in str(error.value)


def test_a_folder_without_bundle_json_says_how_to_make_one(tmp_path):
    with pytest.raises(InputError, match=r"not a bundle .* `fastgen export MODEL --out BUNDLE`"):
        read_bundle(tmp_path)


@pytest.mark.parametrize("key", ["ddim:5", "ddpm:1000", "pndm:20", "dpmpp-2m:10", "unipc:20", "euler:5"])
def test_stored_solver_tables_are_those_that_the_scheduler_compiles_to(label_bundle, key):
    bundle = read_bundle(label_bundle)
    assert key in bundle.solver_keys()
    stored, compiled = bundle.table(key), TableCompiler(bundle.spec.scheduler_config).table(key)
    assert stored.key == compiled.key
    for column in ("timesteps", "scale", "p", "q", "a", "b", "c", "d", "streams"):
        assert np.array_equal(getattr(stored, column), getattr(compiled, column)), column


def test_a_table_that_is_not_stored_is_compiled_where_diffusers_is_installed(text_bundle):
    bundle = read_bundle(text_bundle)
    assert "ddim:7" not in bundle.solver_keys()
    assert len(bundle.table("ddim:7")) == 7


@pytest.mark.parametrize(
    ("key", "nearest"), [("ddim:7", "ddim:5"), ("unipcs:20", "unipc:20"), ("dpmpp2m:9", "dpmpp-2m:10")]
)
def test_without_diffusers_the_nearest_stored_table_is_named(text_bundle, monkeypatch, key, nearest):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(InputError, match=rf"{key} is not stored .*nearest: {nearest}\).*--solver {key}.*pip install"):
        read_bundle(text_bundle).table(key)
