"""Kills, interrupts and full disks: whole files stay, nothing partial appears, and the same command continues."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from killed import leftover
from PIL import Image

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")

EAGER = pytest.param("eager", marks=pytest.mark.slow)  # three times the seconds that importing torch takes
COUNT = 12
STEPS = {"ort": 150, "openvino": 150, "eager": 20}  # a batch takes about 0.2 s


@pytest.fixture(scope="module")
def requests_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("requests") / "requests.json"
    objects = ["red cube", "blue sphere", "gray cylinder"]
    file.write_text(json.dumps([objects[: 1 + i % 3] for i in range(COUNT)]))
    return file


@pytest.fixture(scope="module")
def arguments(request, requests_file):
    """(engine) -> arguments of a job that takes a few seconds."""

    def build(engine, out):
        model = request.getfixturevalue("label_model" if engine == "eager" else "label_bundle")
        options = ["--engine", engine, "--num-inference-steps", STEPS[engine], "--batch-size", 2, "--threads", 1]
        return ["generate", requests_file, "--model", model, *options, "--out", out]

    return build


@pytest.fixture(scope="module")
def undisturbed(arguments, fastgen_process, tmp_path_factory):
    """(engine) -> the folder of the job when nothing happens to it."""
    folders = {}

    def get(engine):
        if engine not in folders:
            folders[engine] = tmp_path_factory.mktemp("undisturbed") / engine
            done = fastgen_process(*arguments(engine, folders[engine]))
            assert done.returncode == 0, done.stderr
        return folders[engine]

    return get


def pictures(out):
    return sorted(out.glob("[0-9]*.png"), key=lambda f: int(f.stem))


def files(out):
    return {f.name: f.read_bytes() for f in out.iterdir() if f.name != "job.json"}


def start_and_signal(command, arguments, out, which):
    """Run a job, send it a signal once some images are there, and return (exit code, stderr)."""
    line, environment = command(*arguments)
    process = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while len(pictures(out)) < 4 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    process.send_signal(which)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


@pytest.mark.parametrize("engine", ["ort", "openvino", EAGER])
def test_a_job_killed_in_the_middle_continues_to_the_same_files(
    command, fastgen_process, arguments, undisturbed, tmp_path, engine
):
    out, expected = tmp_path / "out", undisturbed(engine)
    code, _ = start_and_signal(command, arguments(engine, out), out, signal.SIGKILL)
    assert code == -signal.SIGKILL
    there = {f: f.stat().st_mtime_ns for f in pictures(out)}
    assert 4 <= len(there) < COUNT
    assert not (out / "manifest.jsonl").exists()
    for file in there:  # whole, whenever the kill came
        Image.open(file).load()

    done = fastgen_process(*arguments(engine, out))
    assert done.returncode == 0, done.stderr
    kept = [f for f, stamp in there.items() if f.stat().st_mtime_ns == stamp]
    assert len(kept) >= len(there) // 2 * 2  # finished batches are not run again
    if engine == "eager":  # torch may split its sums differently from run to run
        for file in pictures(expected):
            difference = np.asarray(Image.open(file)).astype(int) - np.asarray(Image.open(out / file.name))
            assert np.abs(difference).max() <= 1
        assert (out / "manifest.jsonl").read_bytes() == (expected / "manifest.jsonl").read_bytes()
    else:
        assert files(out) == files(expected)


@pytest.mark.parametrize("engine", ["ort", EAGER])
def test_ctrl_c_is_one_line_and_130_and_the_job_continues(
    command, fastgen_process, arguments, undisturbed, tmp_path, engine
):
    out = tmp_path / "out"
    code, err = start_and_signal(command, arguments(engine, out), out, signal.SIGINT)
    assert code == 130
    assert re.fullmatch(r"fastgen: interrupted after \d+ s; the same command continues\n", err)
    assert not list(out.glob(".*.tmp"))
    if engine == "ort":
        assert fastgen_process(*arguments(engine, out)).returncode == 0
        assert files(out) == files(undisturbed(engine))


def test_a_file_half_written_by_a_killed_process_is_swept_up(fastgen_process, arguments, undisturbed, tmp_path):
    out = shutil.copytree(undisturbed("ort"), tmp_path / "out")
    leftover(out / "3.png").write_bytes(b"half a file")
    (out / "3.png").unlink()
    assert fastgen_process(*arguments("ort", out)).returncode == 0
    assert files(out) == files(undisturbed("ort"))


def test_a_full_disk_is_one_line_and_the_job_continues_when_there_is_room(
    fastgen_process, arguments, undisturbed, tmp_path
):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        out = disk / "out"
        done = fastgen_process(*arguments("ort", out))
        assert (done.returncode, done.stdout) == (1, "")
        assert re.fullmatch(r"fastgen: error: \S+\.png: cannot be written: No space left on device\n", done.stderr)
        assert 0 < len(pictures(out)) < COUNT
        for file in pictures(out):
            Image.open(file).load()
        assert not list(out.glob(".*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=1m", disk], check=True)
        assert fastgen_process(*arguments("ort", out)).returncode == 0
        assert files(out) == files(undisturbed("ort"))
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_file_size_limit_leaves_nothing_partial_under_a_final_name(command, arguments, tmp_path):
    import resource

    out = tmp_path / "out"
    line, environment = command(*arguments("ort", out))

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900))  # more than job.json, less than a picture

    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=60, preexec_fn=limited)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"fastgen: error: \S+\.png: cannot be written: File too large\n", done.stderr)
    assert [f.name for f in out.iterdir()] == ["job.json"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_an_output_folder_that_cannot_be_made_is_one_line(fastgen_process, arguments):
    done = fastgen_process(*arguments("ort", "/proc/generated"))
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"fastgen: error: /proc/generated: the folder cannot be made: .*\n", done.stderr)
