"""An export is whole or not there, reproducible byte for byte, and never replaces a bundle unasked."""

from __future__ import annotations

import hashlib
import json
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
onnxruntime = pytest.importorskip("onnxruntime")

from solver_steps import TABLE_STEPS  # noqa: E402

import fastgen.models.bundle  # noqa: E402
from export.bundle import export  # noqa: E402
from fastgen.errors import FastgenError, InputError  # noqa: E402
from fastgen.files.jsonfiles import read_json, write_json  # noqa: E402
from fastgen.models.bundle_record import sealed  # noqa: E402

EXPORT_FEW = f"""
import fastgen.sampling.compile
fastgen.sampling.compile.COMMON_STEPS = {TABLE_STEPS}
from fastgen.cli import main
main()
"""


def contents(folder):
    files = (f for f in sorted(folder.rglob("*")) if f.is_file())
    return {f.relative_to(folder).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def edit(file, **changes):
    write_json(file, read_json(file) | changes)


@pytest.fixture
def model(label_model, tmp_path):
    return shutil.copytree(label_model, tmp_path / "model")


@pytest.fixture
def bundle(label_bundle, tmp_path):
    return shutil.copytree(label_bundle, tmp_path / "bundle")


@pytest.mark.parametrize("kind", ["text", "labels"])
def test_bundle_json_lists_every_other_file_with_its_size_and_hash(exports, kind):
    bundle = exports(kind)[0]
    listed = json.loads((bundle / "bundle.json").read_text())["files"]
    found = {name: sha for name, sha in contents(bundle).items() if not name.startswith("certificates/")}
    del found["bundle.json"]
    assert {name: entry["sha256"] for name, entry in listed.items()} == found
    assert all(entry["bytes"] == (bundle / name).stat().st_size for name, entry in listed.items())


@pytest.mark.parametrize("kind", ["text", "labels"])
def test_no_file_holds_a_path_of_the_machine_or_a_mode_of_its_own(exports, kind, text_model, tmp_path):
    bundle = exports(kind)[0]
    (tmp_path / "ordinary").write_bytes(b"")
    own = re.compile("|".join(map(re.escape, [str(Path(__file__).parents[2]), sys.prefix, str(text_model.parents[1])])))
    for file in (f for f in bundle.rglob("*") if f.is_file()):
        text = file.read_bytes().decode("latin-1")
        assert not own.search(text), file
        assert not re.search(r"/(home|root|usr|Users|site-packages)/", text), file
        assert file.stat().st_mode == (tmp_path / "ordinary").stat().st_mode, file


def test_the_same_export_again_changes_nothing_but_certifies(fastgen, model, bundle):
    before = contents(bundle)
    stamps = {f: f.stat().st_mtime_ns for f in bundle.rglob("*") if f.is_file() and f.parent.name != "certificates"}
    code, out, err = fastgen("export", model, "--out", bundle, "--engine", "ort")
    assert code == 0, err
    assert "holds these weights already" in err
    assert "ort fp32 cpu: certified" in out
    assert contents(bundle) == before
    assert {f: f.stat().st_mtime_ns for f in stamps} == stamps


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda m: scale_weights(m), "sha256"),
        (lambda m: edit(m / "scheduler" / "scheduler_config.json", beta_end=0.03), "scheduler_config"),
        (lambda m: edit(m / "unet" / "config.json", norm_eps=1e-3), "unet/config.json"),
        (lambda m: edit(m / "fastgen.json", sampling={"scheduler": "ddim", "num_inference_steps": 9}), "sampling"),
        (lambda m: edit(m / "conditioner" / "config.json", note="other"), "conditioner/config.json"),
    ],
)
def test_another_model_s_bundle_is_not_replaced_unasked(fastgen, model, bundle, change, field):
    before = contents(bundle)
    if field == "conditioner/config.json":  # a key that the conditioner itself would refuse
        edit(bundle / "conditioner" / "config.json", dim=32)
        manifest = read_json(bundle / "bundle.json")
        manifest["files"]["conditioner/config.json"]["sha256"] = "0" * 64
        write_json(bundle / "bundle.json", sealed(manifest))
        before = contents(bundle)
    else:
        change(model)
    code, out, err = fastgen("export", model, "--out", bundle)
    assert (code, out) == (2, "")
    assert err.startswith(f"fastgen: error: {bundle}: holds another bundle (")
    assert field in err
    assert "--overwrite" in err
    assert contents(bundle) == before


