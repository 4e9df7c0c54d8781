"""`fastgen engines ls|why|gc`: what is on disk, why something is not found, and what is deleted and what never."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastgen.engines.base import Engine
from fastgen.engines.cache import artifacts
from fastgen.engines.cache.artifacts import Artifact, Recipe
from fastgen.engines.cache.gc import Selection, collect, outdated, parse_size
from fastgen.engines.cache.listing import build_command, explain, row, size_text, table, why
from fastgen.errors import InputError

FIELDS: dict[str, Any] = {
    "network": "unet",
    "batch": 8,
    "dtype": "fp16",
    "gpu": "NVIDIA H200",
    "tensorrt": "11.4.0.106",
    "level": 3,
}
UNET = Recipe("trt", FIELDS)
BUILDER = """
import time
from fastgen.engines.cache.artifacts import Recipe, obtain

def make(folder):
    (folder / "plan").write_bytes(b"half")
    print("building", flush=True)
    time.sleep(60)

obtain(Recipe("trt", {fields!r}), make)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def build(engine="trt", size=1000, unused_days=0.0, **fields) -> Artifact:
    """An artifact of `size` bytes, last used so many days ago."""

    def write(folder: Path) -> None:
        (folder / "plan").write_bytes(b"x" * size)

    built = artifacts.obtain(Recipe(engine, FIELDS | fields), write)
    then = time.time() - unused_days * 86400
    os.utime(built.folder / "artifact.json", (then, then))
    return built


def start_builder(recipe: Recipe) -> subprocess.Popen:
    script = BUILDER.replace("{fields!r}", repr(dict(recipe.fields)))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "building\n"
    return process


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def there(*built: Artifact) -> list[bool]:
    return [artifact.folder.exists() for artifact in built]


class Cached(Engine):
    """An engine that keeps artifacts of these fields; runs nothing."""

    name, dtype, packages, built_by = "trt", "fp16", ("tensorrt",), "--trt"

    def __init__(self, **fields):
        self.fields = FIELDS | {"level": None} | fields

    def recipe(self, network, rows):
        return Recipe("trt", self.fields | {"network": network, "batch": rows})

    def run(self, network, *inputs):
        raise AssertionError("nothing has to run")

    array = numpy = run


def problem(engine, network="unet", **options):
    (finding,) = why(engine, [network], **options)
    return finding.problem


def test_the_table_names_what_an_engine_is_for():
    built = build()
    header, line = table([row(built)])
    assert header.split()[:5] == ["engine", "network", "batch", "dtype", "device"]
    assert "trt" in line
    assert "unet     8      fp16   NVIDIA H200  tensorrt 11.4.0.106  1.0 kB" in line
    assert line.endswith(f" s  {row(built)['last_used'][:16].replace('T', ' ')}  {built.recipe.digest[:12]}")
    assert row(built)["versions"] == {"tensorrt": "11.4.0.106"}
    assert row(built)["fields"] == FIELDS
    assert (row(built)["build_seconds"], row(built)["built"]) == (built.build_seconds, built.built)


def test_what_is_there_is_verified_and_listed_by_batch_size():
    one, eight = build(batch=1), build(batch=8)
    (finding,) = why(Cached(), ["unet"])
    assert finding.problem is None
    assert finding.rows == {1: one, 8: eight}
    said = f"unet: batch 1: {one.recipe.digest[:12]}, verified; batch 8: {eight.recipe.digest[:12]}, verified"
    assert str(finding) == said


def test_a_field_that_the_engine_leaves_open_may_have_any_value():
    build(level=5)
    assert problem(Cached(level=None)) is None
    assert problem(Cached(level=3)) == "not built; the nearest (unet, batch 8, fp16): level is 5 there, 3 here"


def test_the_nearest_artifact_is_named_with_every_field_that_differs():
    build(gpu="NVIDIA A100", dtype="bf16", level=1)
    build(gpu="NVIDIA A100")
    build(network="vae_decoder")
    assert problem(Cached()) == (
        "not built; the nearest (unet, batch 8, fp16): gpu is NVIDIA A100 there, NVIDIA H200 here"
    )
    assert problem(Cached(), "text_encoder") == "never built"


def test_a_guided_batch_needs_twice_the_rows_of_the_unet_only():
    build(batch=8)
    build(batch=8, network="vae_decoder")
    assert problem(Cached(), batch_size=4) is None
    assert problem(Cached(), batch_size=8) == "no batch of 16 rows"
    assert problem(Cached(), batch_size=8, guided=False) is None
    assert problem(Cached(), "vae_decoder", batch_size=64) is None  # any number of rows is cut to what there is


def test_a_damaged_engine_is_not_found():
    built = build()
    (built.folder / "plan").write_bytes(b"y" * 1000)
    found = problem(Cached())
    assert found.startswith(f"damaged: {built.folder / 'plan'}: sha256 differs")


