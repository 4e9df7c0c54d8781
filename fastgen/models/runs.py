"""The default folders of runs: runs/<preset>-<time>/, with runs/latest pointing at the newest finished one."""

from __future__ import annotations

import os
import re
import secrets
import time
from pathlib import Path
from typing import Any

from msgspec import field

from fastgen.errors import InputError
from fastgen.files.records import Record, read_record
from fastgen.models.bundle import is_bundle

RECORD = "training.json"  # a training run's, in its folder
RUNS = Path("runs")
LATEST = RUNS / "latest"


class TrainingRecord(Record, frozen=True):
    """training.json: which job this folder is of. `data`: fingerprint of the dataset."""

    finished: bool
    preset: dict[str, Any] = field(default_factory=dict)
    data: str = ""


def new_run(preset: str) -> Path:
    """A new run's folder, or that of the newest unfinished run of the same preset, which then continues."""
    pattern = re.compile(re.escape(preset) + r"-\d{8}-\d{6}")  # `monsters` must not match `monsters-64-<time>`
    runs = [f for f in sorted(RUNS.glob("*")) if f.is_dir() and pattern.fullmatch(f.name)]
    unfinished = [f for f in runs if _unfinished(f)]
    return unfinished[-1] if unfinished else RUNS / f"{preset}-{time.strftime('%Y%m%d-%H%M%S')}"


def _unfinished(run: Path) -> bool:
    record = run / RECORD
    return record.is_file() and not read_record(record, TrainingRecord).finished


def set_latest(run: Path) -> None:
    """Point runs/latest at a run, in one step. A runs/latest that is no link is somebody's own: it stays."""
    if os.path.lexists(LATEST) and not LATEST.is_symlink():
        return
    link = RUNS / f".tmp-{secrets.token_hex(8)}"
    link.symlink_to(os.path.relpath(run, RUNS))
    link.replace(LATEST)


def latest_run() -> Path:
    """The newest finished run. InputError when there is none."""
    if not LATEST.exists():
        raise InputError("no model given and no runs/latest here; train one with `fastgen train PRESET --data DATA`")
    return LATEST.resolve()


def latest_model(source_kind: str | None, option: str | None = None) -> Path:
    """The latest run's bundle, or its model folder for an engine whose `source_kind` is "model"; None takes the bundle where
    there is one. `option`: of `fastgen export`, that builds what the engine runs. Raises InputError."""
    run = latest_run()
    bundle = run / "bundle"
    if source_kind == "model" or (source_kind is None and not is_bundle(bundle)):
        return run
    if not is_bundle(bundle):
        raise InputError(f"{run} has no bundle yet; `fastgen export{f' {option}' if option else ''}` makes it")
    return bundle
