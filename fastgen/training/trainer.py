"""The optimisation loop of every network."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from fastgen.errors import FastgenError, InputError
from fastgen.models import checkpoints
from fastgen.models.checkpoints import Checkpoint
from fastgen.presets.recipe import Training
from fastgen.training.autocast import Precision
from fastgen.training.compiling import prepare
from fastgen.training.curves import plot_losses
from fastgen.training.draws import VALIDATION, Draws
from fastgen.training.logs import TrainingLog, say
from fastgen.training.optimise import learning_rate, optimise
from fastgen.training.processes import Processes
from fastgen.training.state import State, initial, load, save
from fastgen.training.tasks import Task, check_accumulation

LOG_EVERY = 10  # steps between rows of the log; reading the loss makes a GPU wait
PLOT_EVERY_S = 60


@dataclass(frozen=True)
class TrainingRun:
    """The folders, device and precision of one stage of a job. `resume`: another run's checkpoint to begin at."""

    checkpoints: Path
    previews: Path
    log: TrainingLog
    precision: Precision
    job: str  # recorded in every checkpoint
    progress: bool = True
    processes: Processes = field(default_factory=Processes)
    resume: Checkpoint | None = None


def fit(task: Task, recipe: Training, run: TrainingRun) -> None:
    """Optimise `task.module` by the recipe, from the newest intact checkpoint on. At the end the module is in eval mode and
    has the averaged weights, the last or the best ones.

    Raises FastgenError when the loss is not finite, a checkpoint cannot be written, or torch.compile fails or gives
    other gradients where the recipe asks for it.
    """
    check_accumulation(task, recipe.accumulation)
    recipe = recipe.for_examples(len(task.train_rows))
    with run.processes.main_first():
        state = begin(task, recipe, run)
    if run.processes.is_main:
        run.log.rewind(task.name, state.step)
    prepare(task, state, recipe, run.precision, run.processes)
    show = run.progress and run.processes.is_main
    with tqdm(total=recipe.steps, initial=state.step, desc=task.name, unit="step", disable=not show) as bar:
        clock, last_plot = (time.perf_counter(), state.step), time.perf_counter()
        while state.step < recipe.steps:
            state.pending.append(optimise(task, state, recipe, run.precision, run.processes))
            state.step += 1
            bar.update()
            due = _due(state.step, recipe, len(task.train_rows))
            if not due:
                continue
            images_per_s = (state.step - clock[1]) * recipe.batch_size / (time.perf_counter() - clock[0])
            row = log_row(task, state, recipe, run) | {"images_per_s": round(images_per_s, 1)}
            bar.set_postfix(loss=f"{row['loss']:.4f}", images_per_s=f"{images_per_s:.1f}")
            with torch.compiler.set_stance("force_eager"):  # other batch sizes would be compiled for
                if "validation" in due:
                    row |= validate(task, state, recipe, run)
                if "preview" in due:
                    preview(task, state, run)
            if run.processes.is_main:
                run.log.write({"stage": task.name, "step": state.step, **row})
                if "checkpoint" in due:
                    save(state, run.checkpoints, run.job, recipe.checkpoint_limit)
                    if state.step == recipe.steps or time.perf_counter() - last_plot > PLOT_EVERY_S:
                        plot_losses(run.log, task.name, run.checkpoints)
                        last_plot = time.perf_counter()
            clock = time.perf_counter(), state.step
    if run.processes.is_main:
        try:  # an earlier process may have been killed before it deleted them
            checkpoints.keep_newest(run.checkpoints, recipe.checkpoint_limit)
        except FastgenError as error:
            say(f"warning: {error}")
    state.module.load_state_dict(final_weights(state, recipe, run))
    state.module.eval().requires_grad_(False)


def begin(task: Task, recipe: Training, run: TrainingRun) -> State:
    """The state at the newest intact checkpoint of this stage, else at `run.resume`, or the initial one.

    A run that begins at another's checkpoint writes it as its own first one, so that it needs the other no more.
    """
    state = initial(task.module, recipe, run.precision, len(task.train_rows))
    checkpoint = checkpoints.latest(run.checkpoints, say)
    if checkpoint is not None and checkpoint.extra.get("job") != run.job:
        raise InputError(f"{checkpoint.folder}: belongs to another job; delete {run.checkpoints}, or use another --out")
    if checkpoint is not None:
        load(state, checkpoint)
    elif run.resume is not None:
        load(state, run.resume)
        _branch_off(run.resume, state, recipe, run)
    if 0 < state.step < recipe.steps:
        say(f"{task.name}: continues at step {state.step} of {recipe.steps}")
    return state


