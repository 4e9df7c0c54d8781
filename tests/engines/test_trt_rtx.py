"""Engine trt-rtx: plans of the bundle are found, verified, opened and run; over the double, whose plans run on the CPU."""

from __future__ import annotations

import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorrt_rtx_double as double
from tensorrt_double import CALLS, ExecutionContextAllocationStrategy, called
from trt_helpers import inputs

from export.trt_rtx import build_plans
from fastgen.engines import create_engine, engine_class, engine_names, missing_packages
from fastgen.engines.cache.artifacts import bundled
from fastgen.engines.machine import Gpu
from fastgen.engines.trt import platform
from fastgen.engines.trt.plan import PLAN
from fastgen.errors import InputError
from fastgen.files.jsonfiles import read_json, write_json
from fastgen.models.bundle import Bundle, read_bundle
from fastgen.models.bundle_record import sealed

torch = pytest.importorskip("torch")
pytest_plugins = ("trt_fixtures",)


def build(bundle: Path, **options: Any) -> Bundle:
    return build_plans(read_bundle(bundle), **{"batch_sizes": [4], "dtype": "fp32"} | options)  # type: ignore[arg-type]


@pytest.fixture
def bundle(rtx_card, half_copy) -> Bundle:
    """Plans in fp32 for up to 8 rows."""
    return build(half_copy)


@pytest.fixture
def engine(bundle) -> Any:
    CALLS.clear()
    return create_engine("trt-rtx", bundle, dtype="fp32")


def kernels(tmp_path: Path) -> Path:
    """The one file of compiled kernels."""
    (file,) = (tmp_path / "cache" / "kernels").glob("*.cache")
    return file


def test_the_engine_is_found_by_its_file_and_says_what_it_lacks_without_importing_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "tensorrt_rtx", raising=False)
    assert "trt-rtx" in engine_names()
    assert engine_class("trt-rtx").name == "trt-rtx"
    assert set(missing_packages("trt-rtx")) <= {"torch", "tensorrt_rtx"}


def test_it_computes_what_the_graph_computes_at_any_number_of_rows(engine, bundle):
    reference = create_engine("ort", bundle)
    assert engine.batch_sizes("unet") == range(1, 9)
    for rows in (1, 3, 8):
        values = inputs(bundle, "unet", rows)
        expected = reference.run("unet", *(v.numpy() for v in values))[0]
        np.testing.assert_allclose(engine.run("unet", *values)[0].numpy(), expected, atol=1e-5)
    assert len(called("Runtime.deserialize_cuda_engine")) == 1  # a plan is opened once for all of them


def test_a_guided_image_takes_two_rows_and_batches_are_even(engine):
    assert engine.buckets(guided=True) == range(1, 5)
    assert engine.buckets(guided=False) == range(1, 9)


def test_contexts_compile_for_their_shape_at_once_without_graphs_and_in_memory_for_that_shape(engine, bundle):
    for rows in (3, 2, 8):
        engine.run("unet", *inputs(bundle, "unet", rows))
    strategies = (
        ExecutionContextAllocationStrategy.USER_MANAGED,
        double.CudaGraphStrategy.DISABLED,
        double.DynamicShapesKernelSpecializationStrategy.EAGER,
    )
    assert called("ICudaEngine.create_execution_context") == [strategies] * 3
    memory = called("IExecutionContext.set_device_memory")
    assert memory[0] == memory[1]  # two rows compute where three do
    assert memory[2][1] > memory[0][1]


def test_kernels_are_stored_when_new_ones_were_compiled_and_given_to_the_next_process(engine, bundle, tmp_path):
    engine.run("unet", *inputs(bundle, "unet", 2))
    assert re.fullmatch(
        r"trt-rtx-1\.7\.1\.116-NVIDIA-GeForce-RTX-Double-8\.9-580\.95\.05\.cache", kernels(tmp_path).name
    )
    first = kernels(tmp_path).read_bytes()
    stamp = kernels(tmp_path).stat().st_mtime_ns
    engine.run("unet", *inputs(bundle, "unet", 2))
    assert kernels(tmp_path).stat().st_mtime_ns == stamp
    again: Any = create_engine("trt-rtx", bundle, dtype="fp32")
    again.run("unet", *inputs(bundle, "unet", 2))
    assert len(called("IRuntimeCache.deserialize")) == 1
    assert kernels(tmp_path).stat().st_mtime_ns == stamp  # nothing was new
    again.run("unet", *inputs(bundle, "unet", 3))
    assert len(kernels(tmp_path).read_bytes()) > len(first)
    assert (tmp_path / "cache" / "kernels").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda data: data[:-1] + b"x", "damaged; kernels are compiled anew"),
        (lambda data: b"short", "damaged; kernels are compiled anew"),
        (None, "TensorRT for RTX does not accept these kernels; they are compiled anew"),
    ],
)
def test_kernels_that_are_damaged_or_foreign_are_announced_and_compiled_anew(
    engine, bundle, tmp_path, capsys, monkeypatch, damage, line
):
    values = inputs(bundle, "unet", 2)
    engine.run("unet", *values)
    good = kernels(tmp_path).read_bytes()
    if damage is None:
        monkeypatch.setattr(double.IRuntimeCache, "deserialize", lambda self, blob: False)
    else:
        kernels(tmp_path).write_bytes(damage(good))
    capsys.readouterr()
    create_engine("trt-rtx", bundle, dtype="fp32").run("unet", *values)
    assert capsys.readouterr().err == f"{kernels(tmp_path)}: {line}\n"
    assert kernels(tmp_path).read_bytes() == good


