"""One optimiser step: learning rate, micro-batches, gradients of all processes, average."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from fastgen.engines.torch_base import is_out_of_memory
from fastgen.errors import FastgenError, first_line
from fastgen.presets.recipe import Training
from fastgen.training.autocast import Precision
from fastgen.training.draws import Draws, batch_rows
from fastgen.training.logs import say
from fastgen.training.processes import Processes
from fastgen.training.state import State
from fastgen.training.tasks import Task


def optimise(task: Task, state: State, recipe: Training, precision: Precision, processes: Processes) -> Tensor:
    """One optimiser step over one global batch; returns (this process's share of the loss, gradient norm), (2,) on the device.

    Where memory runs out, this step and all later ones run with micro-batches of half the size.
    """
    rate = learning_rate(recipe, state.step) * state.progress.rate_scale
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    loss = gradients(task, state, recipe, precision, processes)
    state.scaler.unscale_(state.optimizer)
    norm = nn.utils.clip_grad_norm_(state.module.parameters(), recipe.max_grad_norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    for ema in state.emas.values():
        ema.update(state.module, state.step)
    return torch.stack([loss, norm.to(loss)])


def learning_rate(recipe: Training, step: int) -> float:
    """Linear warm-up, then constant, or half a cosine down to 0 (Loshchilov & Hutter, SGDR, 2017, eq. 5), or constant with a
    linear decay to 0 at the end; until that decay a run does not depend on its length (Hägele et al., Scaling Laws and
    Compute-Optimal Training Beyond Fixed Training Durations, 2024)."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    if recipe.lr_schedule == "warmup-stable-decay":
        left = (recipe.steps - step) / (recipe.decay_fraction * recipe.steps)
        return recipe.learning_rate * min(1.0, left)
    if recipe.lr_schedule != "cosine":
        return recipe.learning_rate
    share = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def gradients(task: Task, state: State, recipe: Training, precision: Precision, processes: Processes) -> Tensor:
    """Computes the global batch's gradients into the module's `.grad`; returns this process's share of the loss."""
    split = task.splits_batches
    positions = processes.part(np.arange(recipe.batch_size)) if split else np.arange(recipe.batch_size)
    rows = task.train_rows[batch_rows(len(task.train_rows), recipe.batch_size, recipe.seed, state.step)]
    while True:
        torch.manual_seed(recipe.seed + state.step * processes.count + processes.rank)  # for dropout layers
        try:
            loss = _micro_batches(task, state, recipe, precision, rows, positions)
            break
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            brief = first_line(error)
        state.optimizer.zero_grad(set_to_none=True)
        if precision.device.type == "cuda":
            torch.cuda.empty_cache()
        _halve(task, state, recipe, brief)
    processes.sum_gradients(state.module, 1.0 if split else 1 / processes.count)
    return loss if split else loss / processes.count


def _micro_batches(
    task: Task, state: State, recipe: Training, precision: Precision, rows: np.ndarray, positions: np.ndarray
) -> Tensor:
    total = torch.zeros((), device=precision.device)
    for part in np.split(positions, range(state.micro_batch, len(positions), state.micro_batch)):
        draws = Draws(recipe.seed, state.step, part, recipe.batch_size, precision.device)
        with precision.autocast():
            losses = task.losses(state.module, rows[part], draws)  # (b,)
        loss = losses.sum() / recipe.batch_size
        state.scaler.scale(loss).backward()
        total += loss.detach()
    return total


def _halve(task: Task, state: State, recipe: Training, brief: str) -> None:
    if state.micro_batch == 1 or not task.splits_batches:
        why = "even one example does not fit" if task.splits_batches else "its loss needs the whole batch"
        raise FastgenError(f"{task.name}: out of memory at step {state.step}, and {why}: {brief}")
    state.micro_batch = -(-state.micro_batch // 2)
    count = -(-recipe.batch_size // state.micro_batch)
    change = f"going on with micro-batches of {state.micro_batch}, accumulation {count}"
    hint = f"train.accumulation={count} avoids the detour"
    say(f"{task.name}: out of memory at step {state.step}; {change} ({hint})")