def test_an_engine_that_keeps_nothing_says_so():
    class Plain(Cached):
        recipe = Engine.recipe

    with pytest.raises(InputError, match="engine trt keeps no compiled networks on disk"):
        why(Plain(), ["unet"])


def test_the_networks_of_generation_are_asked_about_with_the_model_s_guidance():
    build(batch=8)
    signatures = dict.fromkeys(["text_encoder", "unet", "vae_decoder", "vae_encoder"])
    for scale, words in ((7.5, "no batch of 16 rows"), (1.0, None)):
        spec: Any = SimpleNamespace(signatures=signatures, sampling=SimpleNamespace(guidance_scale=scale))
        findings = explain(Cached(), spec, batch_size=8)
        assert [f.network for f in findings] == ["text_encoder", "unet", "vae_decoder"]
        assert [f.problem for f in findings] == ["never built", words, "never built"]


def test_the_command_that_builds_what_is_missing():
    said = build_command(Path("runs/x/bundle"), Cached(), 8)
    assert said == "fastgen export runs/x/bundle --trt --dtype fp16 --batch-sizes 8"
    assert build_command(Path("b"), Cached(), None) == "fastgen export b --trt --dtype fp16"


def test_by_default_only_what_cannot_be_used_is_deleted(monkeypatch):
    monkeypatch.setattr("fastgen.engines.cache.gc.distributions", lambda: {"tensorrt-cu13": "11.4.0.106"})
    sound, old = build(unused_days=400), build(batch=1, tensorrt="10.16.1.11")
    broken, short = build(batch=2), build(batch=4)
    (broken.folder / "artifact.json").write_text("{")
    (short.folder / "plan").write_bytes(b"")
    kill(start_builder(Recipe("trt", FIELDS | {"batch": 64})))
    deadline = time.monotonic() + 5
    while not list(artifacts.leftovers()) and time.monotonic() < deadline:
        time.sleep(0.05)  # until the system has released the lock of the killed builder
    listed = [doomed for doomed, _ in collect(Selection(), dry_run=True)]
    assert there(sound, old, broken, short) == [True] * 4
    done = list(collect(Selection()))
    assert [doomed for doomed, _ in done] == listed
    assert all(gone for _, gone in done)
    reasons = {doomed.folder: doomed.why for doomed in listed}
    assert reasons.pop(old.folder) == "made by tensorrt 10.16.1.11, 11.4.0.106 is installed"
    assert "malformed JSON" in reasons.pop(broken.folder)
    assert reasons.pop(short.folder) == "plan is missing or truncated"
    assert list(reasons.values()) == ["left by a build that was killed"]
    assert there(sound, old, broken, short) == [True, False, False, False]
    assert list(collect(Selection())) == []


@pytest.mark.parametrize(
    ("made_by", "installed", "old"),
    [
        ("11.4.0.106", {"tensorrt-cu13": "11.4.0.106"}, False),
        ("11.4.0.106", {"tensorrt-cu13-bindings": "10.16.1.11"}, True),
        ("11.4.0.106", {"tensorrt-cu12": "10.16", "tensorrt": "11.4.0.106"}, False),
        ("11.4.0.106", {"tensorrt-llm": "1.0", "torch": "2.13.0"}, False),  # not here: nothing to compare with
        ("11.4.0.106", {}, False),
        ("11.4.0.106-7-ab", {"tensorrt": "11.4.0.106"}, False),  # the library's own name of its build
        ("11.4.0.10", {"tensorrt": "11.4.0.106"}, True),
    ],
)
def test_which_artifacts_are_of_another_version(made_by, installed, old):
    assert (outdated(Recipe("trt", FIELDS | {"tensorrt": made_by}), installed) is not None) is old


def test_the_unused_and_the_oldest_go_first():
    new, old, oldest = build(batch=1), build(batch=2, unused_days=10), build(batch=4, unused_days=20)
    (gone,) = collect(Selection(unused_days=15))
    assert (gone[0].folder, gone[0].why) == (oldest.folder, "not used for 20 days")
    assert there(new, old, oldest) == [True, True, False]
    (gone,) = collect(Selection(max_bytes=1999))
    assert gone[0].folder == old.folder
    assert list(collect(Selection(max_bytes=1000))) == []
    assert there(new, old) == [True, False]


def test_altered_files_are_found_by_their_hash_on_demand():
    sound, altered = build(batch=1), build(batch=2)
    (altered.folder / "plan").write_bytes(b"y" * 1000)
    assert list(collect(Selection())) == []  # a quick look at sizes only
    ((doomed, gone),) = collect(Selection(damaged=True))
    assert (doomed.folder, gone) == (altered.folder, True)
    assert "sha256 differs" in doomed.why
    assert there(sound, altered) == [True, False]


def test_all_of_one_engine_leaves_the_others():
    trt, other = build(), build(engine="openvino")
    assert [doomed.folder for doomed, _ in collect(Selection(everything=True), "trt")] == [trt.folder]
    assert there(trt, other) == [False, True]


