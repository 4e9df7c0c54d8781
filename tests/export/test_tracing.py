"""Networks traced in processes beside the export: the same files, whatever happens to those processes."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("onnxscript")

import export.tracing as tracing
from export.options import BundleOptions
from export.tracing import Source, Trace, Tracing, processes, trace
from export.write import write_bundle
from fastgen.errors import FastgenError, InputError
from fastgen.models.folder import load_model

GIB = 2**30


@pytest.fixture
def small_is_large(monkeypatch):
    monkeypatch.setattr(tracing, "LARGE", 0)


def begin(folder: Path, out: Path, say, *dtypes: str, **how) -> Tracing:
    traces = [Trace("unet", dtype) for dtype in dtypes or ("fp32",)]
    return Tracing(load_model(folder), Source(folder, how), traces, out, say)


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.mark.parametrize(
    ("weights", "networks", "cores", "free", "count"),
    [
        (2**20, 4, 16, 64 * GIB, 0),  # small
        (GIB, 4, 1, 64 * GIB, 0),
        (GIB, 4, 2, None, 0),
        (GIB, 4, 2, 64 * GIB, 1),
        (GIB, 4, 16, 64 * GIB, 4),
        (GIB, 4, 16, 10 * GIB, 2),
        (GIB, 4, 16, 5 * GIB, 0),  # the export's own memory is left free
        (GIB, 4, 16, 1 * GIB, 0),
    ],
)
def test_processes_are_as_many_as_cores_and_memory_allow(weights, networks, cores, free, count):
    assert processes(weights, networks, cores, free) == count


def test_a_process_writes_the_files_that_this_one_would(label_model, small_is_large, tmp_path):
    lines = []
    trace(load_model(label_model), [Trace("unet", "fp32"), Trace("unet", "fp16")], tmp_path / "here")
    with begin(label_model, tmp_path / "beside", lines.append, "fp32", "fp16") as beside:
        beside.run_here()
        assert lines == ["exporting unet", "exporting unet in fp16"]
        beside.finish()
    assert len(lines) == 2
    assert files(tmp_path / "beside") == files(tmp_path / "here")
    assert len(files(tmp_path / "here")) >= 4


@pytest.mark.slow
def test_small_models_are_traced_without_a_process(label_model, tmp_path):
    with Tracing(
        load_model(label_model), Source(label_model, {}), [Trace("unet", "fp32")], tmp_path, lambda line: None
    ) as beside:
        assert not beside._processes
        beside.run_here()
        assert (tmp_path / "unet" / "model.onnx").is_file()
        beside.finish()


@pytest.mark.slow
def test_what_a_killed_process_left_is_done_here_and_said(label_model, small_is_large, tmp_path):
    lines = []
    with Tracing(
        load_model(label_model), Source(label_model, {}), [Trace("unet", "fp32")], tmp_path, lines.append
    ) as beside:
        beside._processes[0]._process.send_signal(signal.SIGKILL)
        beside.finish()
    assert lines == ["exporting unet", "exporting unet here, as the process that did it ended with signal 9"]
    assert (tmp_path / "unet" / "model.onnx.data").is_file()


@pytest.mark.slow
def test_weights_that_changed_meanwhile_are_not_traced(label_model, small_is_large, tmp_path, monkeypatch):
    lines, start = [], tracing._Process.__init__
    monkeypatch.setattr(
        tracing._Process, "__init__", lambda self, order: start(self, dataclasses.replace(order, sha256="0" * 64))
    )
    with begin(label_model, tmp_path, lines.append) as beside:
        beside.finish()
    assert lines[1:] == ["exporting unet here, as the folder has changed"]
    assert (tmp_path / "unet" / "model.onnx").is_file()


@pytest.mark.slow
def test_a_system_without_room_for_a_process_traces_here(label_model, small_is_large, tmp_path, monkeypatch):
    def refused(*given, **options):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(tracing.subprocess, "Popen", refused)
    with begin(label_model, tmp_path, print) as beside:
        beside.run_here()
        beside.finish()
    assert (tmp_path / "unet" / "model.onnx").is_file()


def test_an_error_of_the_process_is_raised_here(label_model, small_is_large, tmp_path):
    target = tmp_path / "unet" / "model.onnx"
    target.mkdir(parents=True)  # the graph cannot be written there
    with begin(label_model, tmp_path, print) as beside, pytest.raises(FastgenError, match="cannot be written"):
        beside.finish()


@pytest.mark.slow
def test_a_folder_that_cannot_be_read_any_more_is_not_needed(label_model, small_is_large, tmp_path):
    lines = []
    with begin(label_model, tmp_path, lines.append, checkpoint="gone") as beside:
        beside.finish()
    assert lines[1:] == ["exporting unet here, as the folder has changed"]
    assert (tmp_path / "unet" / "model.onnx").is_file()


@pytest.mark.slow
def test_a_process_that_ended_before_it_was_told_anything_hides_no_error(
    label_model, small_is_large, tmp_path, monkeypatch
):
    monkeypatch.setattr(tracing, "CHILD", "raise SystemExit(7)")
    lines = []
    with begin(label_model, tmp_path, lines.append) as beside:
        beside.finish()
    assert lines[1:] == ["exporting unet here, as the process that did it ended with exit code 7"]
    assert (tmp_path / "unet" / "model.onnx").is_file()
    with pytest.raises(InputError, match="mine"), begin(label_model, tmp_path, print):
        raise InputError("mine")


def test_an_interruption_between_two_starts_ends_the_first_process(label_model, small_is_large, tmp_path, monkeypatch):
    started, start = [], tracing._Process.__init__

    def interrupted(self, order):
        if started:
            raise KeyboardInterrupt
        start(self, order)
        started.append(self)

    monkeypatch.setattr(tracing._Process, "__init__", interrupted)
    monkeypatch.setattr(tracing, "processes", lambda *given: 2)
    with pytest.raises(KeyboardInterrupt), begin(label_model, tmp_path, print, "fp32", "fp16"):
        raise AssertionError("the block is not entered")
    assert started[0]._process.poll() is not None


def test_a_solver_that_does_not_exist_ends_the_process_too(label_model, small_is_large, tmp_path, monkeypatch):
    started = []
    start = tracing._Process.__init__

    def kept(self, order):
        start(self, order)
        started.append(self)

    monkeypatch.setattr(tracing._Process, "__init__", kept)
    monkeypatch.setattr("export.write.write_tables", lambda *given: (_ for _ in ()).throw(InputError("no table")))
    with pytest.raises(InputError, match="no table"):
        write_bundle(label_model, tmp_path / "bundle", BundleOptions(), False, print)
    (process,) = started
    assert process._process.poll() is not None
    assert not (tmp_path / "bundle").exists()


PARENT = """
import sys, time
import export.tracing as tracing

tracing.LARGE = 0
folder, out = sys.argv[1:]
source = tracing.Source(tracing.Path(folder), {})
with tracing.Tracing(source.load(), source, 9 * [tracing.Trace("unet", "fp32")], tracing.Path(out), print) as beside:
    print(beside._processes[0]._process.pid, flush=True)
    time.sleep(60)
"""


def test_the_process_ends_with_an_export_that_is_killed(label_model, tmp_path):
    words = [sys.executable, "-c", PARENT, str(label_model), str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as parent:
        pid = next(int(line) for line in parent.stdout if line.strip().isdecimal())
        os.kill(pid, 0)  # it is there
        parent.kill()
    until = time.monotonic() + 30
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return  # nobody waits for it here
        time.sleep(0.1)
    raise AssertionError(f"process {pid} goes on")