def test_kernels_that_others_can_write_to_are_not_read(engine, bundle, tmp_path):
    engine.run("unet", *inputs(bundle, "unet", 2))
    (tmp_path / "cache" / "kernels").chmod(0o777)
    with pytest.raises(InputError, match="other users can write to this cache"):
        create_engine("trt-rtx", bundle, dtype="fp32").run("unet", *inputs(bundle, "unet", 2))


def test_a_disk_that_refuses_kernels_is_announced_and_pictures_are_made(engine, bundle, monkeypatch, capsys):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastgen.engines.trt_rtx.kernels.write_hashed", full)
    engine.run("unet", *inputs(bundle, "unet", 2))
    assert "are not kept: [Errno 28] No space left" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["text", "labels"])
def test_whole_pictures_through_the_pipeline_equal_those_of_onnxruntime(rtx_card, kind, exports, tmp_path):
    from fastgen.generate.pipeline import load

    folder = shutil.copytree(exports(kind)[0], tmp_path / kind)
    conditions = (
        {"prompts": ["A red dragon", "A blue slime", "A red dragon"]}
        if kind == "text"
        else {"labels": [["gray cube"], ["red cube"], ["red cube"]]}
    )
    build(folder, batch_sizes=[2])
    options: dict[str, Any] = dict(conditions, seeds=[1, 2, 3], num_inference_steps=3, batch_size=2)
    found = [np.asarray(i) for i in load(folder, "trt-rtx", dtype="fp32").generate(**options)]
    expected = [np.asarray(i) for i in load(folder, "ort").generate(**options)]
    assert np.abs(np.stack(found).astype(int) - np.stack(expected).astype(int)).max() <= 1


def test_without_a_precision_it_runs_in_one_that_plans_were_built_in(bundle, half_copy):
    assert create_engine("trt-rtx", bundle).dtype == "fp32"
    assert create_engine("trt-rtx", build(half_copy, dtype="fp16")).dtype == "fp16"


# What does not fit


def test_a_bundle_without_plans_names_the_command(rtx_card, labels):
    with pytest.raises(
        InputError,
        match=r"holds no plan of unet in fp32 for engine trt-rtx; run `fastgen export .* --rtx --dtype fp32`",
    ):
        create_engine("trt-rtx", labels, dtype="fp32").batch_sizes("unet")


def test_more_rows_than_a_plan_takes_name_the_batch_size_that_builds_it(engine, bundle):
    with pytest.raises(
        InputError, match=r"unet for 10 rows: its plan takes 1 to 8; run `fastgen export .* --rtx .* --batch-sizes 5`"
    ):
        engine.run("unet", *inputs(bundle, "unet", 10))


def test_a_card_that_no_plan_is_for_is_named_with_those_that_are_and_the_command(bundle, rtx_card, monkeypatch):
    other = replace(rtx_card, name="NVIDIA RTX PRO", compute_capability="12.1")
    monkeypatch.setattr(platform, "open_gpu", lambda device, product=None: other)
    message = (
        r"holds a plan of unet for compute capabilities 8\.0, 8\.6, 8\.9, 12\.0, not for NVIDIA RTX PRO \(12\.1\); run "
        r"`fastgen export .* --rtx --dtype fp32 --capabilities 8\.0,8\.6,8\.9,12\.0,12\.1`"
    )
    with pytest.raises(InputError, match=message):
        create_engine("trt-rtx", bundle, dtype="fp32").batch_sizes("unet")


def test_a_plan_of_another_version_is_not_run(bundle, monkeypatch):
    monkeypatch.setattr(sys.modules["tensorrt_rtx"], "__version__", "1.8.0.1")
    with pytest.raises(
        InputError, match=r"made by TensorRT for RTX 1\.7\.1\.116; 1\.8\.0\.1 is installed; run `fastgen export"
    ):
        create_engine("trt-rtx", bundle, dtype="fp32").batch_sizes("unet")


