"""Probing a diffusers scheduler: run its schedule, full or late, on random vectors; record what goes in and out."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastgen.errors import InputError

LENGTH = 64  # of a probe vector
FIT, ZERO, CHECK = 0, 1, -1  # groups of probe vectors, see Trace
CLIP_DENOISED = (
    "clip_denoised"  # CMStochasticIterativeScheduler's option: its step clips to [-1, 1] whatever clip_sample_range
)


@dataclass(frozen=True)
class ProbeStart:
    """Where a run starts: at init_alpha * clean + init_sigma * noise. It runs the rows of `timesteps` (a tensor): the full
    schedule without its first `skipped_rows`."""

    timesteps: Any
    skipped_rows: int
    init_alpha: float
    init_sigma: float


@dataclass(frozen=True)
class Trace:
    """What went in and came out, row by row: (R, G, LENGTH) float64 for G independent groups of vectors.

    Groups: FIT, with x0 unclipped; ZERO, with x0 clipped to 0, only if the scheduler clips; CHECK, the last, with x0
    clipped as configured. z is 0 where the scheduler drew no noise.
    """

    timesteps: np.ndarray  # (R,)
    clip_ranges: np.ndarray  # (G,)
    x: np.ndarray
    net: np.ndarray
    z: np.ndarray
    network_input: np.ndarray
    out: np.ndarray
    x0: np.ndarray | None  # the step's pred_original_sample, or what it clipped
    converted: np.ndarray | None  # the scheduler's convert_model_output
    kept: np.ndarray | None  # what the step added to its memory `ets`, with (P|I)NDM


def start_run(scheduler: Any, num_inference_steps: int, noise_steps: int | None) -> ProbeStart:
    """Set the scheduler's timesteps, for the `noise_steps` least noisy steps if given. Raises InputError."""
    _check_step(scheduler)
    train_steps = scheduler.config.get("num_train_timesteps", 1000)
    if not 1 <= num_inference_steps <= train_steps:
        raise InputError(f"{num_inference_steps} inference steps, expected 1 to {train_steps}")
    if noise_steps is not None and not 1 <= noise_steps <= num_inference_steps:
        raise InputError(f"{noise_steps} noise steps, expected 1 to {num_inference_steps}, the inference steps")
    pndm = "skip_prk_steps" in scheduler.config
    if pndm and not scheduler.config.skip_prk_steps and (noise_steps or num_inference_steps) < scheduler.pndm_order:
        raise InputError(f"fewer than {scheduler.pndm_order} steps leave no room for the Runge-Kutta warm-up")
    try:
        scheduler.set_timesteps(num_inference_steps)
    except ZeroDivisionError as error:
        raise InputError(f"its set_timesteps cannot divide the schedule into {num_inference_steps}: {error}") from error
    full = scheduler.timesteps
    trailing = scheduler.config.get("timestep_spacing") == "trailing"
    if trailing and full.min() < 0 and not continuous(scheduler.config):
        raise InputError("diffusers' trailing spacing ends at timestep -1 here; choose another number of steps nearby")
    if noise_steps is None:
        _set_begin(scheduler, 0)
        return ProbeStart(full, 0, 0.0, float(getattr(scheduler, "init_noise_sigma", 1.0)))
    if type(scheduler).__name__ == "LMSDiscreteScheduler":
        raise InputError("cannot start late: its coefficients presume the steps before")
    late = _late_pndm(scheduler, noise_steps) if pndm else _late(scheduler, noise_steps)
    _set_begin(scheduler, len(full) - len(late))
    return ProbeStart(late, len(full) - len(late), *_noising(scheduler, late[0]))


def continuous(config: Mapping[str, Any]) -> bool:
    """Whether EulerDiscreteScheduler gives the network log(sigma) / 4, which may be negative, in place of timesteps."""
    return config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction"


def _check_step(scheduler: Any) -> None:
    """A table's step knows the prediction, the timestep and the state. Raises InputError if the scheduler's asks for more."""
    if not hasattr(scheduler, "step") or not hasattr(scheduler, "set_timesteps"):
        raise InputError("has no step() or no set_timesteps(), so it cannot become a solver table")
    parameters = inspect.signature(scheduler.step).parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]
    if required != ["model_output", "timestep", "sample"]:
        raise InputError(
            f"its step takes {', '.join(required)}, expected model_output, timestep, sample; so it cannot become a solver table"
        )


def _set_begin(scheduler: Any, row: int) -> None:
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(row)


