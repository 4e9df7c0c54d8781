"""A second start of a server: what the first one measured is remembered, and sizes are opened beside the first pictures."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from types import SimpleNamespace

import pytest
from killed import leftover

from fastgen.errors import FastgenError, InputError
from fastgen.generate.pipeline import load
from fastgen.serving import opening, remembered, warm, worker
from fastgen.serving.batch import Batcher
from fastgen.serving.messages import Costs, Finished, ImageTask, Submit
from fastgen.serving.opening import Opened, run_all
from fastgen.serving.preparing import Preparer
from fastgen.serving.remembered import Memory
from fastgen.serving.warm import warm_of
from fastgen.serving.worker import WorkerOptions

pytest.importorskip("onnxruntime")
COSTS = Costs({1: 0.01, 2: 0.015, 4: 0.03}, {1: 0.01, 4: 0.02}, {1: 0.001, 2: 0.002})


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def pipeline(text_bundle):
    return load(text_bundle, "ort", threads=1)


def test_what_was_measured_is_remembered(pipeline):
    key = remembered.key_of(pipeline, True, True, 1)
    assert Memory().recall(key) is None
    found = warm_of(COSTS, 4, True)
    left = leftover(Memory().file(key))
    left.write_text("half of a file, whose process was killed")
    Memory().remember(key, found)
    assert Memory().recall(key) == found
    assert not left.exists()


def test_another_model_engine_dtype_device_or_number_of_threads_is_measured_anew(pipeline, monkeypatch):
    def key(**other):
        fields = {"name": "ort", "dtype": "fp32", "device": "cpu", "packages": ("onnxruntime",)} | other
        engine = SimpleNamespace(buckets=lambda guided: None, **fields)
        return remembered.key_of(SimpleNamespace(spec=pipeline.spec, engine=engine, graphs=False), True, True, 1)

    keys = [key(), key(name="openvino"), key(dtype="bf16"), key(device="gpu"), key(packages=("numpy",))]
    keys += [remembered.key_of(pipeline, *options) for options in ((True, True, 2), (True, False, 1), (False, True, 1))]
    other = dataclasses.replace(pipeline.spec, sha256="0" * 64)
    keys.append(remembered.key_of(SimpleNamespace(spec=other, engine=pipeline.engine, graphs=False), True, True, 1))
    monkeypatch.setattr(remembered, "cpu", lambda: SimpleNamespace(name="other", isa=(), cores=2))
    keys.append(remembered.key_of(pipeline, True, True, 1))
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"slots": 0}, "slots: found 0"),
        ({"plain": []}, "plain, decode: found no size"),
        ({"guided": [[1, "fast"]]}, "guided"),
        ({"key": "0" * 64}, "key: found that of another model"),
        (None, "malformed JSON"),
    ],
)
def test_a_damaged_file_is_one_line(pipeline, change, said):
    key = remembered.key_of(pipeline, True, True, 1)
    Memory().remember(key, warm_of(COSTS, 4, True))
    path = Memory().file(key)
    path.write_text("{" if change is None else json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=said) as error:
        Memory().recall(key)
    assert str(error.value).startswith(str(path))
    assert str(error.value).endswith("delete the file, and it is measured again")


def test_the_second_start_measures_nothing_and_has_the_same_sizes(text_bundle, monkeypatch):
    options = WorkerOptions(text_bundle, "m", engine="ort", threads=1)
    monkeypatch.setattr(warm, "STEADY", 1000.0)
    _, first = worker._load(options, lambda line: None)
    monkeypatch.setattr(warm, "warm_up", None)  # would be called
    _, second = worker._load(options, lambda line: None)
    assert (second.slots, second.costs, second.exact) == (first.slots, first.costs, first.exact)


def test_measurements_of_a_busy_machine_are_not_remembered(text_bundle, monkeypatch):
    said = []
    monkeypatch.setattr(warm, "STEADY", 0.0)
    worker._load(WorkerOptions(text_bundle, "m", engine="ort", threads=1), said.append)
    assert any(line.startswith("the machine is busy") for line in said)
    assert list(Memory().file("0" * 64).parent.glob("*.json")) == []


def test_a_cache_that_cannot_be_used_is_told_and_the_model_is_served(text_bundle, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path / "file"))
    said = []
    _, ready = worker._load(WorkerOptions(text_bundle, "m", engine="ort", threads=1), said.append)
    assert ready.slots >= 1
    assert any("is no folder" in line and line.endswith("measured at every start") for line in said)


@pytest.mark.parametrize("fault", ["read-only", "full"])
def test_a_cache_that_cannot_be_written_is_told_and_the_model_is_served(text_bundle, monkeypatch, fault):
    def full(path, value):
        raise FastgenError(f"{path}: No space left on device")

    if fault == "full":
        monkeypatch.setattr(warm, "STEADY", 1000.0)
        monkeypatch.setattr(remembered, "write_json", full)
    else:
        monkeypatch.setattr(Memory, "writable", False)
        monkeypatch.setattr(Memory, "timed_alone", None)  # a lock is a file
    said = []
    _, ready = worker._load(WorkerOptions(text_bundle, "m", engine="ort", threads=1), said.append)
    assert ready.slots >= 1
    words = "No space left" if fault == "full" else "cannot be written"
    assert any(words in line and "measured" in line for line in said)


def test_only_one_process_times_a_model_at_once():
    order = []

    def other():
        with Memory().timed_alone():
            order.append("other")

    with Memory().timed_alone():
        thread = threading.Thread(target=other)
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join(10)
    assert order == ["first", "other"]


class TestOpened:
    def until_complete(self, opened, failed=lambda what, error: None):
        """The sizes of all kinds after each change."""
        seen = [{kind: opened[kind] for kind in ("guided", "plain", "decode")}]
        end = time.monotonic() + 60
        while not opened.complete and time.monotonic() < end:
            opened.proceed(failed)
            now = {kind: opened[kind] for kind in ("guided", "plain", "decode")}
            if now != seen[-1]:
                seen.append(now)
            time.sleep(0.001)
        return seen

    def test_the_smallest_sizes_are_there_at_once_and_the_largest_come_next(self, pipeline, monkeypatch):
        ran = []
        monkeypatch.setattr(opening, "run_once", lambda pipeline, kind, size: ran.append((kind, size)))
        opened = Opened(pipeline, warm_of(COSTS, 4, True), later=True)
        seen = self.until_complete(opened)
        assert seen[0] == {"guided": (1,), "plain": (1,), "decode": (1,)}
        assert seen[-1] == {"guided": (1, 2, 4), "plain": (1, 4), "decode": (1, 2)}
        assert ran[:3] == [("guided", 4), ("plain", 4), ("decode", 2)]
        assert len(ran) == len(set(ran)) == 9  # seven sizes, and the text encoder twice

    def test_a_size_that_fails_is_told_and_not_used(self, pipeline, monkeypatch):
        def run_once(pipeline, kind, size):
            if (kind, size) == ("guided", 4):
                raise MemoryError("no room")

        monkeypatch.setattr(opening, "run_once", run_once)
        opened, told = Opened(pipeline, warm_of(COSTS, 4, True), later=True), []
        self.until_complete(opened, lambda what, error: told.append((what, str(error))))
        assert told == [("guided at size 4", "no room")]
        assert opened["guided"] == (1, 2)

    def test_all_are_open_where_none_comes_later(self, pipeline):
        opened = Opened(pipeline, warm_of(COSTS, 4, True), later=False)
        assert opened.complete
        assert opened["guided"] == (1, 2, 4)

    def test_every_network_runs_at_every_size(self, pipeline, monkeypatch):
        rows = []
        run = type(pipeline.engine).run
        monkeypatch.setattr(
            type(pipeline.engine),
            "run",
            lambda self, name, *x: (rows.append((name, len(x[0]))), run(self, name, *x))[1],
        )
        run_all(pipeline, warm_of(COSTS, 4, True))
        assert {n for name, n in rows if name == "unet"} == {1, 2, 4, 8}
        assert {n for name, n in rows if name == "vae_decoder"} == {1, 2}
        assert {n for name, n in rows if name == "text_encoder"} == {1, 2}


def test_pictures_made_while_sizes_open_have_the_bytes_of_later_ones(text_bundle):
    pytest.importorskip("openvino")
    pipeline = load(text_bundle, "openvino", threads=2)
    found = warm.warm_up(pipeline, guided=True, exact=True, say=lambda line: None)
    again = load(text_bundle, "openvino", threads=2)
    opened = Opened(again, found, later=True)
    batcher = Batcher(again, Preparer(again), found, max_wait_s=30, opened=opened)

    def pictures():
        for id in range(6):
            task = ImageTask(seed=id, prompt="a dragon", num_inference_steps=4, guidance_scale=1.0 + id % 2)
            batcher.submit(Submit(id, task, "", time.monotonic()))
        files = {}
        while len(files) < 6:
            files |= {o.id: o.data for o in batcher.advance(time.monotonic()) if isinstance(o, Finished)}
        return files

    first = pictures()
    while not opened.complete:
        list(batcher.advance(time.monotonic()))
    assert opened["guided"] == found.guided
    assert pictures() == first
