"""The cache of compiled engines: whole or absent, verified, one builder at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastgen.engines.cache import artifacts
from fastgen.engines.cache.artifacts import Recipe
from fastgen.errors import InputError
from fastgen.files import temporary

FIELDS: dict[str, Any] = {"network": "unet", "batch": 8, "dtype": "fp16", "gpu": "NVIDIA A", "weights_sha256": "0" * 64}
RECIPE = Recipe("trt", FIELDS)
BUILDER = """
import sys, time
from pathlib import Path
from fastgen.engines.cache.artifacts import Recipe, obtain

def make(folder):
    (folder / "plan").write_bytes(b"half")
    print("building", flush=True)
    time.sleep(float(sys.argv[1]))
    (folder / "plan").write_bytes(b"whole")

artifact = obtain(Recipe("trt", {fields!r}), make, lambda line: print(line, file=sys.stderr, flush=True))
print(artifact.file("plan").read_bytes().decode())
""".replace("{fields!r}", repr(FIELDS))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_plan(folder: Path) -> None:
    (folder / "plan").write_bytes(b"compiled")


def never(folder: Path) -> None:
    raise AssertionError("built although it was there")


def start_builder(seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-c", BUILDER, str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_what_was_built_is_found_and_not_built_again():
    assert artifacts.find(RECIPE) is None
    built = artifacts.obtain(RECIPE, write_plan)
    assert built.file("plan").read_bytes() == b"compiled"
    assert built.bytes == len(b"compiled")
    assert artifacts.obtain(RECIPE, never) == built
    assert artifacts.find(RECIPE) == built


def test_a_build_is_told_unless_it_is_quick():
    said: list[str] = []
    artifacts.obtain(RECIPE, write_plan, said.append, say_built=False)
    assert said == []
    artifacts.obtain(replace(RECIPE, engine="compile"), write_plan, said.append)
    assert said[0] == "building compile: unet, batch 8, fp16"
    assert said[1].startswith("built compile: unet, batch 8, fp16 in ")


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_of_a_recipe_is_part_of_its_address(name):
    other = Recipe("trt", FIELDS | {name: "another"})
    assert other.digest != RECIPE.digest
    artifacts.obtain(RECIPE, write_plan)
    assert artifacts.find(other) is None


def test_the_order_of_fields_does_not_matter():
    assert Recipe("trt", dict(reversed(FIELDS.items()))).digest == RECIPE.digest


def test_the_nearest_artifact_is_named_with_what_differs():
    artifacts.obtain(RECIPE, write_plan)
    artifacts.obtain(Recipe("trt", FIELDS | {"batch": 1, "gpu": "NVIDIA B"}), write_plan)
    wanted = Recipe("trt", FIELDS | {"gpu": "NVIDIA C", "weights_sha256": "f" * 64})
    (nearest, different), (_, more) = artifacts.ranked(wanted, artifacts.artifacts())
    assert nearest.recipe == RECIPE
    assert [d.field for d in different] == ["gpu", "weights_sha256"]
    assert [str(d) for d in different] == [
        "gpu is NVIDIA A there, NVIDIA C here",
        "weights_sha256 is 000000000000... there, ffffffffffff... here",
    ]
    assert [d.field for d in more] == ["batch", "gpu", "weights_sha256"]
    assert artifacts.ranked(Recipe("trt", FIELDS | {"network": "vae_decoder"}), artifacts.artifacts()) == []


def test_a_field_that_is_none_matches_every_value_and_one_that_is_missing_does_not():
    there = Recipe("trt", FIELDS | {"level": 5})
    assert artifacts.differences(there, Recipe("trt", FIELDS | {"level": None, "batch": None})) == []
    assert artifacts.differences(there, RECIPE) == [("level", 5, None)]
    assert artifacts.differences(RECIPE, there) == [("level", None, 5)]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: f.write_bytes(b"comp"), "4 bytes, artifact.json says 8: truncated"),
        (lambda f: f.write_bytes(b"Compiled"), "sha256 differs"),
        (lambda f: f.unlink(), "No such file"),
    ],
)
def test_a_damaged_file_is_refused_and_an_on_demand_engine_is_built_again(damage, says):
    built = artifacts.obtain(RECIPE, write_plan)
    damage(built.folder / "plan")
    with pytest.raises(InputError, match=says):
        built.file("plan")
    said: list[str] = []
    assert artifacts.obtain(RECIPE, write_plan, said.append).file("plan").read_bytes() == b"compiled"
    assert says in said[0]
    assert "building it again" in said[0]


def test_a_record_of_another_recipe_is_not_taken_for_this_one():
    built = artifacts.obtain(RECIPE, write_plan)
    record = json.loads((built.folder / "artifact.json").read_text())
    record["fields"]["gpu"] = "NVIDIA B"
    (built.folder / "artifact.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="made for other fields"):
        artifacts.find(RECIPE)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 1, "files": 3}'])
def test_a_damaged_record_is_one_line(text):
    built = artifacts.obtain(RECIPE, write_plan)
    (built.folder / "artifact.json").write_text(text)
    with pytest.raises(InputError, match=r"artifact\.json"):
        artifacts.find(RECIPE)


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
@pytest.mark.parametrize("level", ["cache", "engines", "artifact"])
def test_a_cache_that_others_can_write_to_is_refused(cache, level):
    built = artifacts.obtain(RECIPE, write_plan)
    folder = {"cache": cache, "engines": cache / "engines", "artifact": built.folder}[level]
    folder.chmod(0o777)
    with pytest.raises(InputError, match="other users can write"):
        artifacts.find(RECIPE)


def test_of_two_processes_one_builds_and_the_other_waits():
    first = start_builder(1.5)
    assert first.stdout is not None
    assert first.stdout.readline() == "building\n"
    second = start_builder(1.5)
    out, err = second.communicate(timeout=60)
    assert out == "whole\n"  # and not "building" before it
    assert "another process is building trt: unet, batch 8, fp16; waiting" in err
    assert first.communicate(timeout=60)[0] == "whole\n"


def test_a_killed_build_leaves_nothing_that_is_loaded():
    process = start_builder(60)
    assert process.stdout is not None
    assert process.stdout.readline() == "building\n"
    assert list(artifacts.leftovers()) == []  # it is still being built
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.communicate()
    assert artifacts.find(RECIPE) is None
    deadline = time.monotonic() + 5
    while not (left := list(artifacts.leftovers())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [temporary.target_of(folder.name) for folder in left] == [RECIPE.digest]
    assert artifacts.obtain(RECIPE, write_plan).file("plan").read_bytes() == b"compiled"
    assert list(artifacts.leftovers()) == []


def test_a_failing_build_leaves_nothing(cache):
    def fail(folder: Path) -> None:
        write_plan(folder)
        raise RuntimeError("compiler")

    with pytest.raises(RuntimeError, match="compiler"):
        artifacts.obtain(RECIPE, fail)
    assert artifacts.find(RECIPE) is None
    assert [f for f in (cache / "engines").rglob("*") if f.is_file() and f.suffix != ".lock"] == []


def test_listing_and_removing():
    one, two = artifacts.obtain(RECIPE, write_plan), artifacts.obtain(replace(RECIPE, engine="compile"), write_plan)
    assert {a.folder for a in artifacts.artifacts()} == {one.folder, two.folder}
    assert artifacts.artifacts("compile") == [two]
    assert artifacts.remove(one.folder)
    assert artifacts.find(RECIPE) is None
    assert artifacts.artifacts() == [two]


def test_scanning_tells_damaged_records_apart_instead_of_failing():
    one, two = artifacts.obtain(RECIPE, write_plan), artifacts.obtain(replace(RECIPE, engine="compile"), write_plan)
    (one.folder / "artifact.json").write_text("{")
    sound, damaged = artifacts.scan()
    assert sound == [two]
    assert [(d.folder, d.engine) for d in damaged] == [(one.folder, "trt")]
    assert "malformed JSON" in damaged[0].reason
    assert artifacts.scan("compile") == ([two], [])


def test_what_another_process_builds_is_not_removed():
    built = artifacts.obtain(RECIPE, write_plan)
    (built.folder / "plan").write_bytes(b"")  # so that the builder builds it again
    process = start_builder(60)
    assert process.stdout is not None
    assert process.stdout.readline() == "building\n"
    assert not artifacts.remove(built.folder)
    assert built.folder.is_dir()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 5
    while not artifacts.remove(built.folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not built.folder.exists()


def test_only_an_artifact_s_own_folders_are_leftovers(cache):
    artifacts.obtain(RECIPE, write_plan)
    for name in ("timing", ".mine", "f" * 64):
        (cache / "engines" / "trt" / name).mkdir()
    assert [folder.name for folder in artifacts.leftovers()] == ["f" * 64]
    assert list(artifacts.leftovers("compile")) == []
