"""The rule that picks one point of a sweep."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from fastgen.errors import InputError, unknown

RULES = ("fewest", "best")
BEST = "best"


class Candidate(NamedTuple):
    """A point's score: `value`, NaN where it has none, its standard error, and network evaluations per image."""

    value: float
    standard_error: float
    evaluations: float


@dataclass(frozen=True)
class Rule:
    """`best`: the best value. `fewest`: the fewest evaluations per image among the points whose value is not worse than the
    best one by more than `amount` percent of it ("%"), or by more than `amount` of the best point's standard errors ("se": with
    1 the one-standard-error rule of Breiman et al., Classification and Regression Trees, 1984, section 3.4.3).

    `against`: the name of the point that values are compared with in place of the best one, such as a reference system's."""

    kind: str = "fewest"
    amount: float = 2.0
    unit: Literal["%", "se"] = "%"
    against: str = BEST

    def __post_init__(self) -> None:
        if self.kind not in RULES:
            raise unknown("--rule", self.kind, RULES)
        if not (math.isfinite(self.amount) and self.amount >= 0) or self.unit not in ("%", "se"):
            raise InputError(f"within is {self.amount}{self.unit}, expected a percentage such as 2%, or 1se")
        if self.kind == "best" and self.against != BEST:
            raise InputError(f"--rule best looks at no other point; leave --against {self.against} out")

    def __str__(self) -> str:
        if self.kind == "best":
            return "the best value"
        plural = "" if self.amount == 1 else "s"
        unit = "%" if self.unit == "%" else f" standard error{plural}"
        against = "the best" if self.against == BEST else self.against
        return f"the fewest evaluations within {self.amount:g}{unit} of {against}"

    def allowance(self, base: Candidate) -> float:
        """How much worse than `base`, the best point or the one `against`, a value may be; 0 where its error is undefined."""
        if self.kind == "best":
            return 0.0
        if self.unit == "%":
            return abs(base.value) * self.amount / 100
        return 0.0 if math.isnan(base.standard_error) else self.amount * base.standard_error


def parse_within(text: str) -> tuple[float, Literal["%", "se"]]:
    """2% or 1se -> amount and unit of a Rule. Raises InputError."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*(%|se)", text.strip(), re.ASCII)
    if not match:
        raise InputError(f"--within: found {text!r}, expected a percentage such as 2%, or standard errors such as 1se")
    return float(match[1]), "%" if match[2] == "%" else "se"


@dataclass(frozen=True)
class Choice:
    """Positions of the point that the rule picks (`chosen`), of the best one, and of the one that the values are compared with
    (`against`); `limit`: the worst value that is good enough."""

    chosen: int
    best: int
    against: int
    limit: float
    within: int  # how many points are good enough
    undefined_error: bool  # the rule needs the standard error of the point `against`, which is NaN


def choose(
    candidates: Sequence[Candidate], rule: Rule, better: Literal["higher", "lower"], against: int | None = None
) -> Choice | None:
    """The point that `rule` picks: of equal evaluations the better score, then the first; of equal best scores the one with
    fewer evaluations. `against`: the position of the point `rule.against`; None: the best. Returns None where no point has a
    score, or the one `against` has none."""
    sign = -1.0 if better == "higher" else 1.0  # so that less is better
    scored = [i for i, c in enumerate(candidates) if not math.isnan(c.value)]
    if not scored or (against is not None and against not in scored):
        return None
    best = min(scored, key=lambda i: (sign * candidates[i].value, candidates[i].evaluations))
    base = best if against is None else against
    allowance = rule.allowance(candidates[base]) * (1 + 1e-9)  # rounding decides nothing
    limit = candidates[base].value + sign * allowance
    good = [i for i in scored if sign * candidates[i].value <= sign * limit]
    position = best
    if rule.kind == "fewest":
        position = min(good, key=lambda i: (candidates[i].evaluations, sign * candidates[i].value))
    undefined = rule.kind == "fewest" and rule.unit == "se" and math.isnan(candidates[base].standard_error)
    return Choice(position, best, base, limit, len(good), undefined)
