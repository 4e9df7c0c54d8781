"""A grid of sampling settings and its points, checked as a whole before anything runs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

from fastgen.errors import InputError
from fastgen.files.jsonfiles import brief
from fastgen.files.records import MAX_STEPS
from fastgen.generate.settings import late_steps

if TYPE_CHECKING:
    from fastgen.sampling.defaults import Sampling

Value = TypeVar("Value")
MAX_VALUES = 200  # of one list
MAX_POINTS = 10_000
MAX_SCALE = 1000  # of guidance
NONE = "none"  # among the noise steps: start from noise alone


class RefusedError(InputError):
    """All problems of a sweep's settings; `problems` has an item for each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("; ".join(self.problems))


class Problems(list[str]):
    """A list of problems that are raised together."""

    def attempt(self, call: Callable[[], Value]) -> Value | None:
        """The result of `call`; where it raises InputError, None, and its problems are added to the list."""
        try:
            return call()
        except RefusedError as error:
            self.extend(error.problems)
        except InputError as error:
            self.append(str(error))
        return None

    def check(self) -> None:
        """Raises RefusedError if there are any."""
        if self:
            raise RefusedError(self)


@dataclass(frozen=True)
class Point:
    """One combination of settings. `checkpoint`: as in the grid, such as best; `weights`: its full label, such as best@115."""

    scheduler: str
    num_inference_steps: int
    guidance_scale: float
    noise_steps: int | None = None
    checkpoint: str | None = None
    weights: str | None = None
    guidance_interval: tuple[int, int] | None = None
    cache_interval: int = 1

    @property
    def name(self) -> str:
        """The name of its folder, unique for its settings."""
        parts = [self.scheduler, f"{self.num_inference_steps}steps", f"g{_number(self.guidance_scale)}"]
        if self.guidance_interval is not None:
            parts.append("i{}-{}".format(*self.guidance_interval))
        if self.cache_interval > 1:
            parts.append(f"c{self.cache_interval}")
        if self.noise_steps is not None:
            parts.append(f"noise{self.noise_steps}")
        return "-".join([*parts, self.weights] if self.weights else parts)

    def __str__(self) -> str:
        steps = f"{self.num_inference_steps} steps"
        if self.noise_steps is not None:
            steps = f"{self.noise_steps} of {steps}"
        text = f"{self.scheduler} {steps}, guidance {_number(self.guidance_scale)}"
        if self.guidance_interval is not None:
            text += " in rows {} to {}".format(*self.guidance_interval)
        if self.cache_interval > 1:
            text += f", cache interval {self.cache_interval}"
        return f"{text}, {self.weights}" if self.weights else text

    def settings(self) -> dict[str, Any]:
        """For `Pipeline.settings`; `noise_steps` is for `start.late_start`."""
        return {
            "scheduler": self.scheduler,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "guidance_interval": self.guidance_interval,
            "cache_interval": self.cache_interval,
        }


