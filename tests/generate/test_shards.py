"""A job split over processes writes what one process writes, with one manifest."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgen.errors import InputError
from fastgen.generate.job import run_job
from fastgen.generate.pipeline import load
from fastgen.generate.requests import read_requests
from fastgen.generate.run import Run
from fastgen.generate.shards import Shard, parse_devices


@pytest.fixture(scope="module")
def pipeline(label_bundle):
    return load(label_bundle, "ort")


@pytest.fixture(scope="module")
def requests_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("requests") / "requests.json"
    objects = ["red cube", "blue sphere", "gray cylinder"]
    file.write_text(json.dumps([objects[: 1 + i % 3] for i in range(11)]))
    return file


def files(out):
    return {f.relative_to(out).as_posix(): f.read_bytes() for f in sorted(out.rglob("*")) if f.is_file()}


def start(pipeline, requests_file, out, shard=None):
    return run_job(Run(pipeline, read_requests(requests_file), pipeline.settings()), out, batch_size=2, shard=shard)


@given(count=st.integers(0, 50), shards=st.integers(1, 9))
def test_parts_are_all_items_once_each(count, shards):
    parts = [Shard(i, shards).part(range(count)) for i in range(1, shards + 1)]
    assert sorted(item for part in parts for item in part) == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "1/0", "-1/2", "a/b", "1/2/3", "1 / 2"])
def test_a_malformed_shard_is_one_line(text):
    with pytest.raises(InputError, match="expected I/N"):
        Shard.parse(text)


def test_devices_are_numbers_or_names():
    assert parse_devices("0,1") == ["cuda:0", "cuda:1"]
    assert parse_devices("cpu, cuda:3") == ["cpu", "cuda:3"]
    with pytest.raises(InputError, match="found '', expected cpu, cuda"):
        parse_devices("0,,1")


def test_shards_in_any_order_make_the_whole_job(pipeline, requests_file, tmp_path):
    start(pipeline, requests_file, tmp_path / "one")
    expected = files(tmp_path / "one")
    out = tmp_path / "parts"
    for i, index in enumerate([3, 1, 2]):
        report = start(pipeline, requests_file, out, Shard(index, 3))
        assert report.complete == (i == 2)
        assert (out / "manifest.jsonl").exists() == (i == 2)
    found = files(out)
    runs = json.loads(found.pop("job.json"))["runs"]
    del expected["job.json"]
    assert found == expected
    assert sorted(run["images"] for run in runs) == [3, 4, 4]


def test_folders_of_several_machines_are_put_together_by_the_plain_command(pipeline, requests_file, tmp_path):
    for index in (1, 2):
        start(pipeline, requests_file, tmp_path / f"machine-{index}", Shard(index, 2))
    out = tmp_path / "together"
    subprocess.run(["cp", "-r", tmp_path / "machine-1", out], check=True)
    subprocess.run(["cp", "-r", f"{tmp_path / 'machine-2'}/.", out], check=True)
    report = start(pipeline, requests_file, out)
    assert (report.generated, report.complete) == (0, True)
    start(pipeline, requests_file, tmp_path / "one")
    expected, found = files(tmp_path / "one"), files(out)
    del expected["job.json"], found["job.json"]
    assert found == expected


def test_several_devices_from_the_command_line(fastgen_process, label_bundle, requests_file, pipeline, tmp_path):
    arguments = ["generate", requests_file, "--model", label_bundle, "--engine", "ort", "--batch-size", 2]
    done = fastgen_process(*arguments, "--out", tmp_path / "two", "--devices", "cpu,cpu")
    assert done.returncode == 0, done.stderr
    assert "shard 1/2: 6 images, 6 generated" in done.stdout
    assert "shard 2/2: 5 images, 5 generated" in done.stdout
    start(pipeline, requests_file, tmp_path / "one")
    expected, found = files(tmp_path / "one"), files(tmp_path / "two")
    del expected["job.json"], found["job.json"]
    assert found == expected


@pytest.fixture
def one_gpu(tmp_path, monkeypatch):
    """An nvidia-smi that lists one GPU, which the engine of these tests cannot use."""
    script = tmp_path / "bin" / "nvidia-smi"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\necho 'Card, 1000 MiB, 550.0, 8.9'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")


@pytest.mark.usefixtures("one_gpu")
def test_a_device_that_refuses_fails_and_the_others_files_stay(fastgen_process, label_bundle, requests_file, tmp_path):
    arguments = ["generate", requests_file, "--model", label_bundle, "--engine", "ort", "--out", tmp_path / "out"]
    done = fastgen_process(*arguments, "--batch-size", 2, "--devices", "cpu,cuda")
    assert done.returncode == 1
    assert "failed on cuda (this onnxruntime is built for the CPU alone" in done.stderr
    assert done.stderr.endswith("; the same command continues with what is missing\n")
    assert done.stderr.count("fastgen: error: ") == 1
    assert len(list((tmp_path / "out").glob("[0-9]*.png"))) == 6
    assert not (tmp_path / "out" / "manifest.jsonl").exists()


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize(
    ("devices", "words"), [("cuda:1", "found cuda:1"), ("cuda", "this onnxruntime"), ("nope", "'nope'")]
)
def test_devices_that_all_refuse_are_one_line(fastgen_process, label_bundle, requests_file, tmp_path, devices, words):
    arguments = ["generate", requests_file, "--model", label_bundle, "--engine", "ort", "--out", tmp_path / "out"]
    done = fastgen_process(*arguments, "--devices", devices)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert words in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("other", [["--device", "cpu"], ["--shard", "1/2"]])
def test_devices_choose_shard_and_device_themselves(fastgen_process, label_bundle, requests_file, other):
    done = fastgen_process("generate", requests_file, "--model", label_bundle, "--devices", "cpu,cpu", *other)
    assert done.returncode == 2
    assert f"--devices chooses {other[0]} itself" in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_a_killed_shard_continues_to_the_same_job(
    command, fastgen_process, label_bundle, requests_file, pipeline, tmp_path
):
    out = tmp_path / "out"
    options = ["--engine", "ort", "--num-inference-steps", 150, "--batch-size", 2, "--threads", 1, "--out", out]
    arguments = ["generate", requests_file, "--model", label_bundle, *options]
    line, environment = command(*arguments, "--shard", "1/2")
    process = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until = time.monotonic() + 60
    while len(list(out.glob("[0-9]*.png"))) < 2 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert fastgen_process(*arguments, "--shard", "2/2").returncode == 0
    assert not (out / "manifest.jsonl").exists()
    assert fastgen_process(*arguments, "--shard", "1/2").returncode == 0
    assert len((out / "manifest.jsonl").read_text().splitlines()) == 11
    assert not list(out.glob("shard-*")) + list(out.glob(".*.tmp")) + list(out.glob(".merge*"))