@pytest.mark.parametrize(
    ("capability", "kind"), [("7.5", " (Turing)"), ("9.0", " (Hopper)"), ("10.0", " (Blackwell"), ("7.0", ";")]
)
def test_a_card_that_the_product_does_not_know_is_sent_to_trt(bundle, rtx_card, monkeypatch, capability, kind):
    other = replace(rtx_card, name="NVIDIA Other", compute_capability=capability)
    monkeypatch.setattr(platform, "open_gpu", lambda device, product=None: other)
    with pytest.raises(InputError, match="engine trt-rtx does not run on NVIDIA Other") as raised:
        create_engine("trt-rtx", bundle)
    assert f"not for {capability}{kind}" in str(raised.value)
    assert str(raised.value).endswith("; use engine trt")
    assert "\n" not in str(raised.value)


def test_a_driver_too_old_for_the_wheel_is_named(bundle, monkeypatch):
    monkeypatch.setattr(platform, "_wheel_cuda", lambda product: 13)
    monkeypatch.setattr(platform, "driver_cuda", lambda: (12, 8))
    message = r"supports CUDA 12\.8, the installed TensorRT for RTX 1\.7\.1\.116 needs 13: update the driver, or `pip install "
    with pytest.raises(InputError, match=message + "tensorrt-rtx-cu12`"):
        create_engine("trt-rtx", bundle)


def test_without_a_gpu_the_reason_is_named(rtx_card, labels, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="engine trt-rtx needs an NVIDIA GPU: "):
        engine_class("trt-rtx")(labels)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", [PLAN, "artifact.json"])
def test_a_damaged_plan_never_reaches_tensorrt(bundle, name):
    file = bundled(bundle)[0].folder / name
    file.write_bytes(file.read_bytes()[:-1] + b" ")
    with pytest.raises(InputError, match=rf"{name}: .*(altered|damaged)"):
        create_engine("trt-rtx", read_bundle(bundle.folder), dtype="fp32").run("unet", *inputs(bundle, "unet", 2))
    assert called("Runtime.deserialize_cuda_engine") == []


def test_engines_why_finds_the_plans_of_the_bundle_and_tells_what_a_card_lacks(fastgen, bundle, rtx_card, monkeypatch):
    code, out, err = fastgen("engines", "why", bundle.folder, "--engine", "trt-rtx", "--dtype", "fp32")
    assert (code, err) == (0, "")
    assert re.fullmatch(r"unet: batch 8: [0-9a-f]{12}, verified\n", out)
    code, out, err = fastgen(
        "engines", "why", bundle.folder, "--engine", "trt-rtx", "--dtype", "fp32", "--batch-size", 3
    )
    assert code == 0
    other = replace(rtx_card, compute_capability="12.1")
    monkeypatch.setattr(platform, "open_gpu", lambda device, product=None: other)
    code, out, err = fastgen("engines", "why", bundle.folder, "--engine", "trt-rtx", "--dtype", "fp32")
    assert code == 1
    assert "compute_capabilities is 8.0 8.6 8.9 12.0 there, 12.1 here" in out
    assert "--rtx --dtype fp32" in err


# The certificate that is made on the card


def generate(fastgen: Any, bundle: Bundle, out: Path) -> tuple[int, str, str]:
    words = ("generate", "--labels", "gray cube", "--model", bundle.folder, "--engine", "trt-rtx", "--dtype", "fp32")
    return fastgen(*words, "--num-inference-steps", 2, "--out", out)


def test_the_first_generate_on_a_card_certifies_and_the_next_does_not(fastgen, bundle, rtx_card, tmp_path, monkeypatch):
    code, _, err = generate(fastgen, bundle, tmp_path / "a.png")
    assert code == 0, err
    assert "certifying engine trt-rtx fp32 on NVIDIA GeForce RTX Double against eager fp32" in err
    assert "trt-rtx fp32 cpu (NVIDIA GeForce RTX Double): certified" in err
    file = bundle.folder / "certificates" / "trt-rtx-fp32-cpu-NVIDIA-GeForce-RTX-Double.json"
    filed = read_json(file)
    assert (filed["gpu"], filed["passed"], filed["bundle_sha256"]) == (rtx_card.name, True, bundle.sha256)
    assert filed["versions"]["tensorrt_rtx"] == double.VERSION
    code, _, err = generate(fastgen, bundle, tmp_path / "b.png")
    assert (code, "certif" in err) == (0, False)
    other = replace(rtx_card, name="NVIDIA GeForce RTX Other")
    monkeypatch.setattr(platform, "open_gpu", lambda device, product=None: other)
    assert "on NVIDIA GeForce RTX Other against" in generate(fastgen, bundle, tmp_path / "c.png")[2]
    write_json(file, filed | {"bundle_sha256": "0" * 64})
    monkeypatch.setattr(platform, "open_gpu", lambda device, product=None: rtx_card)
    assert "certifying engine" in generate(fastgen, bundle, tmp_path / "d.png")[2]