def _late(scheduler: Any, noise_steps: int) -> Any:
    """Timesteps of the last steps; a second-order solver takes two rows per step, but one for the last."""
    rows_per_step = getattr(scheduler, "order", 1)
    steps = -(-len(scheduler.timesteps) // rows_per_step)
    if noise_steps > steps:
        raise InputError(f"{noise_steps} noise steps, but its schedule has {steps}")
    return scheduler.timesteps[(steps - noise_steps) * rows_per_step :]


def _late_pndm(scheduler: Any, noise_steps: int) -> Any:
    """Rows with a warm-up of their own, laid out as PNDMScheduler.set_timesteps does for the full schedule."""
    import torch

    kept = scheduler._timesteps[:noise_steps]  # ascending
    if scheduler.config.skip_prk_steps:
        rows = np.concatenate([kept[:-1], kept[-2:-1], kept[-1:]])[::-1]
    else:
        half = scheduler.config.num_train_timesteps // scheduler.num_inference_steps // 2
        warm_up = np.repeat(kept[-scheduler.pndm_order :], 2) + np.tile([0, half], scheduler.pndm_order)
        scheduler.prk_timesteps = warm_up[:-1].repeat(2)[1:-1][::-1].copy()
        rows = np.concatenate([scheduler.prk_timesteps, kept[:-3][::-1]])
    scheduler.timesteps = torch.from_numpy(rows.astype(np.int64))
    return scheduler.timesteps


def _noising(scheduler: Any, timestep: Any) -> tuple[float, float]:
    """alpha and sigma of the state alpha * clean + sigma * noise at a timestep, from the scheduler's own function."""
    import torch

    clean, noise = torch.eye(2, dtype=torch.float64).reshape(2, 2, 1, 1)
    timesteps = timestep.repeat(2)
    if hasattr(scheduler, "scale_noise"):  # flow matching
        noisy = scheduler.scale_noise(clean, timesteps, noise)
    elif hasattr(scheduler, "add_noise"):
        noisy = scheduler.add_noise(clean, noise, timesteps)
    else:
        raise InputError("cannot start late: it has no add_noise")
    alpha, sigma = noisy.flatten().tolist()
    return alpha, sigma


def run_probe(scheduler: Any, start: ProbeStart, step_options: Mapping[str, Any]) -> Trace:
    """Run the schedule once, all groups as one batch. The scheduler must not be used afterwards."""
    import torch

    class Exact(torch.Tensor):
        """float64 that stays float64: some schedulers compute in float32 whatever they are given."""

        def to(self, *args: Any, **kwargs: Any) -> Any:
            return self

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            """As torch's own for subclasses, without the parts that only other subclasses need: half of its time."""
            if func is torch.Tensor.clamp and denoised_ranges is not None:
                record["x0"].append(args[0])
                args = (args[0], -denoised_ranges, denoised_ranges)
            with torch._C.DisableTorchFunctionSubclass():
                result = func(*args, **(kwargs or {}))
            return result.as_subclass(cls) if type(result) is torch.Tensor else result

    clip_ranges = _set_clip_ranges(scheduler)
    denoised_ranges = torch.from_numpy(clip_ranges).reshape(3, 1, 1, 1) if scheduler.config.get(CLIP_DENOISED) else None
    rows, groups = len(start.timesteps), len(clip_ranges)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2 * rows + 1, groups, 1, 8, 8, dtype=torch.float64, generator=generator).as_subclass(Exact)
    net, z, x = values[:rows], values[rows:-1], values[-1] * max(start.init_sigma, 1.0)
    record: dict[str, list[Any]] = {name: [] for name in ("x", "network_input", "out", "x0", "converted", "kept")}
    draws = [0] * rows

    def draw(*args: Any, **kwargs: Any) -> Any:
        row = len(record["x"]) - 1
        draws[row] += 1
        return z[row]

    scale = getattr(scheduler, "scale_model_input", lambda x, timestep: x)
    _record_conversions(scheduler, record["converted"])
    asks_next = "prev_timestep" in inspect.signature(scheduler.step).parameters  # UnCLIP's: one less, unless told
    options = dict(step_options)
    with torch.inference_mode(), _noise_from(draw, type(scheduler)):
        for row, timestep in enumerate(start.timesteps):
            record["x"].append(x)
            record["network_input"].append(scale(x, timestep))
            if asks_next:
                options["prev_timestep"] = start.timesteps[row + 1] if row + 1 < rows else None
            result = scheduler.step(net[row], timestep, x, **options)
            x = result.prev_sample
            record["out"].append(x)
            record["kept"].extend(getattr(scheduler, "ets", ())[-1:])
            if denoised_ranges is None:
                record["x0"].append(getattr(result, "pred_original_sample", None))
    if max(draws) > 1:
        raise InputError(f"draws noise {max(draws)} times in one step, expected once at most")

    def array(tensor: Any) -> np.ndarray:
        return tensor.as_subclass(torch.Tensor).numpy().reshape(rows, groups, LENGTH)

    recorded: dict[str, Any] = {
        name: array(torch.stack(tensors)) if len(tensors) == rows and tensors[0] is not None else None
        for name, tensors in record.items()
    }
    recorded["z"] = array(z) * np.array(draws, dtype=np.float64)[:, None, None]
    timesteps = start.timesteps.to(torch.float64).numpy()
    return Trace(timesteps=timesteps, clip_ranges=clip_ranges, net=array(net), **recorded)


def _set_clip_ranges(scheduler: Any) -> np.ndarray:
    """Give every group its clip range, if the scheduler clips: (G,)."""
    import torch

    if scheduler.config.get(CLIP_DENOISED):
        return np.array([np.inf, 0.0, 1.0])
    if not (scheduler.config.get("clip_sample") and "clip_sample_range" in scheduler.config):
        return np.full(2, np.inf)
    ranges = np.array([np.inf, 0.0, scheduler.config.clip_sample_range])
    scheduler.register_to_config(clip_sample_range=torch.from_numpy(ranges).reshape(3, 1, 1, 1))
    return ranges


def _record_conversions(scheduler: Any, record: list[Any]) -> None:
    convert = getattr(scheduler, "convert_model_output", None)
    if convert is None:
        return

    def recorded(*args: Any, **kwargs: Any) -> Any:
        record.append(convert(*args, **kwargs))
        return record[-1]

    scheduler.convert_model_output = recorded


@contextmanager
def _noise_from(draw: Callable[..., Any], scheduler_class: type) -> Iterator[None]:
    """Replace diffusers' `randn_tensor` in the modules that the scheduler's classes live in, and put it back."""
    modules = {sys.modules[cls.__module__] for cls in scheduler_class.__mro__}
    originals = {module: module.randn_tensor for module in modules if hasattr(module, "randn_tensor")}
    try:
        for module in originals:
            module.randn_tensor = draw  # type: ignore[attr-defined]
        yield
    finally:
        for module, original in originals.items():
            module.randn_tensor = original  # type: ignore[attr-defined]
