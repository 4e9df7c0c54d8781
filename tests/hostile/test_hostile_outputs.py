"""Outputs in the way of other people's files, folders of other jobs, and records of jobs and parts that lie."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from attacks import REMOVE, Attack, json_attacks, text_attacks
from killed import leftover
from PIL import Image

from fastgen.files.png import png_bytes

LABELS = [["red cube"], ["blue sphere", "red cube"], ["gray cylinder"], ["red cube", "gray cube"]]
MODEL = ["--model", "model", "--engine", "eager", "--num-inference-steps", "1"]
JOB = ["generate", "requests.json", *MODEL, "--batch-size", "1"]
ONE = ["generate", "--labels", "red cube", *MODEL, "--out"]
SCORE = ["score", "job", "--requests", "requests.json", "--evaluator", "evaluator-iclevr", "--out"]
COPIES = ["copies", "job", "--index", "index", "--out"]
SHEET = ["copies", "job", "--index", "index", "--data", "data", "--sheet"]
COMPARE = ["compare", "job", "job", "--out"]


@pytest.fixture(scope="session")
def made(fork_server, label_model, once) -> Path:
    """A folder with a model, requests, a finished job, a job of two parts of which one is done, and files of the user's."""

    def fill(folder: Path) -> None:
        shutil.copytree(label_model, folder / "model")
        (folder / "requests.json").write_text(json.dumps(LABELS))
        for more in (["--out", "job"], ["--out", "parts", "--shard", "1/2"]):
            outcome = fork_server.run([*JOB, *more], folder, {"FASTGEN_CACHE": str(folder.parent / "cache")}, 100)
            assert outcome.code == 0, outcome
        (folder / "notes.txt").write_text("mine")
        (folder / "empty.json").write_text("")
        (folder / "copies.json").write_text(json.dumps({"written_by": "fastgen copies"}))
        (folder / "score.json").write_text(json.dumps({"written_by": "fastgen score"}))
        (folder / "pretends.json").write_text(json.dumps({"written_by": ["fastgen score"], "metrics": {}}))
        for name in ("photo.png", "pair.png", "free.json"):
            Image.new("RGB", (8, 8), "red").save(folder / name, "PNG")
        (folder / "pair.json").write_text("[]")
        (folder / "folder.png").mkdir()
        (folder / "link.png").symlink_to("photo.png")
        (folder / "link.json").symlink_to("requests.json")
        (folder / "broken.json").symlink_to("nowhere.json")
        (folder / "broken.png").symlink_to("nowhere.png")

    return once("hostile-outputs", fill)


@pytest.fixture
def refused_there(made, fork_server, tmp_path) -> Callable[[Attack], None]:
    from attacks import check

    def run(attack: Attack) -> None:
        shutil.copytree(made, tmp_path / "workspace", symlinks=True)
        check(attack, tmp_path / "workspace", fork_server, tmp_path / "cache")

    return run


def at(
    command: Sequence[str], target: str, word: str, edit: Callable[[Path], object] = lambda workspace: None
) -> Attack:
    return Attack(f"{command[0]} {command[-1]} {target[:60]}", [*command, target], word, edit)


def fifo(name: str) -> Callable[[Path], object]:
    return lambda workspace: os.mkfifo(workspace / name)