def test_a_server_certifies_at_its_first_start_on_a_card(bundle):
    from fastgen.cli.certifying import ensure_certified
    from fastgen.serving.worker import WorkerOptions, _load

    options = WorkerOptions(bundle.folder, "m", engine="trt-rtx", dtype="fp32", check=ensure_certified)
    first, second = [], []
    _load(options, first.append)
    _load(options, second.append)
    assert any(line.startswith("certifying engine trt-rtx fp32 on NVIDIA GeForce RTX Double") for line in first)
    assert any("certified" in line for line in first)
    assert not any("certif" in line for line in second)


def test_where_the_bundle_cannot_be_written_the_certificate_goes_into_the_cache(fastgen, bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("fastgen.cli.certifying._writable", lambda folder: False)
    code, _, err = generate(fastgen, bundle, tmp_path / "a.png")
    assert code == 0, err
    (file,) = (tmp_path / "cache" / "certificates" / bundle.sha256).iterdir()
    assert file.name.startswith("trt-rtx-fp32")
    assert "certif" not in generate(fastgen, bundle, tmp_path / "b.png")[2]


def test_a_miss_is_an_error_with_the_table_and_no_picture(fastgen, bundle, tmp_path, monkeypatch):
    execute = double.IExecutionContext.execute_async_v3

    def wrong(self, stream_handle):
        done = execute(self, stream_handle)
        rows = next(iter(self._shapes.values()))[0]
        self._view("out_sample", (rows, 3, 16, 16))[...] *= 1.5
        return done

    monkeypatch.setattr(double.IExecutionContext, "execute_async_v3", wrong)
    code, _, err = generate(fastgen, bundle, tmp_path / "a.png")
    assert code == 1
    assert "MISS unet" in err
    assert err.splitlines()[-1].startswith(
        "fastgen: error: not certified: engine trt-rtx fp32 on NVIDIA GeForce RTX Double"
    )
    assert not (tmp_path / "a.png").exists()
    monkeypatch.setattr(double.IExecutionContext, "execute_async_v3", execute)
    assert generate(fastgen, bundle, tmp_path / "a.png")[0] == 0  # a miss is no certificate


def test_a_bundle_that_cannot_say_how_far_eager_moves_names_the_export(fastgen, bundle, half_copy, tmp_path):
    held = build(half_copy, dtype="fp16")
    manifest = read_json(half_copy / "bundle.json")
    manifest["files"].pop("reference.fp16.json")
    write_json(half_copy / "bundle.json", sealed(manifest))
    words = ("generate", "--labels", "gray cube", "--model", held.folder, "--engine", "trt-rtx", "--dtype", "fp16")
    code, _, err = fastgen(*words, "--out", tmp_path / "a.png")
    assert code == 2
    assert re.search(r"does not say how far eager itself moves in fp16; `fastgen export MODEL .* --dtype fp16`", err)


# The engine that runs when none was asked for


@pytest.mark.parametrize(
    ("cards", "device", "chosen"),
    [
        (["8.9"], None, "trt-rtx"),
        (["8.9"], "cuda", "trt-rtx"),
        (["8.9"], "cpu", "openvino"),
        (["9.0"], "cuda", "ort"),
        ([], None, "openvino"),
    ],
)
def test_it_is_the_default_where_the_bundle_has_plans_and_a_card_for_them_is_here(
    bundle, monkeypatch, cards, device, chosen
):
    from fastgen.engines import machine
    from fastgen.engines.choose import default_engine

    found = [Gpu("NVIDIA", 24000, card) for card in cards]
    monkeypatch.setattr(machine, "gpus", lambda: (found, machine.Driver("580.95.05", "13.0")))
    assert default_engine(bundle.folder, device) == chosen


def test_a_bundle_without_plans_is_not_given_to_it(rtx_card, label_bundle, monkeypatch):
    from fastgen.engines import machine
    from fastgen.engines.choose import default_engine

    monkeypatch.setattr(machine, "gpus", lambda: ([Gpu("NVIDIA", 24000, "8.9")], machine.Driver("580.95.05", "13.0")))
    assert default_engine(label_bundle) != "trt-rtx"
