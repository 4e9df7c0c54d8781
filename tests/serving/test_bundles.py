"""A model folder that is served on an engine for bundles is exported once, and again when it changes."""

from __future__ import annotations

import shutil

import pytest

from fastgen.engines import bundle_engines
from fastgen.errors import InputError
from fastgen.models.bundle import is_bundle
from fastgen.serving import bundles
from fastgen.serving.bundles import served_folder

pytest.importorskip("onnxruntime")


@pytest.fixture
def made(monkeypatch, label_bundle, tmp_path):
    """The exports that were made, each a copy of a small bundle, in a cache of the test's own."""
    calls = []

    def export(model, target, engine, checkpoint, allow_pickle):
        shutil.copytree(label_bundle, target)
        calls.append((model, engine, checkpoint))

    monkeypatch.setattr(bundles, "_export", export)
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path / "cache"))
    return calls


def test_a_bundle_and_a_folder_for_the_reference_are_served_as_they_are(made, label_bundle, label_model):
    said = []
    assert served_folder(label_bundle, None, None, False, said.append) == label_bundle
    assert served_folder(label_model, "eager", None, False, said.append) == label_model
    assert (made, said) == ([], [])


def test_a_model_folder_is_exported_once_and_again_when_it_changes(made, label_model, tmp_path):
    model, said = tmp_path / "model", []
    shutil.copytree(label_model, model)
    first = served_folder(model, "ort", None, False, said.append)
    assert is_bundle(first)
    assert served_folder(model, "ort", None, False, said.append) == first
    assert made == [(model, "ort", None)]
    assert len(said) == 1
    (model / "README.md").write_text("changed")
    assert served_folder(model, "ort", None, False, said.append) != first
    assert len(made) == 2


def test_without_an_engine_the_best_that_needs_nothing_built_is_certified(made, label_model):
    served_folder(label_model, None, None, False, lambda line: None)
    names = {engine.name for engine in bundle_engines() if engine.built_by is None}
    assert made[0][1] == ("openvino" if "openvino" in names else "ort")


def test_without_the_exporter_a_model_folder_runs_on_the_reference_and_says_so(made, label_model, monkeypatch):
    monkeypatch.setattr(bundles, "EXPORTER", ("no_such_package",))
    said = []
    assert served_folder(label_model, None, None, False, said.append) == label_model
    assert "eager" in said[0]
    assert made == []


def test_an_engine_that_must_be_built_is_left_to_its_own_error(made, label_model):
    assert served_folder(label_model, "trt", None, False, lambda line: None) == label_model
    assert made == []


def test_what_is_no_model_is_an_error(made, tmp_path):
    with pytest.raises(InputError, match="neither a bundle"):
        served_folder(tmp_path, None, None, False, lambda line: None)


@pytest.mark.slow
def test_an_export_that_fails_says_why(label_model, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path / "cache"))
    broken = tmp_path / "broken"
    shutil.copytree(label_model, broken)
    (broken / "unet" / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"broken: could not be exported: .*config.json"):
        served_folder(broken, "ort", None, False, lambda line: None)