REPORTS = [
    *((name, "exists and is not") for name in ("requests.json", "job/job.json", "job/manifest.jsonl", "job/0.png")),
    *((name, "exists and is not") for name in ("model/model_index.json", "notes.txt", "empty.json", "pretends.json")),
    *((name, "exists and is not") for name in ("job/contact_sheet.png", "photo.png", "parts/shard-1-of-2.json")),
    *(("job", "is a folder"), ("link.json", "is a symlink"), ("broken.json", "is a symlink")),
    *(("notes.txt/x.json", "is not a folder"), ("broken.json/x.json", "broken symlink"), ("/dev/null", "is a pipe")),
]
PICTURES = [
    *((name, "exists and is not") for name in ("photo.png", "job/contact_sheet.png")),
    *(("folder.png", "is a folder"), ("link.png", "is a symlink"), ("broken.png", "is a symlink")),
    *(("notes.txt/x.png", "is not a folder"), ("fifo.png", "is a pipe or a device")),
]
OUTPUTS = [
    *(at(SCORE, name, word) for name, word in (*REPORTS, ("copies.json", "exists and is not"))),
    *(at(COPIES, name, word) for name, word in (*REPORTS, ("score.json", "exists and is not"))),
    *(at(ONE, name, word, fifo("fifo.png")) for name, word in PICTURES),
    *(at(SHEET, name, word, fifo("fifo.png")) for name, word in (*PICTURES, ("job/0.png", "exists and is not"))),
    *(at(COMPARE, name, word, fifo("fifo.png")) for name, word in (*PICTURES, ("job/0.png", "exists and is not"))),
    at(COMPARE, "free.json.png", "is not", lambda w: (w / "free.json.json").write_text("{}")),
    at(COMPARE, "pair.png", "pair.png: exists"),
    at(COMPARE, "requests.png", "requests.json: exists"),
    at(COMPARE, "job/job.png", "job/job.json: exists"),
    at(COMPARE, "score.png", "score.json: exists"),
    at(COMPARE, "link.png", "is a symlink"),
    at(COMPARE, "x.jpg", "ends in .png"),
    at(ONE, "job/0.png", "is the image of a job"),
    at(SCORE, "fifo.json", "is a pipe or a device", fifo("fifo.json")),
    Attack("score's own place", SCORE[:-1], "exists and is not", lambda w: (w / "job" / "score.json").write_text("{}")),
    Attack(
        "copies' own place", COPIES[:-1], "exists and is not", lambda w: (w / "job" / "copies.json").write_text("[]")
    ),
]


@pytest.mark.parametrize("attack", OUTPUTS, ids=str)
def test_no_command_writes_over_what_it_did_not_write(attack, refused_there):
    refused_there(attack)


def foreign(name: str) -> Callable[[Path], object]:
    """Another picture in place of a file of the job."""

    def edit(workspace: Path) -> None:
        (workspace / name).unlink(missing_ok=True)
        (workspace / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (64, 64), "blue").save(workspace / name)

    return edit


def other_metadata(workspace: Path) -> None:
    (workspace / "job" / "0.png").write_bytes(png_bytes(np.zeros((8, 8, 3), np.uint8), {"image_name": "0.png"}))


def linked(name: str, to: str) -> Callable[[Path], object]:
    def edit(workspace: Path) -> None:
        (workspace / name).unlink(missing_ok=True)
        (workspace / name).symlink_to(to)

    return edit


