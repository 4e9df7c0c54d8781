"""`--dtype` and `--trt`: a bundle gets the graphs it lacks, is whole at every moment, and nothing is computed twice."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from killed import leftover  # noqa: E402
from test_export import EXPORT_FEW, contents  # noqa: E402

from export.bundle import export  # noqa: E402
from export.certificate import certify  # noqa: E402
from fastgen.engines import create_engine, missing_packages  # noqa: E402
from fastgen.errors import FastgenError, InputError  # noqa: E402
from fastgen.files.jsonfiles import read_json, write_json  # noqa: E402
from fastgen.models.bundle import read_bundle  # noqa: E402
from fastgen.models.bundle_record import sealed  # noqa: E402

ADDED = {"unet/model.fp16.onnx", "unet/model.fp16.onnx.data", "reference.fp16.json"}


class KilledError(BaseException):
    """Ends a process that is watched, as a kill would: nothing catches it."""


@pytest.fixture
def bundle(label_bundle, tmp_path):
    return shutil.copytree(label_bundle, tmp_path / "bundle")


@pytest.fixture
def quick(monkeypatch):
    """Graphs that are quick to write, and no certificates."""

    def write(module, signature, path, dtype="fp32"):
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = [
            [onnx.helper.make_tensor_value_info(t.name, {"float32": 1, "int64": 7}[t.dtype], t.shape) for t in part]
            for part in (signature.inputs, signature.outputs)
        ]
        graph = onnx.helper.make_graph([], f"graph in {dtype}", *tensors)
        path.write_bytes(onnx.helper.make_model(graph).SerializeToString())
        path.with_name(f"{path.name}.data").write_text("weights")

    monkeypatch.setattr("export.onnx.export_onnx", write)
    monkeypatch.setattr("export.bundle.certify", lambda engine, bundle, networks, task: None)


def fail(*arguments, **options):
    pytest.fail("computed again")


def test_graphs_of_another_precision_are_added_and_everything_else_stays(lowered_bundle, label_bundle):
    before, after = contents(label_bundle), contents(lowered_bundle("labels", "bf16"))
    changed = {name for name in after if after[name] != before.get(name)}
    assert {"unet/model.bf16.onnx", "unet/model.bf16.onnx.data", "bundle.json"} <= changed
    assert all(name.startswith(("unet/model.bf16", "bundle.json", "certificates/")) for name in changed)
    listed = read_json(lowered_bundle("labels", "bf16") / "bundle.json")["files"]
    assert {n: f["sha256"] for n, f in listed.items()} == {
        n: sha for n, sha in after.items() if not n.startswith("certificates/") and n != "bundle.json"
    }
    read_bundle(lowered_bundle("labels", "bf16")).verify("bf16")


def test_the_text_encoder_stays_fp32(lowered_bundle):
    names = {
        f.relative_to(lowered_bundle("text", "fp16")).parts[0] for f in lowered_bundle("text", "fp16").glob("*/*fp16*")
    }
    assert names == {"unet", "vae_decoder", "vae_encoder"}


def test_adding_a_precision_computes_no_reference_and_no_table_again(quick, label_model, bundle, monkeypatch):
    for name in ("write_reference", "write_tables"):
        monkeypatch.setattr(f"export.write.{name}", fail)
    lines: list[str] = []
    export(label_model, bundle, dtype="fp16", engines=["ort"], say=lines.append)
    assert set(read_bundle(bundle).files) >= ADDED
    assert any("holds these weights already, but not all in fp16" in line for line in lines)
    monkeypatch.setattr("export.onnx.export_onnx", fail)
    export(label_model, bundle, dtype="fp16", engines=["ort"], say=lines.append)
    assert f"{bundle} holds these weights already" in lines


def test_exporting_the_same_weights_again_keeps_their_reference(quick, export_few, label_model, bundle, monkeypatch):
    monkeypatch.setattr("export.write.write_reference", fail)
    reference = (bundle / "reference.safetensors").read_bytes()
    export_few(label_model, bundle, solvers=["ddim:7"], overwrite=True, engines=["ort"])
    assert (bundle / "reference.safetensors").read_bytes() == reference
    assert "ddim:7" in read_bundle(bundle).solver_keys()


def test_another_version_of_torch_makes_a_reference_of_its_own(quick, export_few, label_model, bundle, monkeypatch):
    manifest = read_json(bundle / "bundle.json")
    versions = manifest["versions"] | {"torch": "1.0"}
    write_json(bundle / "bundle.json", sealed(manifest | {"versions": versions}))
    monkeypatch.setattr("export.write.write_reference", fail)
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        export_few(label_model, bundle, overwrite=True, engines=["ort"])


def test_certificates_stay_valid_when_graphs_are_added(quick, label_model, bundle):
    file = bundle / "certificates" / "ort-fp32-cpu.json"
    stale = file.with_name("old.json")
    write_json(stale, {"bundle_sha256": "0" * 64})
    before = read_json(file)
    export(label_model, bundle, dtype="fp16", engines=["ort"])
    assert read_json(file) == before | {"bundle_sha256": read_bundle(bundle).sha256}
    assert before["bundle_sha256"] != read_bundle(bundle).sha256
    assert read_json(stale) == {"bundle_sha256": "0" * 64}


@pytest.mark.parametrize("moment", range(5))
def test_whenever_it_is_killed_the_bundle_is_whole_and_the_next_export_completes_it(
    quick, label_model, bundle, monkeypatch, moment
):
    """Moments: before each of the moves of new files into the bundle, before bundle.json, and before the certificates."""
    old, replace, left = contents(bundle), os.replace, [moment]

    def killed(source, target, **options):
        if Path(target).is_relative_to(bundle):
            left[0] -= 1
            if left[0] < 0:
                raise KilledError
        return replace(source, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KilledError):
            export(label_model, bundle, dtype="fp16", engines=["ort"])
    now = contents(bundle)
    if moment < 4:  # bundle.json is the fourth
        assert {name: now[name] for name in old} == old
        assert not ADDED & set(read_bundle(bundle).files)
    read_bundle(bundle).verify("fp16")

    (bundle / "unet" / "model.bf16.onnx").write_text("half a gra")  # of another extension that was killed
    leftover(bundle / "bundle.json").write_text("half")
    export(label_model, bundle, dtype="fp16", engines=["ort"])
    read_bundle(bundle).verify("fp16")
    assert set(contents(bundle)) == set(old) | ADDED
    assert [f.name for f in bundle.parent.iterdir()] == ["bundle"]


def test_a_file_of_the_user_s_in_the_bundle_is_left_alone(quick, label_model, bundle):
    (bundle / "notes.txt").write_text("mine")
    export(label_model, bundle, dtype="fp16", engines=["ort"])
    assert (bundle / "notes.txt").read_text() == "mine"


@pytest.mark.slow
def test_a_killed_process_leaves_the_old_bundle(label_model, bundle):
    old = contents(bundle)
    command = [sys.executable, "-c", EXPORT_FEW, "export", str(label_model), "--out", str(bundle), "--dtype", "fp16"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    graph, until = ".bundle.*.tmp/unet/model.fp16.onnx", time.monotonic() + 120
    while not list(bundle.parent.glob(graph)) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert contents(bundle) == old
    done = subprocess.run([*command, "--engine", "ort"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    read_bundle(bundle).verify("fp16")
    assert [f.name for f in bundle.parent.iterdir()] == ["bundle"]


def test_a_bundle_alone_cannot_get_graphs_and_says_which_command_adds_them(fastgen, bundle):
    before = contents(bundle)
    code, out, err = fastgen("export", bundle, "--dtype", "fp16")
    assert (code, out) == (2, "")
    assert re.fullmatch(
        r"fastgen: error: .*no fp16 graph of unet; `fastgen export MODEL --out .* --dtype fp16`.*\n", err
    )
    assert contents(bundle) == before


def test_a_precision_without_a_yardstick_names_the_command(bundle):
    held = read_bundle(bundle)
    engine: Any = create_engine("ort", held)
    engine.run("unet", *held.spec.signatures["unet"].sample_inputs(1, np.random.default_rng(0)).values())
    engine.executed = lambda network: "fp16"
    with pytest.raises(InputError, match=r"how far eager itself moves in fp16; `fastgen export MODEL .* --dtype fp16`"):
        certify(engine, held)


@pytest.mark.skipif(not missing_packages("trt"), reason="TensorRT is installed here")
def test_without_tensorrt_the_graphs_are_kept_and_the_exit_is_not_zero(
    fastgen_process, label_model, label_bundle, tmp_path
):
    bundle = shutil.copytree(label_bundle, tmp_path / "bundle")
    done = fastgen_process("export", label_model, "--out", bundle, "--trt", "--engine", "ort")
    assert done.returncode == 1
    assert done.stderr.startswith("engine trt is not ready: ")
    end = done.stderr.splitlines()[-1]
    assert end.startswith(f"fastgen: error: {bundle} is complete, but no TensorRT engines were built: ")
    assert f"`fastgen export {bundle} --trt`" in end
    assert "Traceback" not in done.stderr
    assert "ort fp32 cpu: certified" in done.stdout
    assert set(read_bundle(bundle).files) >= ADDED
    read_bundle(bundle).verify("fp16")


@pytest.mark.parametrize(
    ("options", "dtype", "sizes"),
    [
        (["--trt"], "fp16", [1, 8, 64]),
        (["--trt", "--batch-sizes", "8, 2,8"], "fp16", [2, 8]),
        (["--trt", "--dtype", "bf16", "--batch-sizes", "128"], "bf16", [128]),
        (["--trt", "--dtype", "fp32"], "fp32", [1, 8, 64]),
    ],
)
def test_trt_engines_are_built_and_then_certified(
    quick, fastgen, label_model, bundle, monkeypatch, options, dtype, sizes
):
    calls: list[object] = []

    def build(bundle, *, dtype, batch_sizes, networks=None, device="cuda", say):
        calls.append((bundle.folder, dtype, batch_sizes))
        return []

    monkeypatch.setattr("export.bundle.check_installed", lambda name: None)
    monkeypatch.setitem(sys.modules, "export.trt", type(sys)("export.trt"))
    monkeypatch.setattr(sys.modules["export.trt"], "build_engines", build, raising=False)
    monkeypatch.setattr("export.bundle._open", lambda name, dtype, *rest: calls.append((name, dtype)) or Passed([]))
    monkeypatch.setattr("export.bundle.certify", lambda *arguments, **options: Passed(calls))
    code, out, err = fastgen("export", label_model, "--out", bundle, "--engine", "ort", *options)
    assert (code, out) == (0, f"table\ntable\nbundle: {bundle}\n"), err
    assert calls == [("ort", None), "certified", (bundle, dtype, sizes), ("trt", dtype), "certified"]


class Passed:
    """A certificate, and a note in `calls` that it was made."""

    engine, dtype, passed = "any", "any", True

    def __init__(self, calls):
        calls.append("certified")

    def table(self):
        return "table"


def test_a_build_that_fails_keeps_the_bundle_and_the_exit_code_of_its_cause(quick, label_model, bundle, monkeypatch):
    def build(*arguments, **options):
        raise FastgenError("TensorRT refuses the graph")

    monkeypatch.setattr("export.bundle.check_installed", lambda name: None)
    monkeypatch.setitem(sys.modules, "export.trt", type(sys)("export.trt"))
    monkeypatch.setattr(sys.modules["export.trt"], "build_engines", build, raising=False)
    with pytest.raises(
        FastgenError, match="is complete, but no TensorRT engines were built: TensorRT refuses"
    ) as error:
        export(label_model, bundle, trt=True, engines=["ort"])
    assert error.value.exit_code == 1
    read_bundle(bundle).verify("fp16")


@pytest.mark.parametrize("sizes", ["", "1,", "0", "1,-8", "8x", "1;8", "1.5", "²"])
def test_batch_sizes_that_are_none_are_one_line(fastgen, label_model, tmp_path, sizes):
    code, out, err = fastgen("export", label_model, "--out", tmp_path / "out", "--trt", "--batch-sizes", sizes)
    assert (code, out) == (2, "")
    assert err.startswith("fastgen: error: --batch-sizes: found ")
    assert "a whole number from 1 to 65536" in err
    assert not (tmp_path / "out").exists()


def test_batch_sizes_without_trt_are_refused(fastgen, label_model, tmp_path):
    code, _, err = fastgen("export", label_model, "--out", tmp_path / "out", "--batch-sizes", "8")
    assert (code, err.count("\n")) == (2, 1)
    assert "give --trt, --rtx or --triton too" in err


def test_an_engine_is_certified_in_the_precision_asked_for(fastgen, label_model, bundle):
    code, out, err = fastgen("export", label_model, "--out", bundle, "--engine", "openvino:fp32", "--engine", "ort")
    assert code == 0, err
    assert "openvino fp32 cpu: certified" in out
    assert "ort fp32 cpu: certified" in out
