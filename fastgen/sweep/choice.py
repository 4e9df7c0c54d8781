"""The rule that names one point of a sweep."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from fastgen.errors import InputError, unknown

RULES = ("fewest", "best")


class Candidate(NamedTuple):
    """A point's score: `value`, NaN where it has none, its standard error, and network evaluations per image."""

    value: float
    standard_error: float
    evaluations: int


@dataclass(frozen=True)
class Rule:
    """`best`: the best value. `fewest`: the fewest evaluations per image among the points whose value is not worse than the
    best one by more than `amount` percent of it ("%"), or by more than `amount` of the best point's standard errors ("se": with
    1 the one-standard-error rule of Breiman et al., Classification and Regression Trees, 1984, section 3.4.3)."""

    kind: str = "fewest"
    amount: float = 2.0
    unit: Literal["%", "se"] = "%"

    def __post_init__(self) -> None:
        if self.kind not in RULES:
            raise unknown("--rule", self.kind, RULES)
        if not (math.isfinite(self.amount) and self.amount >= 0) or self.unit not in ("%", "se"):
            raise InputError(f"within is {self.amount}{self.unit}, expected a percentage such as 2%, or 1se")

    def __str__(self) -> str:
        if self.kind == "best":
            return "the best value"
        plural = "" if self.amount == 1 else "s"
        unit = "% of the best" if self.unit == "%" else f" standard error{plural} of the best"
        return f"the fewest evaluations within {self.amount:g}{unit}"

    def allowance(self, best: Candidate) -> float:
        """How much worse than the best a value may be; 0 where its standard error is undefined."""
        if self.kind == "best":
            return 0.0
        if self.unit == "%":
            return abs(best.value) * self.amount / 100
        return 0.0 if math.isnan(best.standard_error) else self.amount * best.standard_error


def parse_within(text: str) -> tuple[float, Literal["%", "se"]]:
    """2% or 1se -> amount and unit of a Rule. Raises InputError."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*(%|se)", text.strip(), re.ASCII)
    if not match:
        raise InputError(f"--within: found {text!r}, expected a percentage such as 2%, or standard errors such as 1se")
    return float(match[1]), "%" if match[2] == "%" else "se"


@dataclass(frozen=True)
class Choice:
    """Positions of the point that the rule names and of the best one; `limit`: the worst value that counts as good enough."""

    chosen: int
    best: int
    limit: float
    within: int  # how many points are good enough
    undefined_error: bool  # the rule asks for a standard error that the best point has not


def choose(candidates: Sequence[Candidate], rule: Rule, better: Literal["higher", "lower"]) -> Choice | None:
    """The point that `rule` names: of equal evaluations the better score, then the first; of equal best scores the one with
    fewer evaluations. None where no point has a score."""
    sign = -1.0 if better == "higher" else 1.0  # so that less is better
    scored = [i for i, c in enumerate(candidates) if not math.isnan(c.value)]
    if not scored:
        return None
    best = min(scored, key=lambda i: (sign * candidates[i].value, candidates[i].evaluations))
    allowance = rule.allowance(candidates[best]) * (1 + 1e-9)  # rounding decides nothing
    limit = candidates[best].value + sign * allowance
    good = [i for i in scored if sign * candidates[i].value <= sign * limit]
    chosen = best
    if rule.kind == "fewest":
        chosen = min(good, key=lambda i: (candidates[i].evaluations, sign * candidates[i].value))
    undefined = rule.kind == "fewest" and rule.unit == "se" and math.isnan(candidates[best].standard_error)
    return Choice(chosen, best, limit, len(good), undefined)
