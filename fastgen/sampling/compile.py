"""Samplers as tables: any diffusers scheduler whose step is linear, compiled by probing its own `step()`.

The scheduler runs its whole schedule on random float64 vectors of length 64, fed its own outputs. One least-squares
problem per row then yields the coefficients of `SolverTable`, at the smallest history depth that fits; a second set of
vectors, which took no part in the fit, confirms them. No sampler is written by hand, and diffusers stays the reference.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from fastgen.errors import InputError
from fastgen.sampling.probe import CHECK, FIT, LENGTH, ZERO, Trace, continuous, run_probe, start_run
from fastgen.sampling.schedulers import default_name, make_scheduler
from fastgen.sampling.stability import refuse_unstable
from fastgen.sampling.tables import SolverTable, format_key, parse_key

MAX_DEPTH = 16
TOLERANCE = 1e-9  # relative residual of a fit: below 1e-12 as a rule, 1e-10 where x0 is 20,000 times the state
CONFIRMED = 1e-6  # the same on other vectors, whose terms are smaller by orders of magnitude where x0 is clipped
NEGLIGIBLE = 1e-13  # a term this small beside the others is rounding
COMMON: tuple[str, ...] = ("ddpm", "ddim", "pndm", "pndm-prk", "dpmpp-2m", "dpmpp-2m-sde", "unipc", "deis")
COMMON += ("euler", "euler-ancestral", "heun")
COMMON_STEPS = (*range(1, 51), *range(60, 151, 10))

Coefficients = dict[str, np.ndarray]  # SolverTable's p, q, r, x0_p, x0_q, a, b, d, c


def compile_table(
    scheduler: Any,
    num_inference_steps: int,
    noise_steps: int | None = None,
    *,
    name: str | None = None,
    **step_options: Any,
) -> SolverTable:
    """The table of a diffusers scheduler at `num_inference_steps`; the scheduler itself is left untouched.

    `noise_steps=K`: a late start; the K least noisy of the schedule's steps run, warm-up rows not counted, from the
    state that the scheduler's `add_noise` makes at the first of them, with a fresh memory (that row is first order).
    `step_options` go to `step()`, such as `eta`. Raises InputError for a number of steps out of range and for a
    scheduler whose step is not linear in the state, the predictions and the noise of its own row.
    """
    with _labelled(scheduler, name, num_inference_steps):
        fresh = type(scheduler).from_config(scheduler.config)
    return _compile(fresh, num_inference_steps, noise_steps, name, step_options)


def _compile(
    scheduler: Any, steps: int, noise_steps: int | None, name: str | None, step_options: Mapping[str, Any]
) -> SolverTable:
    """`compile_table` with a fresh scheduler, which is used up."""
    with _labelled(scheduler, name, steps):
        _check_config(scheduler.config)
        start = start_run(scheduler, steps, noise_steps)
        trace = run_probe(scheduler, start, step_options)
        basis, coefficients = _solve(scheduler, trace)
        clips = coefficients["d"].any() or coefficients["r"].any()
        return SolverTable(
            timesteps=trace.timesteps,
            scale=_scale(trace),
            streams=1 + start.skipped_rows + np.arange(len(start.timesteps), dtype=np.int64),
            clip=float(trace.clip_ranges[CHECK]) if clips else None,
            init_alpha=start.init_alpha,
            init_sigma=start.init_sigma,
            name=name or type(scheduler).__name__,
            num_inference_steps=steps,
            noise_steps=noise_steps,
            prediction_type=getattr(scheduler.config, "prediction_type", "epsilon"),
            basis=basis,
            **coefficients,
        )


class TableCompiler:
    """Compiles tables by their keys for one model folder's scheduler config."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self._schedulers: dict[tuple[str, bool], Any] = {}  # slow to make, quick to copy; probing uses a copy up

    def table(self, key: str) -> SolverTable:
        """The table of a key `NAME:STEPS[:NOISE_STEPS]`. Raises InputError, also for a solver whose steps are too coarse for
        the noise schedule, unless it is the model's own: that one is sampled as diffusers samples it."""
        name, steps, noise_steps = parse_key(key)
        whole = steps == self._config.get(
            "num_train_timesteps", 1000
        )  # with an offset the last one would be out of range
        if (name, whole) not in self._schedulers:
            config = {**self._config, "steps_offset": 0} if whole else self._config
            self._schedulers[name, whole] = make_scheduler(name, config)
        scheduler = self._schedulers[name, whole]
        table = _compile(copy.deepcopy(scheduler), steps, noise_steps, name, {})
        if type(scheduler).__name__ != self._config.get("_class_name"):
            with _labelled(scheduler, name, steps):
                refuse_unstable(table, scheduler)
        return table

    def common(
        self, on_skip: Callable[[str, InputError], None] = lambda key, error: None
    ) -> Iterator[tuple[str, SolverTable]]:
        """What an export stores: (key, table) of the common solvers and the model's own, at 1 to 50 steps and every ten up to
        150, and of the training schedule. `on_skip(key, reason)` is called for each that cannot be a table."""
        names = dict.fromkeys((*COMMON, default_name(self._config)))
        keys = [format_key(name, steps) for name in names for steps in COMMON_STEPS]
        keys.append(format_key("ddpm", self._config.get("num_train_timesteps", 1000)))
        for key in dict.fromkeys(keys):
            try:
                yield key, self.table(key)
            except InputError as error:
                on_skip(key, error)


