"""A training job and its folder: claiming the folder, the model written before and after training, the finished mark."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fastgen.errors import FastgenError, InputError
from fastgen.files.folders import make_folder, new_folder, remove_folder, scratch_folder, sync_tree
from fastgen.files.jsonfiles import brief, read_json, write_json, write_new_json
from fastgen.files.records import builtins, read_record, to_record
from fastgen.files.temporary import is_temporary, remove_leftovers
from fastgen.models import checkpoints
from fastgen.models.checkpoint_choice import OUTLINE
from fastgen.models.checkpoints import Checkpoint
from fastgen.models.runs import RECORD, TrainingRecord
from fastgen.presets import Preset
from fastgen.training.autocast import choose
from fastgen.training.logs import Tracker, TrainingLog, say
from fastgen.training.processes import Processes
from fastgen.training.trainer import TrainingRun

LOG = "log.jsonl"
LOCK = ".lock"  # held while a process trains into the folder
STAGES = ("vae", "text_encoder", "unet", "evaluator")  # in the order in which they are trained
# Keys of a recipe that do not change the trained weights: they may differ when a job continues.
OPERATIONAL = (
    "checkpoint_every",
    "checkpoint_every_epochs",
    "checkpoint_limit",
    "preview_every",
    "preview_every_epochs",
    "accumulation",
)


@dataclass(frozen=True)
class Job:
    """A preset, a dataset and the folder they are trained into."""

    folder: Path
    identity: Mapping[str, Any]
    device: str | None = None
    progress: bool = True
    processes: Processes = field(default_factory=Processes)
    tracker: Tracker | None = None
    resume: Path | None = None  # a checkpoint of another run to begin at

    @property
    def finished(self) -> bool:
        return read_record(self.folder / RECORD, TrainingRecord).finished

    @property
    def log(self) -> TrainingLog:
        return TrainingLog(self.folder / LOG, self.tracker)

    def run(self, stage: str, precision: str) -> TrainingRun:
        """The folders, the device and the precision for the training of `stage`."""
        text = json.dumps(self.identity, sort_keys=True)
        return TrainingRun(
            checkpoints=self.folder / "checkpoints" / stage,
            previews=self.folder / "previews",
            log=self.log,
            precision=choose(precision, self.device),
            job=hashlib.sha256(text.encode()).hexdigest(),
            progress=self.progress,
            processes=self.processes,
            resume=None if self.resume is None else _branch_point(self.resume, stage),
        )

    def outline(self, write: Callable[[Path], None]) -> None:
        """Save what `write(folder)` writes, a model folder without trained weights, among the checkpoints: with it a
        checkpoint can generate before training is finished."""
        target = self.folder / "checkpoints" / OUTLINE
        if not self.processes.is_main or target.exists():
            return
        with new_folder(target) as folder:
            write(folder)

    def finish(self, write: Callable[[Path], None]) -> None:
        """Put what `write(folder)` writes into the job's folder, each entry complete, and mark the job finished."""
        if not self.processes.is_main:
            return
        with scratch_folder(self.folder / "model") as temporary:
            write(temporary)
            sync_tree(temporary)
            for entry in sorted(temporary.iterdir(), key=lambda e: e.is_file()):  # model_index.json after the weights
                target = self.folder / entry.name
                if target.is_dir():
                    shutil.rmtree(target)
                os.replace(entry, target)
        if (outline := self.folder / "checkpoints" / OUTLINE).exists():
            try:
                remove_folder(outline)  # before the mark: nothing is cleaned up in a finished job's folder
            except FastgenError as error:
                say(f"warning: {error}")
        write_json(self.folder / RECORD, {"finished": True, **self.identity})


def check_folder(folder: Path, preset: Preset, fingerprint: str) -> bool:
    """Whether `folder` holds this job, and it is finished. Nothing is written.

    Raises InputError when the folder holds something else, or the job of another preset or other data; it names the first
    difference.
    """
    for parent in (folder, *folder.parents):
        if os.path.lexists(parent) and not parent.is_dir():
            raise InputError(f"{parent}: is not a folder; choose another --out")
    if os.path.lexists(folder / RECORD):
        record = read_record(folder / RECORD, TrainingRecord)
        _compare(folder, record, preset, fingerprint)
        TrainingLog(folder / LOG).check()
        return record.finished
    if folder.is_dir() and any(entry.name != LOCK and not is_temporary(entry.name) for entry in folder.iterdir()):
        raise InputError(f"{folder}: is not empty and holds no training job; choose another --out")
    return False


