"""Why engine trt cannot run here is one line with what helps, and on which stream it runs where it can."""

from __future__ import annotations

import importlib.metadata
import sys
from contextlib import nullcontext

import pytest
import tensorrt_double as double
from tensorrt_double import BEHAVIOUR

import fastgen.sampling.streams
from fastgen.engines import missing_packages
from fastgen.engines.trt import platform
from fastgen.engines.trt.platform import Gpu, open_gpu, open_platform
from fastgen.errors import InputError

torch = pytest.importorskip("torch")
pytest_plugins = ("trt_fixtures",)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def build(cuda, driver):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(platform, "driver_cuda", lambda: driver)

    return build


@pytest.mark.parametrize(
    ("cuda", "driver", "message"),
    [
        (None, (13, 0), r"torch .* is built without CUDA; install torch"),
        ("13.0", None, r"no NVIDIA driver was found"),
        (
            "13.0",
            (12, 4),
            r"the driver supports CUDA 12\.4, torch .* is built for 13\.0: update the driver, or .* CUDA 12",
        ),
        ("12.8", (13, 0), r"the driver supports CUDA 13\.0, but torch sees no device \(CUDA_VISIBLE_DEVICES is '-1'\)"),
    ],
)
def test_without_a_gpu_the_reason_is_named(no_gpu, monkeypatch, cuda, driver, message):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    no_gpu(cuda, driver)
    with pytest.raises(InputError, match=f"engine trt needs an NVIDIA GPU: {message}") as raised:
        open_gpu(None)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("cuda", "wheel"), [("13.0", "tensorrt-cu13"), ("12.8", "tensorrt-cu12")])
def test_a_missing_tensorrt_names_the_wheel_for_torchs_cuda(card, monkeypatch, cuda, wheel):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(InputError, match=f"engine trt needs tensorrt, not installed here: `pip install {wheel}`"):
        open_platform()


def test_bindings_without_their_libraries_are_told_apart_from_no_tensorrt(card, monkeypatch, tmp_path):
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')")
    monkeypatch.delitem(sys.modules, "tensorrt")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match=r"installed but cannot be loaded: libnvinfer\.so\.10: cannot open"):
        open_platform()


def test_a_tensorrt_that_is_too_old_is_named_with_the_oldest_that_is_not(card, monkeypatch):
    monkeypatch.setattr(sys.modules["tensorrt"], "__version__", "10.9.0.34")
    with pytest.raises(InputError, match=r"TensorRT is 10\.9\.0\.34, expected 10\.13 or newer"):
        open_platform()


def test_a_driver_too_old_for_the_wheel_is_named_with_the_wheel_that_suits_it(card, monkeypatch):
    def version(name):
        if name != "tensorrt-cu13":
            raise importlib.metadata.PackageNotFoundError(name)
        return double.VERSION

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert open_platform().gpu is card
    monkeypatch.setattr(platform, "driver_cuda", lambda: (12, 8))
    message = (
        r"supports CUDA 12\.8, the installed TensorRT 10\.13\.3\.9 needs 13: update .* `pip install tensorrt-cu12`"
    )
    with pytest.raises(InputError, match=message):
        open_platform()


def test_a_runtime_that_cannot_start_tells_tensorrts_reason(card):
    BEHAVIOUR["runtime"] = "fails"
    message = r"runtime cannot be made: CUDA initialization failure with error: 35 \(the driver supports CUDA 13\.0"
    with pytest.raises(InputError, match=message):
        open_platform()


def test_the_engine_is_found_and_says_what_it_lacks_without_importing_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    assert set(missing_packages("trt")) <= {"torch", "tensorrt"}


class Stream:
    """A CUDA stream that notes what it waits for."""

    def __init__(self, handle: int, log: list[tuple[int, int]]) -> None:
        self.cuda_stream, self._log = handle, log

    def wait_stream(self, other: Stream) -> None:
        self._log.append((self.cuda_stream, other.cuda_stream))


@pytest.fixture
def streams(monkeypatch):
    """A function that sets the handle of the current stream, and the list of who waited for whom."""
    log: list[tuple[int, int]] = []
    fastgen.sampling.streams._streams.cache_clear()
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(99, log))
    yield lambda handle: monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream(handle, log)), log
    fastgen.sampling.streams._streams.cache_clear()


def test_work_is_queued_on_the_current_stream(streams):
    set_current, log = streams
    set_current(5)
    with Gpu("cuda", "", "", 0).stream() as handle:
        assert handle == 5
    assert log == []


def test_on_the_default_stream_a_stream_of_its_own_runs_in_its_place(streams):
    set_current, log = streams
    set_current(0)
    with Gpu("cuda", "", "", 0).stream() as handle:
        assert (handle, log) == (99, [(99, 0)])  # after what is queued
    assert log == [(99, 0), (0, 99)]  # before what comes
    log.clear()
    with pytest.raises(ValueError, match="inside"), Gpu("cuda", "", "", 0).stream():
        raise ValueError("inside")
    assert log == [(99, 0), (0, 99)]