def test_what_another_process_builds_is_left_alone():
    damaged = build()
    (damaged.folder / "plan").write_bytes(b"")
    process = start_builder(UNET)
    try:
        ((doomed, gone),) = collect(Selection(everything=True))
        assert (doomed.folder, gone) == (damaged.folder, False)
        (partial,) = damaged.folder.parent.glob(f".{UNET.digest}.*.tmp")
        assert (partial / "new" / "plan").exists()
    finally:
        kill(process)


@pytest.mark.parametrize(
    ("text", "count"),
    [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("2GiB", 2**31), ("1.5K", 1500), ("7", 7), ("7B", 7), ("0", 0)],
)
def test_sizes(text, count):
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5 XB", "1e9", "five"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(InputError, match="expected a number and a unit, such as 5GB"):
        parse_size(text)


def test_sizes_are_written_with_their_unit():
    assert [size_text(n) for n in (0, 999, 1000, 1.5e6, 2.25e9, 5e12)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "1.5 MB",
        "2.2 GB",
        "5000.0 GB",
    ]


def test_the_commands_list_and_delete(fastgen_process):
    kept, broken = build(), build(batch=2)
    (broken.folder / "artifact.json").write_text("[]")
    done = fastgen_process("engines", "ls")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[1].startswith("trt     unet     8")
    expected = "found [], expected an object; run `fastgen engines gc`"
    assert lines[2] == f"damaged: {broken.folder / 'artifact.json'}: {expected}"
    assert lines[3] == "1 compiled engines, 1.0 kB"
    listed = json.loads(fastgen_process("engines", "ls", "--json").stdout)
    assert [engine["address"] for engine in listed["engines"]] == [kept.recipe.digest]
    assert [one["folder"] for one in listed["damaged"]] == [str(broken.folder)]

    dry = fastgen_process("engines", "gc", "--dry-run")
    assert dry.stdout.splitlines()[-1].startswith("1 would be deleted, ")
    assert there(kept, broken) == [True, True]
    assert fastgen_process("engines", "gc").stdout.splitlines()[-1].startswith("1 deleted, ")
    assert there(kept, broken) == [True, False]
    assert fastgen_process("engines", "gc", "--all").stdout.splitlines() == [
        "trt: unet, batch 8, fp16 (1.0 kB): --all",
        "1 deleted, 1.0 kB freed",
    ]
    assert there(kept) == [False]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ls", "--engine", "trtt"], "unknown engine 'trtt'; did you mean 'trt'?"),
        (["gc", "--engine", "x"], "unknown engine 'x'"),
        (["gc", "--max-size", "much"], "--max-size: found 'much', expected a number and a unit"),
        (["gc", "--unused-days", "-1"], "--unused-days"),
        (["why", "nowhere", "--engine", "ort"], "nowhere: neither a bundle"),
        (["why"], "Missing option '--engine'"),
    ],
)
def test_bad_arguments_are_one_line(fastgen, arguments, words):
    code, out, err = fastgen("engines", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err


def test_the_command_says_that_an_engine_keeps_nothing(fastgen, label_bundle):
    code, out, err = fastgen("engines", "why", label_bundle, "--engine", "ort")
    assert (code, out) == (2, "")
    assert err == "fastgen: error: engine ort keeps no compiled networks on disk: there is nothing to find\n"


def test_the_command_names_what_differs_and_what_to_run(fastgen, monkeypatch):
    build(gpu="NVIDIA A100")
    spec = SimpleNamespace(signatures={"unet": None}, sampling=SimpleNamespace(guidance_scale=7.5))
    monkeypatch.setattr(
        "fastgen.generate.pipeline.load", lambda *arguments, **options: SimpleNamespace(engine=Cached(), spec=spec)
    )
    code, out, err = fastgen("engines", "why", "some/bundle", "--engine", "trt", "--batch-size", 4)
    assert code == 1
    assert out == "unet: not built; the nearest (unet, batch 8, fp16): gpu is NVIDIA A100 there, NVIDIA H200 here\n"
    command = "fastgen export some/bundle --trt --dtype fp16 --batch-sizes 4"
    assert err == f"fastgen: error: not ready: unet; run `{command}`\n"
    build()
    assert fastgen("engines", "why", "some/bundle", "--engine", "trt", "--batch-size", 4)[0] == 0


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_a_cache_that_others_can_write_to_is_refused(fastgen, cache):
    build()
    cache.chmod(0o777)
    for command in ("ls", "gc"):
        code, _, err = fastgen("engines", command)
        assert (code, err.count("\n")) == (2, 1)
        assert "other users can write to this cache" in err


def test_an_artifact_of_an_engine_that_is_gone_is_listed_too():
    built = build(engine="former")
    assert row(built)["versions"] == {}
    assert replace(built, folder=built.folder) in artifacts.scan()[0]