AGAIN, PART = [*JOB, "--out", "job"], [*JOB, "--out", "parts", "--shard", "2/2"]
RECORD, SHARD = "job/job.json", "parts/shard-1-of-2.json"
FOLDERS = [
    Attack("another job", [*AGAIN, "--seed", "5"], "seed is 0 there and 5 now"),
    Attack(
        "other requests", ["generate", "--labels", "red cube", "--count", "2", *MODEL, "--out", "job"], "another job"
    ),
    Attack("foreign image", AGAIN, "is no image of this job", foreign("job/0.png")),
    Attack("foreign metadata", AGAIN, "is no image of this job", other_metadata),
    Attack("image of another request", AGAIN, "is no image", lambda w: shutil.copy(w / "job/1.png", w / "job/0.png")),
    Attack("linked image", AGAIN, "is a symlink", linked("job/0.png", "1.png")),
    Attack("foreign sheet", AGAIN, "contact_sheet.png: exists", foreign("job/contact_sheet.png")),
    Attack("linked sheet", AGAIN, "is a symlink", linked("job/contact_sheet.png", "../photo.png")),
    Attack("foreign grid", [*AGAIN, "--grid"], "grid.png: exists", foreign("job/grid.png")),
    Attack("foreign strip", [*AGAIN, "--strip", "500,0"], "is no strip", foreign("job/strips/0.png")),
    Attack("foreign strip sheet", [*AGAIN, "--strip", "500,0"], "strips.png: exists", foreign("job/strips.png")),
    Attack("foreign manifest", AGAIN, "is not a job's manifest", lambda w: (w / "job/manifest.jsonl").write_text("[]")),
    Attack("no record", AGAIN, "files to write exist already", lambda w: (w / RECORD).unlink()),
    Attack("fifo", [*JOB, "--out", "fifo"], "is not a folder", fifo("fifo")),
    Attack("below a file", [*JOB, "--out", "notes.txt/a/b"], "is not a folder"),
    Attack("a link to a file", [*JOB, "--out", "link.json"], "is not a folder"),
    Attack("loop", [*JOB, "--out", "loop"], "loop", lambda w: (w / "loop").symlink_to("loop")),
    Attack("linked part", PART, "is a symlink", linked("parts/shard-1-of-2.json", "../copies.json")),
    Attack("own part is foreign", PART, "malformed", lambda w: (w / "parts/shard-2-of-2.json").write_text("mine")),
    Attack("part is a folder", PART, "is a folder", lambda w: (w / "parts/shard-2-of-2.json").mkdir()),
    *json_attacks(
        "record",
        AGAIN,
        [
            *((RECORD, "", value, "expected an object") for value in (None, 3, [], "x")),
            *((RECORD, field, REMOVE, f"{field} is missing") for field in ("job", "runs")),
            *((RECORD, "job", value, "job: found") for value in (None, [], "x", 3)),
            *((RECORD, "runs", value, "runs: found") for value in (None, {}, "x", 3)),
            *((RECORD, "runs.0", value, "runs[0]: found") for value in (None, 3, [])),
            *((RECORD, "runs.0.images", value, "runs[0].images") for value in (None, -1, 1.5, "4", 2**70)),
            *((RECORD, "runs.0.seconds", value, "runs[0].seconds") for value in (None, -1, "4", 1e300)),
            *((RECORD, "limits.batch", value, "limits.batch") for value in (0, -1, 1.5, "4", None, 10**9)),
            *((RECORD, "limits.decode", value, "limits.decode") for value in (0, -1, "4", [])),
            *((RECORD, "run_ids", value, "run_ids") for value in (None, {}, ["x"], [3])),
            *((RECORD, "limits", value, "limits: found") for value in (3, "x", [])),
            (RECORD, "extra", 1, "unknown field"),
            (RECORD, "runs.0.imagse", 1, "did you mean 'images'"),
            (RECORD, "job.seed", [[[["x" * 1000]]]], "seed is"),
            (RECORD, "job.model_sha256", "0" * 5000, "model_sha256 is"),
        ],
    ),
    *text_attacks(
        "record",
        AGAIN,
        [(RECORD, text, word) for text, word in (("", "empty"), ("{", "malformed"), ('{"job": NaN}', "NaN"))],
    ),
    *json_attacks(
        "part",
        PART,
        [
            *((SHARD, "", value, "expected an object") for value in (None, 3, [], "x")),
            *((SHARD, field, REMOVE, f"{field} is missing") for field in ("job", "shard", "lines", "runs")),
            (SHARD, "job", "0" * 64, "job: found"),
            (SHARD, "job", "x", "a SHA-256"),
            (SHARD, "shard", "2/2", "shard: found '2/2'"),
            (SHARD, "lines", [], "found 0 images, expected 2"),
            (SHARD, "lines", {}, "lines: found"),
            (SHARD, "lines.0", [0], "a list of 2"),
            (SHARD, "lines.0", 3, "lines[0]"),
            (SHARD, "lines.0.0", 1, "found position 1, expected 0"),
            (SHARD, "lines.1.0", 0, "found position 0, expected 2"),
            (SHARD, "lines.0.0", -1, "lines[0][0]"),
            (SHARD, "lines.0.0", 2**60, "lines[0][0]"),
            (SHARD, "lines.0.1", [], "lines[0][1]"),
            (SHARD, "lines.0.1.image_name", "../x.png", "image_name: found '../x.png'"),
            (SHARD, "lines.0.1.image_name", "1.png", "image_name: found '1.png'"),
            (SHARD, "lines.0.1.labels", ["gray cube"], "labels: found"),
            (SHARD, "lines.0.1.seed", 7, "seed: found 7"),
            (SHARD, "lines.0.1.model_sha256", "x", "model_sha256: found"),
            (SHARD, "lines.0.1.mine", 1, "mine: found 1"),
            (SHARD, "lines.0.1.error", [1], "error: found"),
            (SHARD, "run", None, "did you mean 'runs'"),
            (SHARD, "runs", 3, "runs: found 3"),
            (SHARD, "runs", {"x": {"images": 1, "seconds": 1}}, "runs: found a key that is refused"),
            (SHARD, "runs", {"0" * 16: {"images": 1, "seconds": -1}}, "seconds: found -1"),
            (SHARD, "more", 3, "unknown field"),
        ],
    ),
]


