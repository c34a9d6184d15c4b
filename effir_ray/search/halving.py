"""Which trials train on: successive halving for several objectives.

All trials of a rung have trained equally long. They are sorted into non-dominated layers, and whole layers go
on as long as they fit; of the one that does not, those that lie farthest from what goes on already, so that
large and small models are both left (Schmucker et al., Multi-objective Asynchronous Successive Halving,
arXiv 2106.12639, section 3). Rungs are waited for, which makes the choice the same however many trials run at
once and after every restart.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from effir_ray.config import Config
from effir_ray.results.pareto import Points, non_dominated


class Halving(Config):
    """``rungs`` at which trained trials are compared, each after ``factor`` times the steps of the one before
    and the last after all; of those at a rung one in ``factor`` goes on."""

    factor: int = Field(default=3, ge=2, le=100)
    rungs: int = Field(default=3, ge=2, le=10)

    def steps(self, total: int) -> tuple[int, ...]:
        """Of the rungs before the last; none where ``total`` is too few to be divided."""
        parts = [total // self.factor**place for place in range(self.rungs - 1, 0, -1)]
        return tuple(dict.fromkeys(part for part in parts if 0 < part < total))

    def share(self, count: int) -> int:
        """How many of ``count`` trials at a rung go on."""
        return math.ceil(count / self.factor)


def choose(costs: Points, count: int) -> list[int]:
    """``count`` rows of ``costs`` (trials, objectives; all minimised), in order of choice; none with a
    NaN."""
    chosen: list[int] = []
    left = np.flatnonzero(~np.isnan(costs).any(axis=1))
    if not len(left):
        return chosen
    spread = np.ptp(costs[left], axis=0)
    places = costs / np.where(spread > 0, spread, 1.0)
    while len(left) and len(chosen) < count:
        front = non_dominated(costs[left])
        layer, left = left[front], left[~front]
        room = count - len(chosen)
        chosen += layer.tolist() if len(layer) <= room else _spread_out(places, chosen, layer, room)
    return chosen


def _spread_out(places: Points, chosen: list[int], layer: NDArray[np.intp], count: int) -> list[int]:
    """``count`` of ``layer``: one after the other the farthest from all that are chosen; where none is, the
    best in the first objective begins."""
    gaps = np.full(len(layer), np.inf)
    for row in chosen:
        gaps = np.minimum(gaps, np.linalg.norm(places[layer] - places[row], axis=1))
    found: list[int] = []
    while len(found) < count:
        place = int(gaps.argmax()) if chosen or found else int(places[layer, 0].argmin())
        found.append(int(layer[place]))
        gaps = np.minimum(gaps, np.linalg.norm(places[layer] - places[layer[place]], axis=1))
        gaps[place] = -np.inf
    return found
