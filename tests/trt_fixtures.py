"""A plugin for the tests of engine trt: a GPU and TensorRT that are doubles, and bundles."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import tensorrt_double as double
import tensorrt_rtx_double as rtx_double
from trt_helpers import CpuGpu

from fastgen.engines.machine import Driver
from fastgen.engines.trt import platform
from fastgen.engines.trt_rtx import kernels
from fastgen.models.bundle import Bundle, read_bundle


@pytest.fixture
def card(monkeypatch, tmp_path) -> CpuGpu:
    """TensorRT and a GPU, both doubles, and an empty cache."""
    gpu = CpuGpu("cpu", double.GPU, double.CAPABILITY, 80 * 2**30)
    monkeypatch.setitem(sys.modules, "tensorrt", double.make_module())
    monkeypatch.setattr(platform, "open_gpu", lambda device, product=None: gpu)
    monkeypatch.setattr(platform, "driver_cuda", lambda: (13, 0))
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path / "cache"))
    return gpu


@pytest.fixture
def rtx_card(monkeypatch, tmp_path) -> CpuGpu:
    """TensorRT for RTX and a card for it, both doubles, and an empty cache."""
    gpu = CpuGpu("cpu", rtx_double.GPU, rtx_double.CAPABILITY, 24 * 2**30)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", rtx_double.make_module())
    monkeypatch.setattr(platform, "open_gpu", lambda device, product=None: gpu)
    monkeypatch.setattr(platform, "driver_cuda", lambda: (13, 0))
    monkeypatch.setattr(kernels, "gpus", lambda: ([], Driver("580.95.05", "13.0")))
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path / "cache"))
    return gpu


@pytest.fixture
def half_copy(half_bundle, tmp_path) -> Path:
    """A copy of `half_bundle` that plans may be put into."""
    return shutil.copytree(half_bundle, tmp_path / "bundle")


@pytest.fixture
def labels(label_bundle) -> Bundle:
    return read_bundle(label_bundle)


@pytest.fixture
def half_bundle(lowered_bundle) -> Path:
    """The label bundle with fp16 graphs beside the fp32 ones."""
    return lowered_bundle("labels", "fp16")
