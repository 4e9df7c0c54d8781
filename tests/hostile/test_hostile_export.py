"""`fastgen export` where its output is somebody else's, and of bundles that lie."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attacks import LONGEST, Attack, shown, snapshot
from bundle_edits import RECORD, Edit, forged, link, set_path, then, write

from fastgen.generate.job_record import BUNDLE

REFERENCE, DISTANCES = "reference.safetensors", "reference.bf16.json"
EXPORT = ["export", "model", "--out"]


def make(name: str, content: bytes | None = None) -> Edit:
    """Make a file, or without content a folder."""

    def edit(workspace: Path) -> None:
        path = workspace / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if content is None else path.write_bytes(content)

    return edit


def pipe(name: str) -> Edit:
    return lambda workspace: os.mkfifo(workspace / name)


def dangling(name: str) -> Edit:
    return lambda workspace: (workspace / name).symlink_to("nowhere")


OUTPUTS: list[tuple[list[str], Edit, str]] = [
    ([*EXPORT, "out"], make("out", b"mine"), "not a folder"),
    ([*EXPORT, "out/below"], make("out", b"mine"), "not a folder"),
    ([*EXPORT, "out"], make("out/photo.png", b"mine"), "not a bundle"),
    ([*EXPORT, "out"], make("out/sub/photo.png", b"mine"), "not a bundle"),
    ([*EXPORT, "out"], make("out/.hidden", b"mine"), "not a bundle"),
    ([*EXPORT, "out"], pipe("out"), "not a folder"),
    ([*EXPORT, "out"], dangling("out"), "not a folder"),
    ([*EXPORT, "model"], lambda w: None, "not a bundle"),
    ([*EXPORT, "model/unet"], lambda w: None, "not a bundle"),
    ([*EXPORT, "model/model_index.json"], lambda w: None, "not a folder"),
    ([*EXPORT, "."], lambda w: None, "not a bundle"),
    ([*EXPORT, "out"], make("out/bundle.json", b"{}"), "format_version"),
    ([*EXPORT, "out"], make("out/bundle.json", b"not JSON"), "malformed"),
    ([*EXPORT, "out", "--overwrite"], make("out/photo.png", b"mine"), "not a bundle"),
    ([*EXPORT, "out", "--overwrite"], make("out", b"mine"), "not a folder"),
    ([*EXPORT, "model", "--overwrite"], lambda w: None, "not a bundle"),
    (
        [*EXPORT, "out", "--overwrite"],
        then(make("out/bundle.json", b"{}"), make("out/photo.png", b"mine")),
        "photo.png",
    ),
    (
        [*EXPORT, "out", "--overwrite"],
        then(make("out/bundle.json", b"{}"), make("out/unet/notes.txt", b"mine")),
        "notes.txt",
    ),
    (
        [*EXPORT, "out", "--overwrite"],
        then(make("out/bundle.json", b"{}"), make("out/unet/diffusion_pytorch_model.safetensors", b"mine")),
        "diffusion_pytorch_model.safetensors",
    ),
    ([*EXPORT, "model", "--overwrite"], make("model/bundle.json", b"{}"), "format_version"),
    ([*EXPORT, ""], lambda w: None, "empty"),
    ([*EXPORT, "x" * 300], lambda w: None, "--out"),
    ([*EXPORT, "x/" * 3000], lambda w: None, "--out"),
]
OPTIONS: list[tuple[list[str], str]] = [
    *(
        (["--solver", value], "solver")
        for value in (
            "",
            "nonsense",
            "ddim",
            "ddim:",
            ":5",
            "ddim:0",
            "ddim:-1",
            "ddim:1e3",
            "ddim:5.0",
            "ddim:five",
            "ddim:99999999",
            "ddim:" + "9" * 5000,
            "ddim:5:9",
            "ddim:5:0",
            "ddim:5:5:5",
            "d" * 10_000 + ":5",
            "ddim:\u0665",
            "ddim\n:5",
        )
    ),
    (["--solver", "dimm:5"], "ddim"),
    *(
        (["--rtx", "--batch-sizes", value], "--batch-sizes")
        for value in ("0", "nonsense", "1,,2", "-1", "9" * 30, "1.5", "", "1;8")
    ),
    (["--batch-sizes", "1,8"], "--trt"),
    *((["--dtype", value], "dtype") for value in ("nonsense", "FP16", "int4", "float16")),
    *((["--engine", value], "engine") for value in ("", "nonsense", "ort:int4", "eager", ":fp32", "ortt")),
    (["--capabilities", "8.6"], "--rtx"),
]


@pytest.mark.parametrize(("argv", "edit", "word"), OUTPUTS, ids=shown(40))
def test_an_output_that_is_somebody_elses_is_left_alone(argv, edit, word, refused, label_model):
    refused(Attack(" ".join(argv)[:60], argv, word, edit), model=label_model)


@pytest.mark.parametrize(("options", "word"), OPTIONS, ids=lambda value: str(value)[:40])
def test_options_out_of_bounds_are_refused(options, word, refused, label_model):
    refused(Attack(str(options)[:60], [*EXPORT, "out", *options], word), model=label_model)


def reference(change: Callable[[dict[str, np.ndarray]], object]) -> Edit:
    """Change the tensors of the reference."""

    def edit(workspace: Path) -> None:
        from safetensors.numpy import load_file, save_file

        tensors = load_file(workspace / "bundle" / REFERENCE)
        change(tensors)
        save_file(tensors, workspace / "bundle" / REFERENCE)

    return forged(edit)


def put(name: str, value: np.ndarray) -> Edit:
    return reference(lambda tensors: tensors.update({name: value}))


ORT, OPENVINO = ["--engine", "ort"], ["--engine", "openvino:bf16"]
LYING: list[tuple[str, list[str], Edit, str]] = [
    ("no reference", ORT, forged(write(REFERENCE, b"")), "cannot be read"),
    ("a huge header", ORT, forged(write(REFERENCE, b"\xff" * 7 + b"\x7f" + b"{}")), "cannot be read"),
    ("a header that is no JSON", ORT, forged(write(REFERENCE, b"\x08" + bytes(7) + b"not json")), "cannot be read"),
    ("another file", ORT, write(REFERENCE, b"x"), "truncated or replaced"),
    ("not listed", ORT, set_path("files", {}), "record_sha256"),
    ("no tensors", ORT, reference(lambda tensors: tensors.clear()), "is missing"),
    ("no images", ORT, reference(lambda tensors: tensors.pop("latents.5")), "latents.5 is missing"),
    ("too few images", ORT, put("latents.5", np.zeros((1, 3, 16, 16), np.float32)), "latents.5: found"),
    ("other numbers", ORT, put("latents.5", np.zeros((8, 3, 16, 16), np.float64)), "latents.5: found"),
    ("NaN", ORT, put("latents.5", np.full((8, 3, 16, 16), np.nan, np.float32)), "not finite"),
    ("one number", ORT, put("unet.sample", np.ones((), np.float32)), "unet.sample"),
    ("other rows", ORT, put("unet.timestep", np.zeros(5, np.float32)), "unet.timestep"),
    ("another width", ORT, put("unet.class_labels", np.zeros((32, 9), np.float32)), "unet.class_labels"),
    *(
        (f"distances {text[:20]}", OPENVINO, forged(write(DISTANCES, text)), "reference.bf16.json")
        for text in (
            b"",
            b"[]",
            b"{}",
            b'{"dtype": "bf16", "device": "cpu", "versions": {}, "relative_l2": {}}',
            b'{"dtype": "bf16", "device": "cpu", "versions": {}, "relative_l2": {"unet": "0"}}',
            b'{"dtype": "bf16", "device": "cpu", "versions": {}, "relative_l2": {"unet": -1}}',
            b'{"dtype": "bf16", "device": 3, "versions": {}, "relative_l2": {"unet": 1}}',
        )
    ),
    ("certificates elsewhere", ORT, link("certificates", "../moved"), "symlink"),
]


@pytest.mark.parametrize(("name", "options", "edit", "word"), LYING, ids=[row[0] for row in LYING])
def test_a_bundle_whose_proof_lies_is_not_certified(name, options, edit, word, fork_server, label_bundle, tmp_path):
    shutil.copytree(label_bundle, tmp_path / "bundle")
    edit(tmp_path)
    before = {name: data for name, data in snapshot(tmp_path).items() if not name.startswith("bundle/certificates")}
    command = ["export", "bundle", "--out", "bundle", *options]
    outcome = fork_server.run(command, tmp_path, {"FASTGEN_CACHE": str(tmp_path.with_name("cache-of-its-own"))})
    assert outcome.code == 2, outcome
    *progress, line = outcome.stderr.splitlines()
    if options == OPENVINO and "this CPU has no bf16" in line:
        pytest.skip("this CPU has no bf16")
    assert line.startswith("fastgen: error: bundle/")
    assert word in line
    assert len(line) <= LONGEST
    assert all(said.startswith("certifying ") for said in progress)
    after = {name: data for name, data in snapshot(tmp_path).items() if not name.startswith("bundle/certificates")}
    assert after == before


def test_a_bundle_is_replaced_when_all_of_its_files_are_an_export_s(label_bundle, tmp_path):
    from export.extend import check_replaceable

    shutil.copytree(label_bundle, tmp_path / "bundle")
    check_replaceable(tmp_path / "bundle")


def test_a_sweep_after_a_killed_export_removes_no_file_of_others(label_bundle, tmp_path):
    from export.extend import sweep
    from fastgen.models.bundle import read_bundle

    bundle = shutil.copytree(label_bundle, tmp_path / "bundle")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "model.onnx").write_bytes(b"mine")
    (bundle / "vae_decoder").symlink_to("../elsewhere")
    mine = ["unet/model.safetensors", "unet/model.txt", "reference.txt", "trt-rtx/notes/engine.plan", "notes.txt"]
    for name in mine:
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        (bundle / name).write_bytes(b"mine")
    left = [
        "unet/model.fp16.onnx",
        "unet/model.bf16.ort.onnx",
        "reference.fp16.json",
        f"trt-rtx/{'0' * 64}/engine.plan",
    ]
    for name in left:
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        (bundle / name).write_bytes(b"half")
    sweep(read_bundle(bundle))
    assert all((bundle / name).read_bytes() == b"mine" for name in mine)
    assert (tmp_path / "elsewhere" / "model.onnx").read_bytes() == b"mine"
    assert not any((bundle / name).exists() for name in left)


JOB = [
    "generate",
    "requests.json",
    "--model",
    "bundle",
    "--engine",
    "ort",
    "--out",
    "out",
    "--num-inference-steps",
    "1",
]


def job(workspace: Path, server: Any, label_bundle: Path) -> Callable[[], Any]:
    shutil.copytree(label_bundle, workspace / "bundle")
    (workspace / "requests.json").write_text('[["red cube"], ["blue sphere"]]')
    return lambda: server.run(JOB, workspace, {"FASTGEN_CACHE": str(workspace / "cache")})


def test_images_and_jobs_say_which_bundle_made_them(fork_server, label_bundle, tmp_path):
    from fastgen.files.png import read_metadata

    run = job(tmp_path, fork_server, label_bundle)
    assert run().code == 0
    digest = json.loads((tmp_path / RECORD).read_text())["record_sha256"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert [line[BUNDLE] for line in lines] == [digest] * 2
    assert json.loads((tmp_path / "out" / "job.json").read_text())["job"][BUNDLE] == digest
    assert (read_metadata(tmp_path / "out" / "0.png") or {})[BUNDLE] == digest
    shown = fork_server.run(["doctor", "bundle"], tmp_path, {})
    assert f"digest     {digest}, verified" in shown.stdout
    assert json.loads(fork_server.run(["doctor", "bundle", "--json"], tmp_path, {}).stdout)[BUNDLE] == digest


def test_a_job_of_an_older_version_or_of_the_bundle_before_files_were_added_is_continued(
    fork_server, label_bundle, tmp_path
):
    from export.extend import add_files
    from fastgen.models.bundle import read_bundle

    run = job(tmp_path, fork_server, label_bundle)
    assert run().code == 0
    record = json.loads((tmp_path / "out" / "job.json").read_text())
    del record["job"][BUNDLE]
    (tmp_path / "out" / "job.json").write_text(json.dumps(record))
    (tmp_path / "out" / "1.png").unlink()
    assert run().code == 0
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / "reference.fp16.json").write_text("{}")
    before = read_bundle(tmp_path / "bundle").spec.bundle_sha256
    add_files(read_bundle(tmp_path / "bundle"), tmp_path / "partial")
    assert read_bundle(tmp_path / "bundle").spec.bundle_extends == (before,)
    (tmp_path / "out" / "1.png").unlink()
    assert run().code == 0
    forged(set_path("versions.torch", "0.1"))(tmp_path)
    outcome = run()
    assert outcome.code == 2
    assert "holds another job: bundle_sha256 is" in outcome.stderr


PLAN = f"trt-rtx/{'0' * 64}"


def plan(record: bytes, folder: str = PLAN) -> Edit:
    """Add a compiled network with this record to the bundle, under right hashes."""
    entry = {"bytes": 0, "sha256": "0" * 64}
    listed = [set_path(f"files.{folder}/{name}", entry) for name in ("artifact~json", "engine~plan")]
    files = [make(f"bundle/{folder}/engine.plan", b"plan"), write(f"{folder}/artifact.json", record)]
    return forged(*listed, *files)


def record(**changes: Any) -> bytes:
    fields = {"network": "unet", "batch": 8, "dtype": "fp16"}
    value = {
        "format": 1,
        "engine": "trt-rtx",
        "fields": fields,
        "build_seconds": 1.0,
        "built": "2026-01-01T00:00:00+00:00",
    }
    value["files"] = {"engine.plan": {"bytes": 4, "sha256": "0" * 64}}
    return json.dumps(value | changes).encode()


@pytest.mark.parametrize(
    ("edit", "word"),
    [
        (plan(b""), "artifact.json"),
        (plan(b"[]"), "artifact.json"),
        (plan(b"{}"), "artifact.json"),
        (plan(record(engine="trt")), "made for other fields"),
        (plan(record()), "made for other fields"),
        (plan(record(fields={"batch": "8"})), "batch"),
        (plan(record(files={"../../bundle.json": {"bytes": 1, "sha256": "0" * 64}})), "files"),
        (plan(record(files=3)), "files"),
        (plan(record(built=3)), "built"),
        (plan(record(), "trt-rtx/address"), "made for other fields"),
        (set_path("sampling.guidance_scale", 9.0), "changed after the export"),
        (write("vae_decoder.txt", b""), ""),
        (write(DISTANCES, b"{}"), "truncated or replaced"),
        (write("unet/model.ort.onnx", b"{}"), "truncated or replaced"),
        (forged(write("unet/model.ort.onnx", b"{}")), "ONNX graph"),
        (write("certificates/ort-fp32-cpu.json", b"{}"), ""),
    ],
    ids=shown(40),
)
def test_doctor_verifies_every_file_of_a_bundle(edit, word, fork_server, label_bundle, tmp_path):
    shutil.copytree(label_bundle, tmp_path / "bundle")
    edit(tmp_path)
    outcome = fork_server.run(["doctor", "bundle"], tmp_path, {})
    assert outcome.code == (2 if word else 0), outcome
    assert word in outcome.stderr
    assert len(outcome.stderr.splitlines()) == bool(word)
