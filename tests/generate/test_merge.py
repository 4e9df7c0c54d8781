"""Shards merge without a lock: races lose nothing, and a merge that is killed anywhere is completed by the next process."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from fastgen.engines.batches import Batch
from fastgen.errors import InputError
from fastgen.files import temporary
from fastgen.files.png import png_bytes
from fastgen.files.store import Folder
from fastgen.generate.job import merge
from fastgen.generate.job_folder import JobFolder
from fastgen.generate.job_parts import JobParts, new_run_id
from fastgen.generate.job_record import Limits, Timing
from fastgen.generate.requests import Request
from fastgen.generate.shards import Shard

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
IMAGES, SHARDS, RACES = 11, 5, 100
IDENTITY = {"fastgen": "0", "seed": 0}
REQUESTS = [Request(str(i), f"{i}.png", labels=("red cube",)) for i in range(IMAGES)]
BATCHES = [Batch(i, min(i + 2, IMAGES), 2) for i in range(0, IMAGES, 2)]
BROKEN = 3  # the image that fails in a run with `broken`


@dataclass
class Process:
    """A process that generates a shard as `run_job` does, with made-up images."""

    out: Path
    shard: Shard

    @property
    def folder(self) -> JobFolder:
        return JobFolder(Folder(self.out), [request.image_name for request in REQUESTS])

    def run(self, *, broken: bool = False, before_save=lambda: None) -> bool:
        """Whether the job is complete. The timing says which shard this was, so that it can be told."""
        folder = self.folder
        folder.claim(IDENTITY, Limits(2, None), clean=False)
        lines = [{"image_name": r.image_name, "fastgen": "0", "prompt": "ü", "similarity": 0.1} for r in REQUESTS]
        parts = JobParts.of(folder.store, self.shard, IDENTITY, BATCHES, lines)
        missing = [i for i in parts.positions if not folder.store.exists(folder.files[i])]
        for i in missing:
            if broken and i == BROKEN:
                lines[i]["error"] = "NaN"
            else:
                folder.store.write(folder.files[i], png_bytes(np.full((2, 2, 3), i, np.uint8), lines[i]))
        runs = {new_run_id(): Timing(len(missing), float(self.shard.index), 1)} if missing else {}
        before_save()
        parts.save(runs)
        return merge(parts, folder, REQUESTS, IDENTITY, runs)


def process(out: Path, index: int) -> Process:
    return Process(out, Shard(index, SHARDS))


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def runs_of(out: Path) -> list[tuple[float, int]]:
    """(shard, images) of the runs in job.json."""
    return sorted((run["seconds"], run["images"]) for run in json.loads((out / "job.json").read_text())["runs"])


ALL_RUNS = [(1.0, 3), *((float(i), 2) for i in range(2, SHARDS + 1))]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """The files of a job whose shards ran one after the other, but for job.json."""
    out = tmp_path_factory.mktemp("whole")
    assert [process(out, i).run() for i in range(1, SHARDS + 1)] == [False] * (SHARDS - 1) + [True]
    assert runs_of(out) == ALL_RUNS
    files = contents(out)
    del files["job.json"]
    assert sorted(files) == sorted(["manifest.jsonl", "contact_sheet.png", *(f"{i}.png" for i in range(IMAGES))])
    return files


def check_whole(out: Path, whole: dict[str, bytes]) -> None:
    """The folder holds the whole job and nothing else."""
    files = contents(out)
    del files["job.json"]
    assert files == whole, sorted(files.keys() ^ whole.keys())


def racer(folder: Path, index: int, barrier, failures) -> None:
    """Run shard `index` of every race on a machine of its own, with pauses before its file operations."""
    draw = random.Random(index)
    temporary._machine = lambda: f"{index:08x}"
    pausing = [0.0]
    events = ("open", "os.rename", "os.remove", "os.link")
    sys.addaudithook(lambda event, _: time.sleep(draw.random() * pausing[0]) if event in events else None)
    try:
        for race in range(RACES):
            barrier.wait(60)
            pausing[0] = draw.choice((0.0, 0.0, 0.0005, 0.002))
            process(folder / str(race), index).run(before_save=lambda: barrier.wait(60))
            pausing[0] = 0.0
    except BaseException:
        failures.put(traceback.format_exc())
        barrier.abort()


def test_a_hundred_merge_races_lose_nothing(whole, tmp_path):
    # Forks of a new process: those of this one might wait for locks that threads of other tests hold.
    context = multiprocessing.get_context("forkserver")
    barrier, failures = context.Barrier(SHARDS), context.Queue()
    racers = [
        context.Process(target=racer, args=(tmp_path, i, barrier, failures), daemon=True) for i in range(1, SHARDS + 1)
    ]
    for each in racers:
        each.start()
    for each in racers:
        each.join(300)
    assert failures.empty(), failures.get()
    assert [each.exitcode for each in racers] == [0] * SHARDS
    for race in range(RACES):
        check_whole(tmp_path / str(race), whole)
        assert runs_of(tmp_path / str(race)) == ALL_RUNS


def killed(out: Path, operation: int) -> bool:
    """Run the last shard in a process that dies before this of its file operations in the folder, counted from its record on.
    False when it ended sooner."""
    child = multiprocessing.get_context("forkserver").Process(target=dying, args=(out, operation))
    child.start()
    child.join()
    assert child.exitcode in (0, 9)
    return child.exitcode == 9


def dying(out: Path, operation: int) -> None:
    """The process of `killed`."""
    temporary._machine = lambda: "0" * 8  # this one is on another machine
    left = [sys.maxsize]

    def hook(event: str, arguments: tuple) -> None:
        if event in ("open", "os.rename", "os.remove", "os.link") and str(arguments[0]).startswith(str(out)):
            left[0] -= 1
            if left[0] == 0:
                os._exit(9)

    sys.addaudithook(hook)
    process(out, SHARDS).run(before_save=lambda: left.__setitem__(0, operation))


def test_a_merge_that_is_killed_before_any_file_operation_is_completed(whole, tmp_path):
    start = tmp_path / "start"
    for index in range(1, SHARDS):
        process(start, index).run()
    operation, unsaved = 0, 0
    while True:
        operation += 1
        out = tmp_path / str(operation)
        shutil.copytree(start, out)
        was_killed = killed(out, operation)
        saved = (out / "manifest.jsonl").exists() or (out / Shard(SHARDS, SHARDS).record).exists()
        assert process(out, 1 + operation % (SHARDS - 1)).run() == saved  # another shard's process, run again
        if not saved:
            unsaved += 1
            assert process(out, SHARDS).run()
        check_whole(out, whole)
        assert runs_of(out) == (ALL_RUNS if saved else ALL_RUNS[:-1]), operation  # the killed run took its time with it
        if not was_killed:
            break
    assert operation > 30
    assert 0 < unsaved < 10


def test_a_shard_that_runs_again_changes_nothing(whole, tmp_path):
    """Before the merge it keeps its timing, and after the merge it writes no part."""
    assert not process(tmp_path, 1).run()
    before = contents(tmp_path)
    assert not process(tmp_path, 1).run()
    assert contents(tmp_path) == before
    for index in range(2, SHARDS + 1):
        process(tmp_path, index).run()
    merged = contents(tmp_path)
    assert all(process(tmp_path, index).run() for index in range(1, SHARDS + 1))
    assert contents(tmp_path) == merged
    check_whole(tmp_path, whole)


def test_an_image_that_failed_is_tried_again_before_the_merge_and_after_it(whole, tmp_path):
    for _ in range(2):
        process(tmp_path, 2).run(broken=True)
    for index in (1, 3, 4, 5):
        process(tmp_path, index).run()
    assert process(tmp_path, 2).run(broken=True)
    assert '"error"' in (tmp_path / "manifest.jsonl").read_text().splitlines()[BROKEN]
    assert runs_of(tmp_path) == sorted([*ALL_RUNS, (2.0, 1), (2.0, 1)])
    assert process(tmp_path, 2).run()
    check_whole(tmp_path, whole)
    assert runs_of(tmp_path) == sorted([*ALL_RUNS, (2.0, 1), (2.0, 1), (2.0, 1)])


def test_images_that_were_deleted_after_the_merge_are_waited_for(whole, tmp_path):
    for index in range(1, SHARDS + 1):
        process(tmp_path, index).run()
    (tmp_path / "0.png").unlink()
    (tmp_path / "2.png").unlink()
    assert not process(tmp_path, 1).run()
    assert process(tmp_path, 2).run()
    check_whole(tmp_path, whole)
    assert runs_of(tmp_path) == sorted([*ALL_RUNS, (1.0, 1), (2.0, 1)])


def test_leftovers_of_every_machine_go_once_the_job_is_merged(whole, tmp_path, monkeypatch):
    targets = [tmp_path / name for name in ("0.png", "job.json", "manifest.jsonl", "contact_sheet.png")]
    targets += [tmp_path / Shard(1, SHARDS).record, tmp_path / "notes.txt"]
    with monkeypatch.context() as patch:
        patch.setattr(temporary, "_machine", lambda: "0" * 8)
        left = [temporary.temporary_path(target) for target in targets]
    for index in range(1, SHARDS):
        process(tmp_path, index).run()
    for file in left:
        file.write_text("half")
    (tmp_path / ".merge.lock").touch()  # of an older version
    process(tmp_path, 1).run()
    assert all(file.exists() for file in left)
    assert process(tmp_path, SHARDS).run()
    left[-1].unlink()  # of no file of this job
    check_whole(tmp_path, whole)


def test_a_manifest_of_other_images_is_one_line(tmp_path):
    for index in range(1, SHARDS + 1):
        process(tmp_path, index).run()
    manifest = tmp_path / "manifest.jsonl"
    lines = manifest.read_text().splitlines()
    for text, word in ((lines[:3], "found 3 images, expected 11"), ([*lines[1:], "3"], "line 1: image_name: found")):
        manifest.write_text("\n".join(text))
        with pytest.raises(InputError, match=f"manifest.jsonl: {word}"):
            process(tmp_path, 1).run()
