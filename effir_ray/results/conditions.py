"""Conditions on measured columns, such as ``parameters <= 5e7``: of ``--pick``, and of a study."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

from effir_ray.errors import InputError
from effir_ray.results.schema import DIRECTIONS

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_ON_THE_BOUND = 1e-12  # what "<" and ">" leave out
_FORM = re.compile(r"\s*(\w+)\s*(>=|<=|>|<)\s*([-+.\deE]+)\s*")


@dataclass(frozen=True, kw_only=True)
class Condition:
    """``column comparison bound``."""

    column: str
    comparison: str
    bound: float

    def holds(self, value: float | None) -> bool:
        """A column that was not measured meets nothing."""
        return value is not None and _COMPARISONS[self.comparison](value, self.bound)

    def violation(self, value: float | None) -> float:
        """How far ``value`` is on the wrong side, as a share of the bound: 0 or less where it is met."""
        if value is None:
            return 1.0
        excess = value - self.bound if self.comparison.startswith("<") else self.bound - value
        share = excess / (abs(self.bound) or 1.0)
        return share if self.holds(value) else max(share, _ON_THE_BOUND)

    def __str__(self) -> str:
        return f"{self.column} {self.comparison} {self.bound!r}"


def condition(text: str) -> Condition:
    """``"ndcg_at_10>=0.45"`` read. Raises InputError for another form and for a column nobody measures."""
    match = _FORM.fullmatch(text)
    try:
        bound = float(match[3]) if match else math.nan
    except ValueError:
        bound = math.nan
    if match is None or not math.isfinite(bound):
        raise InputError(f"cannot read '{text}'; expected a condition such as 'ndcg_at_10>=0.45'")
    if match[1] not in DIRECTIONS:
        raise InputError(f"'{match[1]}' is not measured; choose from {', '.join(DIRECTIONS)}")
    return Condition(column=match[1], comparison=match[2], bound=bound)