@contextmanager
def _labelled(scheduler: Any, name: str | None, steps: int) -> Iterator[None]:
    """Raises every error inside as an InputError of one line that begins with the solver's name."""
    class_name = type(scheduler).__name__
    label = f"solver {class_name if name in (None, class_name) else f'{name} ({class_name})'} at {steps} steps"
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():  # what comes of it is checked
            warnings.simplefilter("ignore")
            yield
    except InputError as error:
        raise InputError(f"{label}: {error}") from error
    except Exception as error:  # a scheduler's own refusal: of any type, depending on its class and version
        raise InputError(f"{label}: {type(error).__name__}: {' '.join(str(error).split())}") from error


def _check_config(config: Mapping[str, Any]) -> None:
    if config.get("thresholding"):
        raise InputError("thresholding=True scales each image by a quantile of itself, which no solver table can")
    if config.get("scale_factors"):
        raise InputError("scale_factors changes the size of the state on the way, which no solver table can")


def _scale(trace: Trace) -> np.ndarray:
    """(R,): the factor from the state to the network's input."""
    scale = _exact_units((trace.network_input * trace.x).sum((1, 2)) / (trace.x * trace.x).sum((1, 2)))
    error = np.abs(trace.network_input - scale[:, None, None] * trace.x).max()
    if error > TOLERANCE * np.abs(trace.network_input).max():
        raise InputError("scale_model_input does more than scale")
    return scale


def _solve(scheduler: Any, trace: Trace) -> tuple[str, Coefficients]:
    """The first basis in which the steps are linear, and their coefficients, confirmed on the CHECK vectors."""
    if not np.isfinite(trace.out).all():
        row = int(np.argmin(np.isfinite(trace.out).all(axis=(1, 2))))
        snr = "; a zero terminal SNR needs v_prediction or sample prediction, or timestep_spacing leading"
        raise InputError(f"its step is not finite at timestep {trace.timesteps[row]:g}{snr if row == 0 else ''}")
    x0 = _clean_sample(scheduler, trace)
    clips = len(trace.clip_ranges) > 2
    for basis, coefficients in _candidates(trace, x0) if x0 is None or not clips else _clipped_candidates(trace, x0):
        if _error(coefficients, trace, CHECK) < CONFIRMED:
            return basis, coefficients
    raise InputError(
        f"not linear in the state, the newest {MAX_DEPTH} predictions and one noise per row, so it cannot become a "
        "solver table; choose another scheduler"
    )


def _candidates(trace: Trace, x0: np.ndarray | None) -> Iterator[tuple[str, Coefficients]]:
    """(basis, coefficients) of every basis in which the steps are linear on the FIT vectors."""
    bases = [
        ("solver", None if trace.converted is None else _combination(trace, trace.converted[:, FIT])),
        ("net", np.tile([0.0, 1.0], (len(trace.timesteps), 1))),
        ("x0", x0),
        ("eps", None if x0 is None else np.array([1.0, 0.0]) - x0),
        ("solver", None if trace.kept is None else _combination(trace, trace.kept[:, FIT])),
    ]
    for basis, pq in bases:
        if pq is None:
            continue
        fit = _fit(trace, FIT, _combine(trace, pq))
        if fit is not None:
            yield basis, _coefficients(*fit, p=pq[:, 0], q=pq[:, 1])


def _clipped_candidates(trace: Trace, x0: np.ndarray) -> Iterator[tuple[str, Coefficients]]:
    """With x0 clipped to zero a step shows what it does beside x0; unclipped, the remainder is d * x0. Or the history
    holds clipped clean samples, as Heun's does."""
    ones = np.ones(len(trace.timesteps))
    beside = _fit(trace, ZERO, trace.net, max_depth=1)
    if beside is not None:
        a, b, c = beside
        remainder = trace.out[:, FIT] - a[:, None] * trace.x[:, FIT] - b * trace.net[:, FIT]
        remainder -= c[:, None] * trace.z[:, FIT]
        value = _combine(trace, x0)[:, FIT]
        d = _exact_units((remainder * value).sum(-1) / (value * value).sum(-1))
        d[np.linalg.norm(remainder, axis=1) < TOLERANCE * np.linalg.norm(trace.out[:, FIT], axis=1)] = 0.0
        yield "net", _coefficients(a, b, c, q=ones, d=d, x0_p=x0[:, 0], x0_q=x0[:, 1])
    fit = _fit(trace, FIT, _combine(trace, x0))
    if fit is not None:
        yield "x0", _coefficients(*fit, r=ones, x0_p=x0[:, 0], x0_q=x0[:, 1])