def scale_weights(model):
    from safetensors.torch import load_file, save_file

    file = model / "conditioner" / "model.safetensors"
    save_file({key: value * 1.01 for key, value in load_file(file).items()}, file)


def test_a_bundle_without_an_asked_for_solver_is_not_replaced_unasked(model, bundle):
    with pytest.raises(InputError, match="holds a bundle without solver ddim:33; --overwrite exports it again"):
        export(model, bundle, solvers=["ddim:5", "ddim:33"])


def test_a_folder_with_something_else_in_it_is_left_alone(model, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "mine", model, tmp_path / "file"):
        with pytest.raises(InputError, match=r"exists and is not a bundle|file: is not a folder"):
            export(model, out)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"engines": ["tensor"]}, "unknown engine 'tensor'"),
        ({"engines": ["eager"]}, "engine eager runs model folders and is the reference itself"),
        ({"solvers": ["ddim"]}, "solver 'ddim' is not NAME:STEPS"),
        ({"solvers": ["ddim:0"]}, "solver 'ddim:0' is not NAME:STEPS"),
        ({"solvers": ["dimm:5"]}, "unknown scheduler 'dimm'; did you mean 'ddim'?"),
        ({"engines": ["ort:bf16"]}, "engine ort executes fp32, fp16, int8, not bf16"),
        ({"dtype": "fp64"}, "unknown dtype 'fp64'"),
        ({"dtype": "fp8"}, "--dtype fp8 is for TensorRT engines; give --trt or --rtx too"),
        ({"trt": True, "batch_sizes": []}, "batch sizes are [], expected one or more positive integers"),
        ({"trt": True, "batch_sizes": [8, 0]}, "batch sizes are [8, 0], expected one or more positive integers"),
    ],
)
def test_wrong_options_are_found_before_the_networks_are_exported_and_leave_nothing(
    model, tmp_path, export_few, monkeypatch, options, words
):
    monkeypatch.setattr("export.onnx.export_onnx", lambda *arguments: pytest.fail("exported first"))
    with pytest.raises(InputError) as error:
        export_few(model, tmp_path / "out", **options)
    assert words in str(error.value)
    assert [f.name for f in tmp_path.iterdir()] == ["model"]


def test_a_bundle_is_no_model_folder_for_another_bundle(bundle, tmp_path):
    with pytest.raises(InputError, match="is a bundle already"):
        export(bundle, tmp_path / "other")


def test_every_file_of_a_bundle_is_verified_once_for_all_engines(bundle, monkeypatch):
    check, verified = fastgen.models.bundle.check_file, []
    monkeypatch.setattr(
        fastgen.models.bundle, "check_file", lambda path, *rest: (verified.append(path), check(path, *rest))
    )
    assert len(export(bundle, bundle, engines=["ort", "openvino"])) == 2
    assert {"model.onnx", "reference.safetensors"} < {path.name for path in verified}
    assert len(verified) == len(set(verified))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), FastgenError("unet: cannot be exported")])
def test_a_failed_export_leaves_the_old_bundle_and_nothing_else(model, bundle, monkeypatch, error):
    def fail(*arguments):
        raise error

    edit(model / "scheduler" / "scheduler_config.json", beta_end=0.03)
    old = contents(bundle)
    monkeypatch.setattr("export.write.write_tables", lambda *arguments: None)
    monkeypatch.setattr("export.onnx.export_onnx", fail)
    with pytest.raises(FastgenError, match=r"No space left on device|cannot be exported"):
        export(model, bundle, overwrite=True)
    assert contents(bundle) == old
    assert sorted(f.name for f in bundle.parent.iterdir()) == ["bundle", "model"]