@pytest.mark.parametrize("attack", FOLDERS, ids=str)
def test_a_folder_that_is_not_this_job_s_is_refused(attack, refused_there):
    refused_there(attack)


def test_a_job_that_ends_leaves_what_others_wrote(made, fork_server, tmp_path):
    folder = shutil.copytree(made, tmp_path / "workspace", symlinks=True)
    out = folder / "job"
    kept = [out / name for name in (".tmp-mine", "shard-1-of-3.json", "shard-x-of-y.json", ".0.png.tmp", "notes.txt")]
    for path in kept:
        path.write_text("mine")
    (out / ".tmp-folder").mkdir()
    (out / "shard-2-of-3.json").mkdir()
    dead = leftover(out / "0.png")
    dead.write_text("half")
    expected = {name: (made / "job" / name).read_bytes() for name in ("0.png", "contact_sheet.png", "manifest.jsonl")}
    (out / "0.png").unlink()
    outcome = fork_server.run(AGAIN, folder, {"FASTGEN_CACHE": str(tmp_path / "cache")}, 60)
    assert outcome.code == 0, outcome
    assert all(path.read_text() == "mine" for path in kept)
    assert (out / ".tmp-folder").is_dir()
    assert (out / "shard-2-of-3.json").is_dir()
    assert not dead.exists()
    assert {name: (out / name).read_bytes() for name in expected} == expected


def test_what_a_command_wrote_it_may_write_again(made, fork_server, tmp_path):
    folder = shutil.copytree(made, tmp_path / "workspace", symlinks=True)
    commands = [[*COMPARE, "new/x.png"], [*ONE, "new/one.png"], [*SCORE, "new/score.json"], AGAIN, PART]
    for command in (*commands, *commands):
        outcome = fork_server.run(command, folder, {"FASTGEN_CACHE": str(tmp_path / "cache")}, 60)
        assert outcome.code == 0, (command, outcome)
    assert json.loads((folder / "new" / "x.json").read_text())["identical"] == 4
    assert json.loads((folder / "new" / "score.json").read_text())["written_by"] == "fastgen score"


@pytest.mark.parametrize("single", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["whole jobs", "parts"])
def test_of_several_jobs_that_begin_at_once_in_one_folder_one_wins(made, command, tmp_path, single):
    out, count = tmp_path / "out", 4
    processes = []
    for seed in range(count):
        more = ["--shard", "1/2"] if single else []
        model = ["--model", made / "model", *MODEL[2:]]
        line, env = command("generate", made / "requests.json", *model, "--seed", seed, "--out", out, *more)
        processes.append(subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    ends = [(process.communicate(timeout=300)[1], process.returncode) for process in processes]
    assert sorted(code for _, code in ends) == [0, *[2] * (count - 1)], ends
    for error, code in ends:
        assert code == 0 or (error.count("\n") == 1 and "holds another job: seed is" in error), error
    winner = next(seed for seed, (_, code) in enumerate(ends) if code == 0)
    assert json.loads((out / "job.json").read_text())["job"]["seed"] == winner
    lines = [json.loads(Image.open(file).info["fastgen"]) for file in out.glob("[0-9].png")]
    assert len({line["model_sha256"] for line in lines}) == 1
    if not single:
        manifest = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
        assert sorted(lines, key=lambda line: line["id"]) == manifest
