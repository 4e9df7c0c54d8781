"""Training: a preset and a dataset folder -> a model folder."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fastgen.data import Dataset, read_dataset
from fastgen.data.attributes import with_labels
from fastgen.presets import Preset
from fastgen.training.assembly import ModelPlan, plan_evaluator, plan_model
from fastgen.training.autocast import choose
from fastgen.training.examples import load_examples
from fastgen.training.logs import say
from fastgen.training.processes import join
from fastgen.training.run_folder import check_branch_point, check_folder, check_shared, flat, open_job
from fastgen.training.stages import train_evaluator, train_model
from fastgen.training.trackers import installed_tracker, tracking

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
    Raises InputError, before anything is written, for data that does not suit the preset, for networks that do not fit each
    other, for a folder with another job, and for a `resume` that is no checkpoint; and on a machine that does not see the
    folder of the main process. FastgenError when the loss is not finite or the disk is full.
    """
    out = Path(out)
    dataset = data if isinstance(data, Dataset) else read_dataset(data)
    if preset.evaluator is not None:
        dataset = with_labels(dataset)
    target = choose("fp32", device).device
    tracker_name = installed_tracker(tracker)
    if resume is not None:
        check_branch_point(resume, out)
    processes = join(target)
    with ExitStack() as stack:
        with processes.main_first():
            check_shared(out, processes)
            if check_folder(out, preset, dataset.fingerprint):
                say(f"{out}: already finished")
                return out
            examples = load_examples(dataset, preset, skip_bad)
            plan = (plan_model if preset.evaluator is None else plan_evaluator)(preset, examples, device)
            settings: dict[str, Any] = {
                "device": device,
                "progress": progress,
                "processes": processes,
                "resume": resume,
            }
            job = stack.enter_context(open_job(out, preset, dataset.fingerprint, **settings))
        told = tracking(tracker_name, out, dict(flat(job.identity)), target.type == "cpu")
        job = dataclasses.replace(job, tracker=stack.enter_context(told))
        if isinstance(plan, ModelPlan):
            train_model(plan, preset, examples, job)
        else:
            train_evaluator(plan, preset, examples, job)
    return out