@dataclass(frozen=True)
class Grid:
    """Values per setting; None: the model's defaults. RefusedError, with every bad item, for wrong values and repeated ones.

    `noise_steps`: a None in the tuple starts from noise alone; None in place of the tuple, with an index, is 6/7 of the steps.
    `guidance_interval` is the same for all points.
    """

    schedulers: tuple[str, ...] | None = None
    num_inference_steps: tuple[int, ...] | None = None
    guidance_scales: tuple[float, ...] | None = None
    noise_steps: tuple[int | None, ...] | None = None
    checkpoints: tuple[str | None, ...] = (None,)
    guidance_interval: tuple[int, int] | None = None
    cache_intervals: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        problems = Problems()
        problems += _bad("--scheduler", self.schedulers, lambda v: bool(v) and ":" not in v, "a name such as ddim")
        problems += _bad("--num-inference-steps", self.num_inference_steps, _is_count, f"from 1 to {MAX_STEPS}")
        problems += _bad("--guidance-scale", self.guidance_scales, _is_scale, f"a number from 0 to {MAX_SCALE}")
        expected = f"from 1 to {MAX_STEPS}, or {NONE}"
        problems += _bad("--noise-steps", self.noise_steps, lambda v: v is None or _is_count(v), expected)
        problems += _bad("--cache-interval", self.cache_intervals, _is_count, f"from 1 to {MAX_STEPS}")
        problems += _bad("--checkpoint", self.checkpoints, lambda v: v != "", "best, last, ema or a step")
        if self.num_inference_steps:
            problems += _too_noisy(self.num_inference_steps, self.noise_steps or ())
        count = math.prod(len(values) for values in self._lists)
        problems += [f"the grid has {count:,} points, expected at most {MAX_POINTS:,}"] if count > MAX_POINTS else []
        problems.check()

    @property
    def _lists(self) -> list[Sequence[Any]]:
        lists = (self.schedulers, self.num_inference_steps, self.guidance_scales, self.noise_steps, self.checkpoints)
        return [values for values in (*lists, self.cache_intervals) if values]

    @property
    def plain(self) -> Grid:
        """The same without late starts and checkpoints."""
        return replace(self, noise_steps=None, checkpoints=(None,))

    def points(
        self, default: Sampling, *, rag: bool = False, weights: Mapping[str | None, str | None] | None = None
    ) -> list[Point]:
        """All combinations; steps vary fastest, the checkpoint slowest. `default`: the model's own sampling; `rag`: whether
        there is an index; `weights`: checkpoint as in the grid -> its full label.

        Raises RefusedError for more noise steps than steps, noise steps without an index, and two names of the same weights.
        """
        all_steps = self.num_inference_steps or (default.num_inference_steps,)
        scales = self.guidance_scales or (default.guidance_scale,)
        labels = weights or {}
        problems = Problems(_too_noisy(all_steps, self.noise_steps or ()))
        problems += _same_weights(self.checkpoints, labels)
        if not rag and any(n is not None for n in self.noise_steps or ()):
            problems.append("--noise-steps: images start from an index's latents; give --rag INDEX too")
        if rag and self.noise_steps is not None and all(n is None for n in self.noise_steps):
            reason = f"every point starts from noise, as --noise-steps {NONE} says"
            problems.append(f"--rag: {reason}; leave one of them out")
        problems.check()
        return [
            Point(scheduler, steps, scale, noise, name, labels.get(name), self.guidance_interval, cache)
            for name, scheduler, scale, cache, steps in itertools.product(
                self.checkpoints, self.schedulers or (default.scheduler,), scales, self.cache_intervals, all_steps
            )
            for noise in self._noise_steps(steps, rag)
        ]

    def _noise_steps(self, steps: int, rag: bool) -> tuple[int | None, ...]:
        if self.noise_steps is not None:
            return self.noise_steps
        return (late_steps(steps),) if rag else (None,)


@dataclass(frozen=True)
class Points:
    """A list of points in place of a grid. RefusedError for an empty list, for a point that occurs twice, and for one with a
    checkpoint or a late start, which only a Grid can have."""

    chosen: tuple[Point, ...]
    checkpoints = (None,)

    def __post_init__(self) -> None:
        problems = Problems([] if self.chosen else ["points: there are none"])
        names = [point.name for point in self.chosen]
        problems += [f"points: {name} is given twice" for name in dict.fromkeys(names) if names.count(name) > 1]
        late = [p.name for p in self.chosen if (p.noise_steps, p.checkpoint, p.weights) != (None, None, None)]
        problems += [f"points: {name} starts late or names weights; give a Grid" for name in late]
        problems.check()

    @property
    def plain(self) -> Points:
        """Itself: these points have no late starts and no checkpoints."""
        return self

    def points(
        self, default: Sampling, *, rag: bool = False, weights: Mapping[str | None, str | None] | None = None
    ) -> list[Point]:
        """The points in their order, whatever the arguments, which are those of `Grid.points`. RefusedError for an index."""
        Problems(["--rag: points given one by one start from noise; give a Grid"] if rag else []).check()
        return list(self.chosen)


