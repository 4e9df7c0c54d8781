"""A training job and its folder: claiming the folder, the model written before and after training, the finished mark."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastgen.errors import InputError
from fastgen.files.folders import new_folder, scratch_folder, sync_tree
from fastgen.files.jsonfiles import read_json, write_json
from fastgen.files.temporary import remove_leftovers
from fastgen.models import checkpoints
from fastgen.models.checkpoint_choice import OUTLINE
from fastgen.models.checkpoints import Checkpoint
from fastgen.presets import Preset
from fastgen.training.autocast import choose
from fastgen.training.logs import Tracker, TrainingLog, say
from fastgen.training.processes import Processes
from fastgen.training.trainer import TrainingRun

FILE = "training.json"
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
        return bool(read_json(self.folder / FILE)["finished"])

    @property
    def log(self) -> TrainingLog:
        return TrainingLog(self.folder / "log.jsonl", self.tracker)

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
        write_json(self.folder / FILE, {"finished": True, **self.identity})
        shutil.rmtree(self.folder / "checkpoints" / OUTLINE, ignore_errors=True)


def open_job(folder: Path, preset: Preset, fingerprint: str, **settings: Any) -> Job:
    """Claim an empty folder for a job, or open the same job's folder again. `settings`: further fields of Job.

    Raises InputError when the folder holds something else, or the job of another preset or other data; it names the
    first difference.
    """
    identity = {"preset": _plain(preset), "data": fingerprint}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        occupied = any(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder}: cannot be used as the output folder: {error.strerror}") from None
    if (folder / FILE).exists():
        _compare(folder, read_json(folder / FILE), identity)
    elif occupied:
        raise InputError(f"{folder}: is not empty and holds no training job; choose another --out")
    else:
        write_json(folder / FILE, {"finished": False, **identity})
    remove_leftovers(folder)
    return Job(folder, identity, **settings)


def check_branch_point(checkpoint: Path) -> None:
    """Raises InputError unless `checkpoint` is RUN/checkpoints/STAGE/step-NNNNNN, and intact."""
    if checkpoint.parent.name not in STAGES:
        expected = f"RUN/checkpoints/STAGE/step-000500, STAGE one of {', '.join(STAGES)}"
        raise InputError(f"{checkpoint}: is no checkpoint to resume from; expected {expected}")
    checkpoints.read(checkpoint)


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
    values = json.loads(json.dumps(dataclasses.asdict(preset)))
    del values["preview"]
    for part in values.values():
        for key in OPERATIONAL:
            if isinstance(part, dict) and part.get("train"):
                part["train"].pop(key, None)
    return values


def _compare(folder: Path, record: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    there, here = (dict(flat(job.get("preset", {}))) for job in (record, identity))
    for key in sorted(there.keys() | here.keys()):
        if there.get(key) != here.get(key):
            what = f"{key} = {there.get(key)!r} there and {here.get(key)!r} here"
            raise InputError(f"{folder}: holds another job ({what}); continue that one, or choose another --out")
    if record.get("data") != identity["data"]:
        raise InputError(f"{folder}: holds a job on other data; continue with that data, or choose another --out")


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested tables as pairs of dotted key and value."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from flat(inner, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value
