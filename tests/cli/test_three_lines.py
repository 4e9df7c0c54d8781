"""After a training run: `fastgen export --trt`, then `fastgen generate test.json --engine trt`, with and without a GPU.

Where TensorRT cannot run, the first says so before it works, and leaves a whole bundle; the second names what helps.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

import fastgen.engines.unready as unready_module  # noqa: E402
from fastgen.engines import doctor  # noqa: E402
from fastgen.engines.doctor.libraries import Library  # noqa: E402
from fastgen.engines.machine import Driver, Gpu, gpus  # noqa: E402
from fastgen.engines.trt import platform  # noqa: E402
from fastgen.errors import FastgenError, InputError  # noqa: E402
from fastgen.generate.pipeline import load  # noqa: E402
from fastgen.models.bundle import read_bundle  # noqa: E402
from fastgen.models.runs import set_latest  # noqa: E402

pytest_plugins = ("trt_fixtures",)

NO_DRIVER = "no NVIDIA driver (nvidia-smi is not there)"
NEEDS_GPU = f"TensorRT needs an NVIDIA GPU: {NO_DRIVER}"
FEW = ("--num-inference-steps", 2)
INSTALLED = {
    "torch": Library("torch", "2.13.0", None, {"cuda": "13.0", "available": True, "gpus": [], "failure": None}),
    "tensorrt": Library("tensorrt", "11.4.0.106", None, {"loaded": 11, "runtime": True}),
    "tensorrt_rtx": Library("tensorrt_rtx", "1.7.1.116", None, {"loaded": None, "runtime": True}),
}
REALLY_MISSING = unready_module.missing_packages


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """(GPUs, installed packages) -> this machine has those and no others."""
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path / "cache"))

    def become(cards: list[Gpu], installed: set[str]) -> None:
        driver = Driver("580.95.05", "13.0") if cards else Driver(None, None, NO_DRIVER)
        libraries = {name: INSTALLED[name] if name in installed else Library(name) for name in INSTALLED}
        lacking = {"trt": {"torch", "tensorrt"} - installed, "trt-rtx": {"torch", "tensorrt_rtx"} - installed}
        monkeypatch.setattr(doctor, "gpus", lambda: (cards, driver))
        monkeypatch.setattr(doctor, "driver_cuda", lambda: (13, 0) if cards else None)
        monkeypatch.setattr(doctor, "inspect_all", lambda names: {name: libraries[name] for name in names})
        monkeypatch.setattr(doctor, "distributions", dict)
        monkeypatch.setattr(platform, "driver_cuda", lambda: (13, 0) if cards else None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # everything else runs on the CPU
        monkeypatch.setattr(
            unready_module, "missing_packages", lambda name: sorted(lacking.get(name, REALLY_MISSING(name)))
        )

    return become


@pytest.fixture
def runs(label_model, requests_files, tmp_path, monkeypatch) -> Path:
    """The folder of a run that has just been trained, in a current folder with test.json."""
    monkeypatch.chdir(tmp_path)
    run = Path(shutil.copytree(label_model, tmp_path / "runs" / "tiny-20261128-120000"))
    shutil.copy(requests_files["labels"], "test.json")
    set_latest(run)
    return run


def put_bundle(run: Path, bundle: Path) -> Path:
    return Path(shutil.copytree(bundle, run / "bundle"))


def refused(result) -> str:
    code, out, err = result
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert not Path("generated").exists()
    return err.removeprefix("fastgen: error: ").strip()


@pytest.mark.usefixtures("_graphs_once")
@pytest.mark.parametrize("installed", [{"torch"}, {"torch", "tensorrt"}, set(INSTALLED)], ids=len)
def test_without_a_gpu_the_reason_comes_first_and_the_bundle_is_whole(
    machine, runs, fastgen, export_few, monkeypatch, installed
):
    machine([], installed)
    written: list[bool] = []
    monkeypatch.setattr("export.bundle.export", noting(export_few, written))
    code, out, err = fastgen("export", "--trt", "--engine", "ort")
    lines = err.splitlines()
    assert code == 1, err
    assert lines[0] == f"engine trt is not ready: {NEEDS_GPU}: use a machine that has one"
    assert "pip install" not in err
    assert written[0] is False
    assert "exporting unet" in lines
    assert "ort fp32 cpu: certified" in out
    bundle = runs / "bundle"
    end = f"{bundle} is complete, but no TensorRT engines were built: {NEEDS_GPU}; run `fastgen export {bundle} --trt` "
    assert lines[-1].startswith(f"fastgen: error: {end}on a machine with the GPU")
    assert (f"`fastgen export {bundle} --rtx` here" in lines[-1]) is ("tensorrt_rtx" in installed)
    read_bundle(bundle).verify("fp16")

    line = refused(fastgen("generate", "test.json", "--engine", "trt"))
    assert line.startswith(f"engine trt is not ready: {NEEDS_GPU}")
    assert "`fastgen export --trt`" in line
    assert ("--engine trt-rtx" in line) is ("tensorrt_rtx" in installed)
    assert "--engine ort" in line
    code, _, err = fastgen("generate", "test.json", "--engine", "ort", *FEW)
    assert code == 0, err
    assert err == f"model: {bundle} (the latest run)\n"
    assert len(list(Path("generated/test").glob("[0-9].png"))) == len(json.loads(Path("test.json").read_text()))


def noting(export, written: list[bool]):
    """`export` that notes, at each line it says, whether there is any part of a bundle yet."""

    def run(model, out, *, say, **options):
        def note(line: str) -> None:
            written.append(any(out.parent.glob("*bundle*")))
            say(line)

        return export(model, out, say=note, **options)

    return run


@pytest.mark.parametrize("card", [Gpu("NVIDIA H200", 143771, "9.0"), Gpu("NVIDIA GeForce RTX 4090", 24564, "8.9")])
@pytest.mark.parametrize("rtx", [False, True])
def test_with_a_gpu_and_no_tensorrt_the_package_comes_first_then_the_command(
    machine, runs, fastgen, lowered_bundle, card, rtx
):
    machine([card], {"torch", *(["tensorrt_rtx"] if rtx else [])})
    bundle = put_bundle(runs, lowered_bundle("labels", "fp16"))
    code, _, err = fastgen("export", bundle, "--trt", "--engine", "ort", "--batch-sizes", "4,2")
    lines = err.splitlines()
    assert code == 1
    assert lines[0].startswith("engine trt is not ready: tensorrt is not installed: pip install ")
    assert f"; then run `fastgen export {bundle} --trt --batch-sizes 4,2`" in lines[-1]
    fits = rtx and card.compute_capability == "8.9"
    assert (f"`fastgen export {bundle} --rtx`" in lines[-1]) is fits

    line = refused(fastgen("generate", "test.json", "--engine", "trt", "--model", bundle))
    assert line.startswith("engine trt is not ready: tensorrt is not installed: pip install ")
    assert f"then `fastgen export {bundle} --trt` builds its plans" in line
    assert ("--engine trt-rtx, which is ready here" in line) is fits


def test_every_reason_is_told(machine, runs, fastgen, monkeypatch):
    machine([Gpu("NVIDIA H200", 143771, "9.0")], {"torch"})
    facts = {"cuda": None, "available": False, "gpus": [], "failure": None}
    monkeypatch.setitem(INSTALLED, "torch", Library("torch", "2.13.0", None, facts))
    machine([Gpu("NVIDIA H200", 143771, "9.0")], {"torch"})
    line = refused(fastgen("generate", "test.json", "--engine", "trt"))
    assert line.index("tensorrt is not installed") < line.index("torch 2.13.0 is built without CUDA")


def test_both_products_asked_for_one_can_be_built(machine, runs, fastgen, lowered_bundle, monkeypatch):
    machine([], set(INSTALLED))
    built: list[Path] = []
    monkeypatch.setattr("export.bundle._check_rtx", lambda *options: None)
    monkeypatch.setattr("export.bundle._build_rtx", lambda bundle, *rest: built.append(bundle.folder))
    bundle = put_bundle(runs, lowered_bundle("labels", "fp16"))
    code, _, err = fastgen("export", bundle, "--trt", "--rtx", "--engine", "ort")
    assert (code, built) == (1, [bundle])
    assert "--rtx" not in err.splitlines()[-1]


@pytest.mark.parametrize(("kind", "code"), [(InputError, 2), (FastgenError, 1)])
def test_where_everything_is_ready_nothing_is_said_and_a_failed_build_speaks_for_itself(
    machine, runs, fastgen, lowered_bundle, monkeypatch, kind, code
):
    def build(*arguments, **options):
        raise kind("TensorRT refuses the graph")

    machine([Gpu("NVIDIA H200", 143771, "9.0")], set(INSTALLED))
    monkeypatch.setattr("export.bundle.check_installed", lambda name: None)
    monkeypatch.setattr("export.trt.build_engines", build)
    bundle = put_bundle(runs, lowered_bundle("labels", "fp16"))
    found, _, err = fastgen("export", bundle, "--trt", "--engine", "ort")
    assert found == code
    assert err.splitlines() == [
        "certifying ort fp32 against eager fp32",
        f"fastgen: error: {bundle} is complete, but no TensorRT engines were built: TensorRT refuses the graph",
    ]


def test_without_a_bundle_the_model_is_named_and_nothing_is_loaded(machine, runs, fastgen):
    machine([], {"torch"})
    assert "there `fastgen export --trt` builds its plans" in refused(
        fastgen("generate", "test.json", "--engine", "trt")
    )
    line = refused(fastgen("generate", "test.json", "--engine", "trt", "--model", runs))
    assert f"there `fastgen export {runs} --trt` builds its plans" in line
    Path("runs/latest").unlink()
    assert "`fastgen export MODEL --trt`" in refused(fastgen("generate", "test.json", "--engine", "trt"))


def test_engine_trt_rtx_without_a_gpu_says_that_plans_can_be_built_here(machine, runs, fastgen, label_bundle):
    machine([], set(INSTALLED))
    put_bundle(runs, label_bundle)
    line = refused(fastgen("generate", "test.json", "--engine", "trt-rtx"))
    assert line.startswith("engine trt-rtx is not ready: TensorRT for RTX needs an NVIDIA GPU")
    assert "`fastgen export --rtx` builds plans for one here all the same" in line
    assert "--engine ort" in line


def test_the_python_api_gives_the_same_line(machine, label_bundle):
    machine([], {"torch"})
    with pytest.raises(InputError, match=f"{NEEDS_GPU.partition('(')[0]}.*`fastgen export .* --trt`"):
        load(label_bundle, "trt")


def test_with_a_gpu_and_no_plans_yet_the_command_that_builds_them_is_named(card, runs, fastgen, lowered_bundle):
    line = refused(fastgen("generate", "test.json", "--engine", "trt"))
    assert line.endswith("has no bundle yet; `fastgen export --trt` makes it")
    bundle = put_bundle(runs, lowered_bundle("labels", "fp16"))
    code, out, err = fastgen("generate", "test.json", "--engine", "trt")
    assert (code, out) == (2, "")
    told, line = err.splitlines()
    assert told == f"model: {bundle} (the latest run)"
    assert f"run `fastgen export {bundle} --trt --dtype fp16" in line
    assert "--engine ort" in line
    assert not Path("generated").exists()


@pytest.mark.skipif(bool(gpus()[0]), reason="there is a GPU here")
def test_a_process_tells_the_reason_within_seconds(command, runs):
    """Without a double: the first line comes before torch has traced anything."""
    line, environment = command("export", "--trt")
    start = time.monotonic()
    with subprocess.Popen(
        line, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stderr is not None
        first = process.stderr.readline()
        seconds, parts = time.monotonic() - start, os.listdir(runs)
        process.kill()
    assert first.startswith("engine trt is not ready: TensorRT needs an NVIDIA GPU: ")
    assert seconds < 60  # 3 on an idle machine
    assert not [name for name in parts if "bundle" in name]


@pytest.mark.slow
def test_the_three_lines_of_the_readme_as_they_stand(fastgen_process, tmp_path):
    """In a folder with a dataset, each line in a process of its own; the first with less to do."""
    if gpus()[0]:
        pytest.skip("with a GPU TensorRT may run, and what it needs is tested elsewhere")
    assert fastgen_process("data", "iclevr", "data", "--count", 24, cwd=tmp_path).returncode == 0
    shutil.copy(tmp_path / "data" / "test.json", tmp_path)
    few = [
        f"{key}.train.{value}"
        for key in ("vae", "unet")
        for value in ("steps=2", "batch_size=4", "validation_fraction=0.25")
    ]
    small = ["unet.config.block_out_channels=[8, 16]", "unet.config.cross_attention_dim=16"]
    trained = fastgen_process("train", *(f"--set={word}" for word in (*few, *small)), cwd=tmp_path)
    assert (trained.returncode, "preset: iclevr-64, the default for images with labels" in trained.stderr) == (0, True)
    exported = fastgen_process("export", "--trt", cwd=tmp_path)
    first, *_, last = exported.stderr.strip().splitlines()
    assert exported.returncode == 1
    assert NEEDS_GPU in first
    assert "is complete, but no TensorRT engines were built" in last
    generated = fastgen_process("generate", "test.json", "--engine", "trt", cwd=tmp_path)
    assert generated.returncode == 2
    assert "`fastgen export --trt`" in generated.stderr
    assert not (tmp_path / "generated").exists()
    assert fastgen_process("generate", "test.json", "--engine", "ort", cwd=tmp_path).returncode == 0
    assert len(list((tmp_path / "generated" / "test").glob("*.png"))) > 1