def parse_grid(
    *,
    scheduler: str | None = None,
    num_inference_steps: str | None = None,
    guidance_scale: str | None = None,
    noise_steps: str | None = None,
    checkpoint: str | None = None,
    guidance_interval: tuple[int, int] | None = None,
    cache_interval: str | None = None,
) -> Grid:
    """A grid from comma-separated lists. Raises RefusedError with every bad item."""
    problems = Problems()

    def values(option: str, text: str | None, convert: Callable[[str], Any], expected: str) -> Any:
        return None if text is None else parse_list(option, text, convert, expected, problems) or None

    lists: dict[str, Any] = {
        "schedulers": values("--scheduler", scheduler, str, "names such as ddim,dpmpp-2m"),
        "num_inference_steps": values(
            "--num-inference-steps", num_inference_steps, integer, "integers such as 5,10,20"
        ),
        "guidance_scales": values("--guidance-scale", guidance_scale, float, "numbers such as 1,2.5,5"),
        "noise_steps": values("--noise-steps", noise_steps, _noise, f"integers such as 20,30, or {NONE}"),
        "cache_intervals": values("--cache-interval", cache_interval, integer, "integers such as 1,2,3") or (1,),
        "checkpoints": values("--checkpoint", checkpoint, str, "names such as best,last,500") or (None,),
    }
    grid = problems.attempt(lambda: Grid(**lists, guidance_interval=guidance_interval))
    problems.check()
    assert grid is not None
    return grid


def parse_list(
    option: str, text: str, convert: Callable[[str], Value], expected: str, problems: Problems
) -> tuple[Value, ...]:
    """`5,10,20` -> values; for each word that `convert` refuses with ValueError, an item in `problems` instead."""
    values: list[Value] = []
    words = [word.strip() for word in text.split(",")]
    if len(words) > MAX_VALUES:
        problems.append(f"{option}: found {len(words):,} values, expected at most {MAX_VALUES:,}")
        return ()
    for word in words:
        try:
            if not word:
                raise ValueError
            values.append(convert(word))
        except ValueError:
            problems.append(f"{option}: found {brief(word)}, expected {expected}")
    return tuple(values)


def integer(word: str) -> int:
    """ValueError unless it is written in digits alone."""
    if not (word.isascii() and word.isdigit() and len(word) < 10):
        raise ValueError(word)
    return int(word)


def _noise(word: str) -> int | None:
    return None if word == NONE else integer(word)


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and 1 <= value <= MAX_STEPS


def _is_scale(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value <= MAX_SCALE


def _bad(option: str, values: Sequence[Any] | None, good: Callable[[Any], bool], expected: str) -> list[str]:
    if values is None:
        return []
    if not values:
        return [f"{option}: holds no values"]
    twice = [f"{option}: {_text(v)} is given twice" for v in dict.fromkeys(values) if values.count(v) > 1]
    return [f"{option}: found {_text(v)}, expected {expected}" for v in values if not good(v)] + twice


def _too_noisy(all_steps: Iterable[int], noise_steps: Iterable[int | None]) -> list[str]:
    return [
        f"--noise-steps {noise} with --num-inference-steps {steps}: expected at most {steps}"
        for steps, noise in itertools.product(all_steps, noise_steps)
        if _is_count(steps) and _is_count(noise) and noise > steps
    ]


def _same_weights(names: Iterable[str | None], labels: Mapping[str | None, str | None]) -> list[str]:
    first: dict[str | None, str | None] = {}
    twice = []
    for name in names:
        label = labels.get(name)
        if label in first:
            twice.append(f"--checkpoint: {first[label]} and {name} are the same weights, {label}")
        first.setdefault(label, name)
    return twice


def _text(value: Any) -> str:
    return NONE if value is None else _number(value) if isinstance(value, float) else repr(value)


def _number(value: float) -> str:
    """The shortest text that reads as the same number."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)
