"""The optimisation loop of every network."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastgen.config import Training
from fastgen.errors import FastgenError, InputError
from fastgen.training import checkpoints
from fastgen.training.draws import VALIDATION, Draws, batch_rows
from fastgen.training.ema import Ema
from fastgen.training.logs import Log, say
from fastgen.training.optimizers import build_optimizer
from fastgen.training.precision import Precision
from fastgen.training.tasks import Task, check_accumulation

LOG_EVERY = 10  # steps between rows of the log, and between looks at the loss, which make a GPU wait


@dataclass(frozen=True)
class Run:
    """Where one stage of a job writes, and what it computes on."""

    checkpoints: Path
    previews: Path
    log: Log
    precision: Precision
    job: str  # recorded in every checkpoint
    progress: bool = True


@dataclass
class State:
    """Everything that changes during training."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: Ema
    step: int = 0  # optimiser steps done
    pending: list[Tensor] = field(default_factory=list)  # (loss, gradient norm) of steps not yet looked at


def fit(task: Task, recipe: Training, run: Run) -> None:
    """Optimise `task.module` by the recipe, from the newest intact checkpoint on; it ends up in eval mode, with the
    averaged weights.

    Raises FastgenError when the loss is not finite, or a checkpoint cannot be written.
    """
    check_accumulation(task, recipe.accumulation)
    state = begin(task, recipe, run)
    run.log.rewind(task.name, state.step)
    with tqdm(total=recipe.steps, initial=state.step, desc=task.name, unit="step", disable=not run.progress) as bar:
        clock = time.perf_counter(), state.step
        while state.step < recipe.steps:
            state.pending.append(optimise(task, state, recipe, run.precision))
            state.step += 1
            bar.update()
            due = {name: _due(state.step, every, recipe) for name, every in _intervals(recipe).items()}
            row: dict[str, float] = {}
            if any(due.values()):  # always look before a checkpoint: it must not hold NaN
                images_per_s = (state.step - clock[1]) * recipe.batch_size / (time.perf_counter() - clock[0])
                row = look(task, state, recipe, run) | {"images_per_s": round(images_per_s, 1)}
                bar.set_postfix(loss=f"{row['loss']:.4f}", images_per_s=f"{images_per_s:.1f}")
            if due["validation"]:
                row |= validate(task, state, recipe, run.precision)
            if row:
                run.log.write({"stage": task.name, "step": state.step, **row})
                clock = time.perf_counter(), state.step
            if due["preview"]:
                preview(task, state, run)
            if due["checkpoint"]:
                save(state, recipe, run)
    state.module.load_state_dict(state.ema.weights)
    state.module.eval().requires_grad_(False)


def begin(task: Task, recipe: Training, run: Run) -> State:
    """The state at the newest intact checkpoint of this stage, or the initial one."""
    device = run.precision.device
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    module = task.module.to(device=device, memory_format=layout).train()  # type: ignore[call-overload]
    optimizer = build_optimizer(module, recipe, run.precision.dtype)
    scaler = torch.amp.GradScaler(device.type, enabled=run.precision.name == "fp16")
    state = State(module, optimizer, scaler, Ema(module, recipe.ema_decay))
    checkpoint = checkpoints.latest(run.checkpoints, say)
    if checkpoint is not None:
        if checkpoint.extra["job"] != run.job:
            raise InputError(
                f"{checkpoint.folder}: belongs to another job; delete {run.checkpoints}, or use another --out"
            )
        module.load_state_dict(checkpoint.load("model"))
        state.ema.load(checkpoint.load("ema"))
        _load_optimizer(optimizer, checkpoint.load("optimizer"))
        scaler.load_state_dict(dict(checkpoint.extra["scaler"]))
        state.step = checkpoint.step
        if 0 < state.step < recipe.steps:
            say(f"{task.name}: continues at step {state.step} of {recipe.steps}")
    return state


