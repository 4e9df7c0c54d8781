"""The cache of compiled networks: what others can write to, links, and records that lie."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attacks import REMOVE, Attack, set_field, snapshot

from fastgen.engines.cache import artifacts
from fastgen.engines.cache.artifacts import Artifact, Recipe

LIST, COLLECT = ["engines", "ls"], ["engines", "gc"]
FIELDS: dict[str, Any] = {"network": "unet", "batch": 8, "dtype": "fp16", "gpu": "NVIDIA A"}
OTHER_USER = 54321
root = pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="only root can give a file away")


def build(cache: Path, **fields: Any) -> Artifact:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTGEN_CACHE", str(cache))
        return artifacts.obtain(Recipe("trt", FIELDS | fields), lambda folder: _write(folder / "engine.plan"))


def _write(file: Path) -> None:
    file.write_bytes(b"compiled")


def mode(name: str, bits: int) -> Callable[[Path], object]:
    return lambda workspace: (workspace / name).chmod(bits)


def owner(name: str) -> Callable[[Path], object]:
    return lambda workspace: os.chown(workspace / name, OTHER_USER, OTHER_USER)


def linked(name: str) -> Callable[[Path], object]:
    """Move a folder away and put a link to it in its place."""

    def edit(workspace: Path) -> None:
        (workspace / name).rename(workspace / "elsewhere")
        (workspace / name).symlink_to(workspace / "elsewhere")

    return edit


def as_file(name: str) -> Callable[[Path], object]:
    def edit(workspace: Path) -> None:
        (workspace / name).rename(workspace / "elsewhere")
        (workspace / name).write_bytes(b"mine")

    return edit


def as_pipe(name: str) -> Callable[[Path], object]:
    def edit(workspace: Path) -> None:
        (workspace / name).rename(workspace / "elsewhere")
        os.mkfifo(workspace / name)

    return edit


FOLDERS = ("cache", "cache/engines", "cache/engines/trt")
ROWS: list[tuple[str, Callable[[Path], object], str]] = [
    *(
        (f"{name} {bits:o}", mode(name, bits), "other users")
        for name in FOLDERS
        for bits in (0o777, 0o770, 0o702, 0o1777)
    ),
    *((f"{name} is a file", as_file(name), "folder") for name in FOLDERS),
    *((f"{name} is a pipe", as_pipe(name), "folder") for name in FOLDERS),
    *((f"{name} is a link", linked(name), "symlink") for name in FOLDERS[1:]),
]
PLACES = {
    "": "empty",
    "a" * 300: "too long",
    "a/" * 3000: "too long",
    "file": "no folder",
    "file/below": "Not a directory",
    "nowhere": "no folder",
    "/dev/null": "no folder",
    "/dev/null/cache": "Not a directory",
    "/proc/cache": "cannot be used",
}


@pytest.mark.parametrize("command", [LIST, COLLECT], ids=["ls", "gc"])
@pytest.mark.parametrize(("name", "edit", "word"), ROWS, ids=[row[0] for row in ROWS])
def test_a_cache_that_others_can_write_to_is_refused(name, edit, word, command, refused, tmp_path):
    build(tmp_path / "cache-of-mine")
    attack = Attack(name, command, word, edit, env={"FASTGEN_CACHE": "cache"})
    refused(attack, cache=tmp_path / "cache-of-mine")


@root
@pytest.mark.parametrize("name", FOLDERS)
def test_a_cache_of_another_user_is_refused(name, refused, tmp_path):
    build(tmp_path / "cache-of-mine")
    attack = Attack(name, LIST, "another user", owner(name), env={"FASTGEN_CACHE": "cache"})
    refused(attack, cache=tmp_path / "cache-of-mine")


@pytest.mark.parametrize("command", [LIST, COLLECT, ["engines", "gc", "--all"]], ids=["ls", "gc", "all"])
@pytest.mark.parametrize("place", PLACES, ids=[place[:12] or "empty" for place in PLACES])
def test_a_place_that_is_no_cache_is_refused(place, command, refused):
    def edit(workspace: Path) -> None:
        (workspace / "file").write_bytes(b"mine")
        (workspace / "nowhere").symlink_to("missing")

    refused(Attack(place[:20], command, PLACES[place], edit, env={"FASTGEN_CACHE": place}))


FILE = {"bytes": 1, "sha256": "0" * 64}
RECORDS: list[tuple[str, Any, str]] = [
    ("", [], "object"),
    ("", 3, "object"),
    ("", {}, "format"),
    *(("format", value, "format") for value in (0, 2, "1", None, [1], True)),
    *(("engine", value, "engine") for value in ("", None, 3, "../trt", "TRT", "trt\n", "x" * 99)),
    ("engine", "openvino", "made for other fields"),
    *(("fields", value, "fields") for value in (None, [], 3, {"batch": [1]}, {"batch": {}})),
    ("fields.gpu", "NVIDIA B", "made for other fields"),
    *(("fields.batch", value, "batch") for value in ("8", 0, -1, 1.5, True, 10**20)),
    *(
        ("files", value, "files")
        for value in (None, [], {"engine.plan": None}, {"../plan": {"bytes": 1, "sha256": "0" * 64}})
    ),
    ("files./etc/passwd", {"bytes": 1, "sha256": "0" * 64}, "files"),
    *(("build_seconds", value, "build_seconds") for value in (-1, "1", None, 1e300)),
    *(("built", value, "built") for value in (None, 3, "", "yesterday", "2026-01-01T00:00:00+00:00 and more")),
    ("surprise", 1, "surprise"),
    ("built", REMOVE, "built"),
    ("files", REMOVE, "files"),
]


@pytest.mark.parametrize(("where", "value", "word"), RECORDS, ids=lambda value: str(value)[:30])
def test_a_record_that_lies_is_damaged_and_collected(where, value, word, fork_server, tmp_path):
    kept, bad = build(tmp_path / "cache"), build(tmp_path / "cache", batch=2)
    (tmp_path / "cache" / "engines" / "trt" / "notes").mkdir()
    (tmp_path / "cache" / "engines" / "trt" / "notes" / "artifact.json").write_text("mine")
    if where.startswith("files./"):
        record = json.loads((bad.folder / "artifact.json").read_text())
        record["files"][where.removeprefix("files.")] = value
        (bad.folder / "artifact.json").write_text(json.dumps(record))
    else:
        set_field(str(bad.folder / "artifact.json"), where, value)(tmp_path)
    env = {"FASTGEN_CACHE": str(tmp_path / "cache")}
    shown = fork_server.run(LIST, tmp_path, env)
    assert (shown.code, shown.stderr) == (0, ""), shown
    (line,) = [line for line in shown.stdout.splitlines() if line.startswith("damaged: ")]
    assert word in line
    assert shown.stdout.splitlines()[-1].startswith("1 compiled engines")
    done = fork_server.run([*COLLECT, "--damaged"], tmp_path, env)
    assert (done.code, done.stderr) == (0, ""), done
    assert (kept.folder.is_dir(), bad.folder.exists()) == (True, False)
    assert (tmp_path / "cache" / "engines" / "trt" / "notes" / "artifact.json").read_text() == "mine"


@pytest.mark.parametrize("name", ["", "artifact.json", "engine.plan"])
@pytest.mark.parametrize("bits", [0o666, 0o777, 0o660])
def test_an_artifact_that_others_can_write_to_is_damaged(name, bits, fork_server, tmp_path):
    bad = build(tmp_path / "cache")
    (bad.folder / name).chmod(bits)
    shown = fork_server.run(LIST, tmp_path, {"FASTGEN_CACHE": str(tmp_path / "cache")})
    assert (shown.code, shown.stderr) == (0, ""), shown
    assert "damaged: " in shown.stdout
    assert "other users can write" in shown.stdout


@pytest.mark.parametrize("name", ["", "artifact.json", "engine.plan"])
def test_a_link_in_the_cache_is_collected_and_what_it_points_to_stays(name, fork_server, tmp_path):
    bad = build(tmp_path / "cache")
    place = bad.folder / name
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    before = snapshot(tmp_path / "elsewhere") or (tmp_path / "elsewhere").read_bytes()
    env = {"FASTGEN_CACHE": str(tmp_path / "cache")}
    shown = fork_server.run(LIST, tmp_path, env)
    assert (shown.code, shown.stderr) == (0, ""), shown
    assert "symlink" in shown.stdout
    done = fork_server.run([*COLLECT, "--all"], tmp_path, env)
    assert (done.code, done.stderr) == (0, ""), done
    assert not os.path.lexists(bad.folder)
    assert (snapshot(tmp_path / "elsewhere") or (tmp_path / "elsewhere").read_bytes()) == before


def test_a_compiled_network_that_others_could_write_to_is_compiled_again(fork_server, label_bundle, tmp_path):
    env = {"FASTGEN_CACHE": str(tmp_path / "cache")}
    options = ["--engine", "openvino", "--labels", "red cube", "--out", "out.png", "--num-inference-steps", "1"]
    command = ["generate", "--model", str(label_bundle), *options]
    assert fork_server.run(command, tmp_path, env).code == 0
    expected = (tmp_path / "out.png").read_bytes()
    blob = next((tmp_path / "cache").rglob("network.blob"))
    blob.write_bytes(b"code of another user")
    blob.chmod(0o666)
    outcome = fork_server.run(command, tmp_path, env)
    assert outcome.code == 0
    assert "other users can write" in outcome.stderr
    assert (tmp_path / "out.png").read_bytes() == expected
    assert blob.stat().st_mode & 0o777 == 0o600
