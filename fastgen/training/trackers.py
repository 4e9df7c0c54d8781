"""Experiment trackers, through accelerate: tensorboard, wandb, mlflow, ..., whatever it knows and is installed."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastgen.errors import InputError, unknown
from fastgen.training.logs import Tracker, say

DEFAULT, NONE = "tensorboard", "none"
FOLDER = "tracking"
SCALARS = (int, float, str, bool)  # types that every tracker takes


@contextmanager
def tracking(name: str | None, folder: Path, settings: Mapping[str, Any], cpu: bool) -> Iterator[Tracker | None]:
    """A function `(values, step)` that passes numbers to the experiment tracker `name`, of `installed_tracker`; its files go to
    `folder`/tracking. None for none."""
    if name is None:
        yield None
        return
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=cpu, log_with=name, project_dir=folder / FOLDER)
    config = {key: value if isinstance(value, SCALARS) else json.dumps(value) for key, value in settings.items()}
    accelerator.init_trackers(folder.name or "fastgen", config=config)
    try:
        yield lambda values, step: accelerator.log(dict(values), step=step)
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


def installed_tracker(name: str | None) -> str | None:
    """The tracker `name`; None is tensorboard where it is installed, "none" is None. Raises InputError for a tracker that
    accelerate does not know, or that is not installed."""
    if name == NONE:
        return None
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    known = [str(getattr(kind, "value", kind)) for kind in LOGGER_TYPE_TO_CLASS]
    tracker = name or DEFAULT
    if tracker not in known:
        raise unknown("tracker", tracker, [*known, NONE])
    if tracker == DEFAULT:
        installed = any(map(importlib.util.find_spec, ("tensorboard", "tensorboardX")))
    else:
        installed = importlib.util.find_spec(tracker) is not None
    if installed:
        return tracker
    if name is None:
        say("note: tensorboard is not installed: the curves are in log.jsonl and loss.png alone")
        return None
    raise InputError(f"tracker {tracker}: is not installed; pip install {tracker}")
