"""Training: a preset and a dataset folder -> a model folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fastgen.data import Dataset, read_dataset
from fastgen.data.attributes import with_labels
from fastgen.errors import InputError
from fastgen.presets import Preset
from fastgen.training.autocast import choose
from fastgen.training.examples import load_examples
from fastgen.training.logs import say
from fastgen.training.processes import join
from fastgen.training.run_folder import check_branch_point, flat, open_job
from fastgen.training.stages import train_evaluator, train_model
from fastgen.training.trackers import tracking

__all__ = ["train"]


def train(
    preset: Preset,
    data: Path | Dataset,
    out: Path,
    *,
    skip_bad: bool = False,
    progress: bool = True,
    device: str | None = None,
    tracker: str | None = None,
    resume: Path | None = None,
) -> Path:
    """Train all networks of a preset on a dataset or its folder, and return `out`, which then is a model folder.

    The same call continues an interrupted job from its last checkpoint; the result is that of an uninterrupted job. For a
    finished job it does nothing. `accelerate launch` starts several processes, which share every batch.
    `skip_bad` leaves unreadable images out. `device`: "cpu", "cuda", ...; the GPU if there is one. `tracker`: see
    `trackers.tracking`. `resume`: the checkpoint of another run, RUN/checkpoints/STAGE/step-NNNNNN, at which this one begins.
    Raises InputError for data that does not suit the preset, for a folder with another job, and for a `resume` that is no
    checkpoint; FastgenError when the loss is not finite or the disk is full.
    """
    out = Path(out)
    dataset = data if isinstance(data, Dataset) else read_dataset(data)
    if preset.evaluator is not None:
        dataset = with_labels(dataset)
    target = choose("fp32", device).device
    if resume is not None:
        check_branch_point(resume)
    processes = join(target)
    with processes.main_first():
        job = open_job(out, preset, dataset.fingerprint, device=device, progress=progress, processes=processes)
        if job.finished:
            say(f"{out}: already finished")
            return out
        if resume is not None and resume.resolve().is_relative_to(out.resolve()):
            raise InputError(f"{resume}: is this run's own checkpoint; to branch off there, choose another --out")
        examples = load_examples(dataset, preset, skip_bad)
    with tracking(tracker, out, dict(flat(job.identity)), target.type == "cpu") as tell:
        train_stages = train_model if preset.evaluator is None else train_evaluator
        train_stages(preset, examples, dataclasses.replace(job, tracker=tell, resume=resume))
    return out