def _clean_sample(scheduler: Any, trace: Trace) -> np.ndarray | None:
    """(R, 2): the clean sample as combination of x and net, from what the scheduler returns or from its alphas."""
    if trace.x0 is not None:
        return _combination(trace, trace.x0[:, FIT])
    times, levels = trace.timesteps, getattr(scheduler, "alphas_cumprod", ())
    if (times % 1).any() or (times < 0).any() or (times >= len(levels)).any() or continuous(scheduler.config):
        return None  # the timesteps do not index the noise levels
    alphas_cumprod = scheduler.alphas_cumprod[trace.timesteps.astype(int)]
    # torch's float32 roots, as the scheduler takes them: they are not always the correctly rounded ones
    alpha, sigma = alphas_cumprod.sqrt().double().numpy(), (1 - alphas_cumprod).sqrt().double().numpy()
    with np.errstate(divide="ignore"):
        pairs = {
            "epsilon": (1 / alpha, -sigma / alpha),
            "v_prediction": (alpha, -sigma),
            "sample": (np.zeros_like(alpha), np.ones_like(alpha)),
        }
    pair = pairs.get(scheduler.config.get("prediction_type", "epsilon"))
    return None if pair is None or not np.isfinite(pair).all() else np.stack(pair, axis=-1)


def _fit(
    trace: Trace, group: int, m: np.ndarray, max_depth: int = MAX_DEPTH
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """a (R,), b (R, H), c (R,) with out = a x + sum_h b[h] m[h] + c z, H the least that fits every row, or None."""
    coefficients = np.zeros((len(m), 2 + max_depth))
    todo = np.arange(len(m))
    for depth in range(1, min(max_depth, len(m)) + 1):
        history = [np.where((todo >= h)[:, None], m[todo - h, group], 0.0) for h in range(depth)]
        columns = np.stack([trace.x[todo, group], trace.z[todo, group], *history], axis=-1)  # (T, LENGTH, 2 + depth)
        solution, error = _least_squares(columns, trace.out[todo, group])
        fits = error < TOLERANCE
        coefficients[todo[fits], : 2 + depth] = solution[fits]
        todo = todo[~fits]
        if not len(todo):
            return coefficients[:, 0], coefficients[:, 2 : 2 + depth], coefficients[:, 1]
    return None


def _least_squares(columns: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Batched: columns (T, n, k), target (T, n) -> solution (T, k) and residual (T,) relative to the largest term."""
    norms = np.linalg.norm(columns, axis=1)
    norms[norms == 0] = 1.0
    terms = (np.linalg.pinv(columns / norms[:, None], rcond=1e-12) @ target[..., None])[..., 0]
    largest = np.maximum(np.abs(terms).max(axis=1), np.linalg.norm(target, axis=1))
    largest[largest == 0] = 1.0
    terms[np.abs(terms) < NEGLIGIBLE * largest[:, None]] = 0.0
    solution = _exact_units(terms / norms)
    residual = target - (columns @ solution[..., None])[..., 0]
    return solution, np.linalg.norm(residual, axis=1) / largest


def _exact_units(values: np.ndarray) -> np.ndarray:
    """-1 and 1 up to rounding become exact: they compress well, and need no multiplication."""
    unit = np.abs(np.abs(values) - 1.0) < NEGLIGIBLE
    return np.where(unit, np.sign(values), values)


def _combination(trace: Trace, target: np.ndarray) -> np.ndarray | None:
    """(R, 2): target (R, LENGTH) as combination of x and net; None if it is none."""
    if not np.isfinite(target).all():
        return None
    columns = np.stack([trace.x[:, FIT], trace.net[:, FIT]], axis=-1)
    solution, error = _least_squares(columns, target)
    return solution if error.max() < TOLERANCE else None


def _combine(trace: Trace, pq: np.ndarray) -> np.ndarray:
    return pq[:, 0, None, None] * trace.x + pq[:, 1, None, None] * trace.net  # (R, G, LENGTH)


def _coefficients(a: np.ndarray, b: np.ndarray, c: np.ndarray, **others: np.ndarray) -> Coefficients:
    absent = {name: np.zeros_like(a) for name in ("p", "q", "r", "x0_p", "x0_q", "d") if name not in others}
    return {"a": a, "b": b, "c": c, **others, **absent}


def _error(coefficients: Coefficients, trace: Trace, group: int) -> float:
    """The largest error of any row on one group of probe vectors, relative to the row's largest term."""
    v = {name: value[:, None] for name, value in coefficients.items() if name != "b"}
    x, net, limit = trace.x[:, group], trace.net[:, group], trace.clip_ranges[group]
    x0 = np.clip(v["x0_p"] * x + v["x0_q"] * net, -limit, limit)
    m = v["p"] * x + v["q"] * net + v["r"] * x0
    terms = [v["a"] * x, v["d"] * x0, v["c"] * trace.z[:, group]]
    for h, b in enumerate(coefficients["b"].T):
        terms.append(b[:, None] * np.concatenate([np.zeros((h, LENGTH)), m[: len(m) - h]]))
    largest = np.max([np.linalg.norm(term, axis=1) for term in terms], axis=0)
    error = np.linalg.norm(sum(terms) - trace.out[:, group], axis=1)
    return float((error / np.where(largest == 0, 1.0, largest)).max())