def check_shared(folder: Path, processes: Processes) -> None:
    """InputError for a process that does not see what the main process wrote in `folder` before: it is on another machine."""
    if not processes.is_main and not os.path.lexists(folder / RECORD):
        missing = f"process {processes.rank} of {processes.count} does not see the {RECORD} of the main process there"
        raise InputError(f"--out {folder}: {missing}; give a folder that all machines share")


@contextmanager
def open_job(folder: Path, preset: Preset, fingerprint: str, **settings: Any) -> Iterator[Job]:
    """Claim an empty folder for a job, or open the same job's folder again, for the time of the block. `settings`: further
    fields of Job.

    Raises InputError as `check_folder` does, and while another process trains into the folder.
    """
    identity = {"preset": _plain(preset), "data": fingerprint}
    make_folder(folder)
    with _locked(folder, settings.get("processes", Processes()).is_main):
        if not write_new_json(folder / RECORD, {"finished": False, **identity}):
            check_folder(folder, preset, fingerprint)
            # As an earlier version wrote it: its checkpoints have the digest of just this.
            identity = {key: value for key, value in read_json(folder / RECORD).items() if key != "finished"}
        remove_leftovers(folder)
        yield Job(folder, identity, **settings)


@contextmanager
def _locked(folder: Path, is_main: bool) -> Iterator[None]:
    """Keep other jobs out of the folder for the time of the block; the main process does it for all of one job."""
    if not is_main:
        yield
        return
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise InputError(f"{folder}: another process trains into it; wait for it, or choose another --out") from None
    except OSError as error:
        raise InputError(f"{folder}: cannot be used as the output folder: {error.strerror}") from None
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / LOCK).unlink(missing_ok=True)
        lock.release()


def check_branch_point(checkpoint: Path, out: Path) -> None:
    """Raises InputError unless `checkpoint` is RUN/checkpoints/STAGE/step-NNNNNN, intact, and of another run than `out`."""
    if checkpoint.parent.name not in STAGES:
        expected = f"RUN/checkpoints/STAGE/step-000500, STAGE one of {', '.join(STAGES)}"
        raise InputError(f"{checkpoint}: is no checkpoint to resume from; expected {expected}")
    checkpoints.read(checkpoint)
    if checkpoint.resolve().is_relative_to(out.resolve()):
        raise InputError(f"{checkpoint}: is this run's own checkpoint; to branch off there, choose another --out")


def _branch_point(checkpoint: Path, stage: str) -> Checkpoint | None:
    """The checkpoint of another run at which `stage` begins, None for a stage that comes later. `checkpoint` is
    RUN/checkpoints/STAGE/step-NNNNNN: for its own stage that one, for another the latest of the same stage in RUN.

    Raises InputError when RUN has none of an earlier stage: `checkpoint` was trained with its network.
    """
    if checkpoint.parent.name == stage:
        return checkpoints.read(checkpoint)
    found = checkpoints.latest(checkpoint.parent.parent / stage, say)
    if found is None and STAGES.index(stage) < STAGES.index(checkpoint.parent.name):
        missing = checkpoint.parent.parent / stage
        raise InputError(f"{missing}: holds no checkpoint, and {checkpoint} was trained with that network")
    return found


def _plain(preset: Preset) -> dict[str, Any]:
    """What decides the trained weights, as JSON has it."""
    values: dict[str, Any] = builtins(preset)
    del values["preview"]
    for part in values.values():
        for key in OPERATIONAL:
            if isinstance(part, dict) and part.get("train"):
                part["train"].pop(key, None)
    return values


def _compare(folder: Path, record: TrainingRecord, preset: Preset, fingerprint: str) -> None:
    recorded = to_record(
        record.preset, Preset, folder / RECORD, "preset"
    )  # a key that is newer than it has its default
    there, here = (dict(flat(_plain(job))) for job in (recorded, preset))
    for key in sorted(there.keys() | here.keys()):
        if there.get(key) != here.get(key):
            what = f"{key} = {brief(there.get(key))} there and {brief(here.get(key))} here"
            raise InputError(f"{folder}: holds another job ({what}); continue that one, or choose another --out")
    if record.data != fingerprint:
        raise InputError(f"{folder}: holds a job on other data; continue with that data, or choose another --out")


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested tables as pairs of dotted key and value."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from flat(inner, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value
