"""Training: a preset and a dataset folder -> a model folder."""

from __future__ import annotations

from pathlib import Path

from fastgen.config import Preset
from fastgen.data import read_dataset
from fastgen.training.examples import load_examples
from fastgen.training.families import train_evaluator, train_labels, train_text
from fastgen.training.job import open_job
from fastgen.training.logs import say

__all__ = ["train"]

FAMILIES = {"text": train_text, "labels": train_labels, "evaluator": train_evaluator}


def train(
    preset: Preset, data: Path, out: Path, *, skip_bad: bool = False, progress: bool = True, device: str | None = None
) -> Path:
    """Train all networks of a preset on a dataset folder, and return `out`, which then is a model folder.

    The same call continues a job that was interrupted, from its last checkpoint, with the same result as if it had not
    been; for a finished job it does nothing. `skip_bad` leaves unreadable images out. `device`: "cpu", "cuda", ...; the
    GPU if there is one. Raises InputError for data that does not suit the preset and for a folder with another job,
    FastgenError when the loss is not finite or the disk is full.
    """
    dataset = read_dataset(data)
    job = open_job(Path(out), preset, dataset.fingerprint, device, progress)
    if job.finished:
        say(f"{out}: already finished")
        return Path(out)
    examples = load_examples(dataset, preset, skip_bad)
    FAMILIES[preset.family](preset, examples, job)
    return Path(out)