@pytest.mark.slow
def test_a_killed_export_leaves_the_old_bundle_and_the_next_one_equals_an_undisturbed_one(
    label_model, label_bundle, tmp_path
):
    """The old bundle stays whole under its name; the new one comes from another process, byte for byte the same."""
    out = tmp_path / "certificates" / "bundle"  # a folder name that means something inside a bundle
    shutil.copytree(label_bundle, out)
    edit(out / "bundle.json", source_sha256="0" * 64)
    old = contents(out)
    command = [sys.executable, "-c", EXPORT_FEW, "export", str(label_model), "--out", str(out), "--overwrite"]

    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    graph, until = ".bundle.*.tmp/new/unet/model.onnx", time.monotonic() + 120
    while not list(out.parent.glob(graph)) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert list(out.parent.glob(graph))
    assert contents(out) == old

    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found, expected = contents(out), contents(label_bundle)
    certificates = [name for name in found if name.startswith("certificates/")]  # measured figures
    assert len(certificates) == 2
    for name in certificates:
        assert read_json(out / name)["passed"]
        del found[name], expected[name]
    assert found == expected
    assert [f.name for f in out.parent.iterdir()] == ["bundle"]


def test_a_tokenizer_without_tokenizer_json_gets_one(text_model, tmp_path, monkeypatch):
    """As in Stable Diffusion 1.x: vocab.json and merges.txt alone."""
    from transformers import CLIPTokenizer

    from export import write
    from export.options import BundleOptions
    from fastgen.models.folder import load_model
    from fastgen.models.tokenizer import Tokenizer

    folder = shutil.copytree(text_model, tmp_path / "model")
    (folder / "tokenizer" / "tokenizer.json").unlink()
    for name in ("write_tables", "write_reference", "write_distances"):
        monkeypatch.setattr(f"export.write.{name}", lambda *arguments: None)
    monkeypatch.setattr("export.onnx.export_onnx", lambda *arguments: None)
    write._fill(
        tmp_path / "partial",
        tmp_path / "out",
        load_model(folder),
        write.Source(folder, {}),
        BundleOptions(),
        print,
    )
    prompts = ["A red dragon", "crème brûlée 🐉", "", "word " * 90]
    expected = CLIPTokenizer.from_pretrained(folder / "tokenizer")(
        prompts, padding="max_length", max_length=77, truncation=True
    ).input_ids
    assert Tokenizer.from_folder(tmp_path / "partial" / "tokenizer", 77, 1000).encode(prompts)[0].tolist() == expected


def test_a_concatenating_label_model_exports_too(tmp_path):
    from diffusers import UNet2DModel

    from export.onnx import export_onnx
    from fastgen.models.condition import CLASS, Condition
    from fastgen.models.networks.denoiser import Denoiser
    from fastgen.models.networks.labels import LabelConditioner
    from fastgen.models.signatures import model_signatures
    from fastgen.models.space import Space

    torch.manual_seed(0)
    unet: Any = UNet2DModel(
        sample_size=16,
        in_channels=3 + 5,
        out_channels=3,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    network = Denoiser(unet, [CLASS], LabelConditioner("concat", 24, 5, hidden=7)).eval()
    condition = Condition(labels={str(i): i for i in range(24)})
    signature = model_signatures(condition, Space((3, 16, 16), (3, 16, 16), latent=False))["unet"]
    export_onnx(network, signature, tmp_path / "unet" / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "unet" / "model.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        inputs = signature.sample_inputs(batch, np.random.default_rng(batch))
        with torch.inference_mode():
            expected = network(*map(torch.from_numpy, inputs.values())).numpy()
        assert np.abs(session.run(None, inputs)[0] - expected).max() < 1e-5