def _branch_off(branch: Checkpoint, state: State, recipe: Training, run: TrainingRun) -> None:
    """Write the loaded branch point as this run's own checkpoint, with the best weights that were found before it.

    Raises InputError when it is past the last step of the recipe, FastgenError when the disk refuses.
    """
    if state.step > recipe.steps:
        raise InputError(f"{branch.folder}: is at step {state.step}, the recipe ends at {recipe.steps}")
    best = checkpoints.best(branch.folder.parent, say)
    if best is not None and best.step != state.progress.best_step:
        best = None  # of a later step, or of another branch
    if best is None:
        state.progress.best, state.progress.best_step = None, 0
    if run.processes.is_main:
        if best is not None:
            checkpoints.save_best(run.checkpoints, best.step, best.load("ema"), {**best.extra, "job": run.job})
        save(state, run.checkpoints, run.job, recipe.checkpoint_limit)


def log_row(task: Task, state: State, recipe: Training, run: TrainingRun) -> dict[str, float]:
    """The training figures of the steps since the last row. Raises FastgenError for a loss that is not finite."""
    losses, norms = torch.stack(state.pending).T  # (n,) each
    losses = run.processes.sum(losses.contiguous()).double().cpu().numpy()
    norms = norms.double().cpu().numpy()
    state.pending.clear()
    bad = ~np.isfinite(losses) | (~np.isfinite(norms) & (run.precision.name != "fp16"))
    if bad.any():
        step = state.step - len(losses) + int(bad.argmax()) + 1
        good = checkpoints.latest(run.checkpoints, say)
        where = f"the last good checkpoint is {good.folder}" if good else "there is no checkpoint yet"
        hint = "a smaller learning_rate or precision fp32 may help"
        raise FastgenError(f"{task.name}: the loss or its gradient is NaN or infinite at step {step}; {where}; {hint}")
    state.progress.loss_sum += float(losses.sum())
    state.progress.loss_count += len(losses)
    rate = learning_rate(recipe, state.step - 1) * state.progress.rate_scale
    row = {"loss": float(losses.mean()), "grad_norm": float(norms.mean()), "learning_rate": rate}
    return {**row, **task.parts(run.processes.sum)}


@torch.no_grad()
def validate(task: Task, state: State, recipe: Training, run: TrainingRun) -> dict[str, float]:
    """The loss of the averaged weights on the validation examples, with the same noise every time; saves the best weights."""
    with state.ema.swapped_in(state.module):
        loss = _validation_loss(task, state, recipe, run)
        figures = dict(task.figures(state.module))
    progress = state.progress
    figure = progress.loss_sum / progress.loss_count if recipe.final == "best-loss" else loss
    progress.loss_sum, progress.loss_count = 0.0, 0
    progress.adapt_rate(loss, recipe)
    if progress.improved(figure, state.step) and run.processes.is_main:
        extra = {"job": run.job, "loss": figure, "of": recipe.final}
        checkpoints.save_best(run.checkpoints, state.step, state.ema.weights, extra)
    return {"validation_loss": loss, **figures}


def _validation_loss(task: Task, state: State, recipe: Training, run: TrainingRun) -> float:
    rows = task.validation_rows[: recipe.validation_limit]
    share = run.processes.part(np.arange(len(rows))) if task.splits_batches else np.arange(len(rows))
    total = torch.zeros((), dtype=torch.float64, device=run.precision.device)
    for positions in np.array_split(share, max(1, -(-len(share) // state.micro_batch))):
        if len(positions):
            draws = Draws(recipe.seed, VALIDATION, positions, len(rows), run.precision.device)
            with run.precision.autocast():
                total += task.losses(state.module, rows[positions], draws).sum()
    if task.splits_batches:
        total = run.processes.sum(total)
    return float(total) / len(rows)


@torch.no_grad()
def preview(task: Task, state: State, run: TrainingRun) -> None:
    if not run.processes.is_main:
        return
    with state.ema.swapped_in(state.module):
        image = task.preview(state.module)
    if image is not None:
        run.previews.mkdir(parents=True, exist_ok=True)
        prefix = "" if task.name == "unet" else f"{task.name}-"
        image.save(run.previews / f"{prefix}{state.step:06d}.png")


def final_weights(state: State, recipe: Training, run: TrainingRun) -> Mapping[str, torch.Tensor]:
    """The last averaged weights, or the best ones where the recipe says so."""
    if recipe.final == "last":
        return state.ema.weights
    with run.processes.main_first():
        return checkpoints.read(run.checkpoints / checkpoints.BEST).load("ema")


def _due(step: int, recipe: Training, examples: int) -> set[str]:
    """The tasks that are due after this step: "log", "validation", "preview", "checkpoint"."""

    def due(every: int, epochs: float = 0) -> bool:
        by_step = every > 0 and step % every == 0
        before, now = ((s * recipe.batch_size) // (epochs * examples) if epochs else 0 for s in (step - 1, step))
        return step == recipe.steps or by_step or now > before

    tasks = {
        "log": due(LOG_EVERY),
        "validation": due(recipe.validate_every),
        "preview": due(recipe.preview_every, recipe.preview_every_epochs),
        "checkpoint": due(recipe.checkpoint_every, recipe.checkpoint_every_epochs),
    }
    return {name for name, is_due in tasks.items() if is_due}
