"""The engine that runs when none is asked for is one that is installed, ready and made for the device."""

from __future__ import annotations

import importlib.metadata
import sys

import pytest

from fastgen import engines
from fastgen.engines.cache.artifacts import Recipe, obtain
from fastgen.engines.choose import default_engine
from fastgen.models.bundle import read_bundle
from fastgen.retrieval.indexing import indexing_engine


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def gpu_builds(monkeypatch):
    """A machine where onnxruntime-gpu and TensorRT are installed."""
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "1.31" if name == "onnxruntime-gpu" else version(name)
    )
    monkeypatch.setattr(engines, "missing_packages", lambda name: [])


def build_plan(bundle, graph="unet/model.onnx"):
    recipe = Recipe("trt", {"network": "unet", "graph_sha256": read_bundle(bundle).files[graph].sha256})
    obtain(recipe, lambda folder: (folder / "engine.plan").write_bytes(b"plan"))


def test_a_model_folder_runs_on_the_reference(label_model):
    assert default_engine(label_model) == "eager"


def test_on_a_cpu_openvino_comes_before_onnxruntime(label_bundle, monkeypatch):
    assert default_engine(label_bundle) == "openvino"
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert default_engine(label_bundle) == "ort"


def test_on_a_gpu_onnxruntime_runs_until_plans_are_built(label_bundle, text_bundle, gpu_builds):
    assert default_engine(label_bundle) == "ort"
    build_plan(text_bundle)
    assert default_engine(label_bundle) == "ort"  # another model's
    build_plan(label_bundle)
    assert default_engine(label_bundle) == "trt"


def test_the_device_that_is_asked_for_decides(label_bundle, gpu_builds):
    build_plan(label_bundle)
    assert default_engine(label_bundle, "cuda:1") == "trt"
    assert default_engine(label_bundle, "cpu") == "openvino"


def test_an_engine_that_needs_nothing_built_is_taken_in_place_of_plans(label_bundle, gpu_builds):
    build_plan(label_bundle)
    assert default_engine(label_bundle) == "trt"
    assert indexing_engine(label_bundle, None) == "ort"
    assert indexing_engine(label_bundle, "cpu") == "openvino"


def test_a_gpu_that_is_asked_for_is_not_answered_with_an_engine_for_cpus(label_bundle):
    assert default_engine(label_bundle, "cuda") == "ort"