def optimise(task: Task, state: State, recipe: Training, precision: Precision) -> Tensor:
    """One optimiser step over one global batch; returns its (loss, gradient norm), still on the device."""
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(recipe, state.step)
    torch.manual_seed(recipe.seed + state.step)  # for modules that draw by themselves, such as dropout layers
    rows = task.train_rows[batch_rows(len(task.train_rows), recipe.batch_size, recipe.seed, state.step)]
    total = torch.zeros((), device=precision.device)
    for positions in np.split(np.arange(recipe.batch_size), recipe.accumulation):
        draws = Draws(recipe.seed, state.step, positions, recipe.batch_size, precision.device)
        with precision.autocast():
            losses = task.losses(state.module, rows[positions], draws)  # (b,)
        loss = losses.sum() / recipe.batch_size
        state.scaler.scale(loss).backward()
        total += loss.detach()
    state.scaler.unscale_(state.optimizer)
    norm = nn.utils.clip_grad_norm_(state.module.parameters(), recipe.max_grad_norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.ema.update(state.module, state.step)
    return torch.stack([total, norm.to(total)])


def learning_rate(recipe: Training, step: int) -> float:
    """Linear warm-up, then constant, or half a cosine down to 0 (Loshchilov & Hutter, SGDR, 2017, eq. 5)."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    if recipe.lr_schedule == "constant":
        return recipe.learning_rate
    share = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def look(task: Task, state: State, recipe: Training, run: Run) -> dict[str, float]:
    """The steps since the last look as a row of the log. Raises FastgenError for a loss that is not finite."""
    losses, norms = torch.stack(state.pending).cpu().numpy().T
    state.pending.clear()
    bad = ~np.isfinite(losses) | (~np.isfinite(norms) & (not state.scaler.is_enabled()))
    if bad.any():
        step = state.step - len(losses) + int(bad.argmax()) + 1
        good = checkpoints.latest(run.checkpoints, say)
        where = f"the last good checkpoint is {good.folder}" if good else "there is no checkpoint yet"
        hint = "a smaller learning_rate or precision fp32 may help"
        raise FastgenError(f"{task.name}: the loss or its gradient is NaN or infinite at step {step}; {where}; {hint}")
    rate = learning_rate(recipe, state.step - 1)
    return {"loss": float(losses.mean()), "grad_norm": float(norms.mean()), "learning_rate": rate}


@torch.no_grad()
def validate(task: Task, state: State, recipe: Training, precision: Precision) -> dict[str, float]:
    """The averaged weights' loss on the validation examples, with the same noise every time."""
    rows = task.validation_rows[: recipe.validation_limit]
    size = recipe.batch_size // recipe.accumulation
    total = 0.0
    with state.ema.swapped_in(state.module):
        for positions in np.array_split(np.arange(len(rows)), -(-len(rows) // size)):
            draws = Draws(recipe.seed, VALIDATION, positions, len(rows), precision.device)
            with precision.autocast():
                total += float(task.losses(state.module, rows[positions], draws).sum())
        figures = task.figures(state.module)
    return {"validation_loss": total / len(rows), **figures}


@torch.no_grad()
def preview(task: Task, state: State, run: Run) -> None:
    with state.ema.swapped_in(state.module):
        image = task.preview(state.module)
    if image is not None:
        run.previews.mkdir(parents=True, exist_ok=True)
        prefix = "" if task.name == "unet" else f"{task.name}-"
        image.save(run.previews / f"{prefix}{state.step:06d}.png")


def save(state: State, recipe: Training, run: Run) -> None:
    parts = {
        "model": state.module.state_dict(),
        "ema": state.ema.weights,
        "optimizer": {
            f"{index}.{name}": value
            for index, values in state.optimizer.state_dict()["state"].items()
            for name, value in values.items()
        },
    }
    extra: dict[str, Any] = {"job": run.job, "scaler": state.scaler.state_dict()}
    checkpoints.save(run.checkpoints, state.step, parts, extra, recipe.checkpoint_limit)


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _intervals(recipe: Training) -> dict[str, int]:
    return {
        "log": LOG_EVERY,
        "validation": recipe.validate_every,
        "preview": recipe.preview_every,
        "checkpoint": recipe.checkpoint_every,
    }


def _due(step: int, every: int, recipe: Training) -> bool:
    return step == recipe.steps or (every > 0 and step % every == 0)
