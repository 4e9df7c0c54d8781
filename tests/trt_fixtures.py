"""A plugin for the tests of engine trt: a GPU and TensorRT that are doubles, and bundles."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tensorrt_double as double
from trt_helpers import CpuGpu

from fastgen.bundle import Bundle, read_bundle
from fastgen.engines import base_trt


@pytest.fixture
def card(monkeypatch, tmp_path) -> CpuGpu:
    """TensorRT and a GPU, both doubles, and an empty cache."""
    gpu = CpuGpu("cpu", double.GPU, double.CAPABILITY, 80 * 2**30)
    monkeypatch.setitem(sys.modules, "tensorrt", double.make_module())
    monkeypatch.setattr(base_trt, "open_gpu", lambda device, product=None: gpu)
    monkeypatch.setattr(base_trt, "driver_cuda", lambda: (13, 0))
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path / "cache"))
    return gpu


@pytest.fixture
def labels(label_bundle) -> Bundle:
    return read_bundle(label_bundle)


@pytest.fixture
def half_bundle(lowered_bundle) -> Path:
    """The label bundle with fp16 graphs beside the fp32 ones."""
    return lowered_bundle("labels", "fp16")
