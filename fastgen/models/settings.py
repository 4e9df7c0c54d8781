"""The records beside a model's networks: fastgen.json, and what training.json says of an unfinished run's pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from fastgen.files.jsonfiles import read_json
from fastgen.files.records import Index, Record, read_record
from fastgen.models.layout import SETTINGS
from fastgen.sampling.config import check_schedule
from fastgen.sampling.defaults import Sampling

TRAINING = "training.json"
SCHEDULER = "scheduler/scheduler_config.json"


class Pictures(Record, frozen=True, forbid_unknown_fields=False):
    """What generating reads of the record of a training. `image_mode`: how it made its pictures square."""

    image_mode: Literal["stretch", "pad", "crop", "figure"] | None = None


class Settings(Record, frozen=True):
    """fastgen.json: how the model generates, how it was trained, and the class id that training used for "no class"."""

    sampling: Sampling | None = None
    training: Pictures = Pictures()
    null_class: Index | None = None


class Run(Record, frozen=True, forbid_unknown_fields=False):
    """training.json of a run. `preset`: the preset that it trains, empty in old runs."""

    preset: Pictures | str | None = None


def read_settings(folder: Path) -> Settings | None:
    """fastgen.json; None where there is none: somebody else wrote the folder. Raises InputError."""
    file = folder / SETTINGS
    return read_record(file, Settings) if file.is_file() else None


def read_scheduler(folder: Path) -> dict[str, Any]:
    """scheduler_config.json. Raises InputError."""
    return check_schedule(read_json(folder / SCHEDULER, infinity=True), folder / SCHEDULER)


def trained_mode(folder: Path) -> str | None:
    """The preset's image_mode: from the record in fastgen.json, or, before training is finished, from training.json. Raises
    InputError."""
    settings = read_settings(folder)
    if settings is not None and settings.training.image_mode is not None:
        return settings.training.image_mode
    run = read_record(folder / TRAINING, Run) if (folder / TRAINING).is_file() else Run()
    return run.preset.image_mode if isinstance(run.preset, Pictures) else None
