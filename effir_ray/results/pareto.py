"""Which rows no other row beats: the size / quality / speed front."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from effir_ray.errors import InputError
from effir_ray.results.schema import (
    DEFAULT_OBJECTIVES,
    DIRECTIONS,
    OBJECTIVES_ACROSS_BACKBONES,
    RELATIVE,
    TIMED,
    Direction,
)

Points = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


def non_dominated(costs: Points) -> Mask:
    """``costs`` (points, objectives), lower is better -> (points,) True where no other point dominates.

    A point dominates another when it is at least as good in every objective and better in one; equal points
    therefore stay together. A point with a NaN is never on the front and dominates nothing.

    The different points in lexicographic order: only an earlier one can dominate a later one (Kung, Luccio
    and Preparata 1975), which for one to three objectives makes it a sort and one pass.
    """
    mask: Mask = np.zeros(len(costs), dtype=np.bool_)
    unknown = np.zeros(len(costs), dtype=np.bool_)
    for column in costs.T:  # along the few columns numpy would be ten times slower
        unknown |= np.isnan(column)
    valid = np.flatnonzero(~unknown)
    if not len(valid):
        return mask
    valid = valid[_contenders(costs[valid])]
    points, of = np.unique(costs[valid], axis=0, return_inverse=True)
    if points.shape[1] <= 2:
        kept = _sweep_two(points)
    elif points.shape[1] == 3:
        kept = _sweep_three(points)
    else:
        kept = _eliminate(points)
    mask[valid] = kept[of.reshape(-1)]
    return mask


def _sweep_two(points: Points) -> Mask:
    """Kept is what is better in the last objective than everything before."""
    last = points[:, -1]
    if points.shape[1] == 1:
        return np.asarray(np.arange(len(points)) == 0)
    best = np.minimum.accumulate(last)
    return np.append(True, last[1:] < best[:-1])


def _sweep_three(points: Points) -> Mask:
    """One pass, with the front of the last two objectives of what came before: a staircase that falls."""
    kept = np.zeros(len(points), dtype=np.bool_)
    across: list[float] = []
    down: list[float] = []
    for index, (_, x, y) in enumerate(points.tolist()):
        place = bisect_right(across, x)
        if place and down[place - 1] <= y:
            continue
        kept[index] = True
        start = end = bisect_left(across, x)
        while end < len(down) and down[end] >= y:
            end += 1
        across[start:end], down[start:end] = [x], [y]
    return kept


def _contenders(points: Points) -> npt.NDArray[np.intp]:
    """Indices of what none of a few good points dominates: of many points, most fall here, all at a time."""
    left = np.arange(len(points))
    if len(points) <= 2 * _SAMPLE:
        return left
    sample = points[np.linspace(0, len(points) - 1, _SAMPLE).astype(np.intp)]
    good = sample[non_dominated(sample)]
    good = good[np.argsort(good[:, 0])]
    rivals = good[np.linspace(0, len(good) - 1, min(_RIVALS, len(good))).astype(np.intp)]
    beaten = [(sample >= rival).all(axis=1).sum() for rival in rivals]
    here = list(np.ascontiguousarray(points.T))
    for rival in rivals[np.argsort(beaten)[::-1]]:  # who beats most comes first: the others see few points
        stays, equal = np.zeros(len(left), np.bool_), np.ones(len(left), np.bool_)
        for column, bar in zip(here, rival, strict=True):
            stays |= column < bar
            equal &= column == bar
        stays |= equal
        left, here = left[stays], [column[stays] for column in here]
    return left


def _eliminate(points: Points) -> Mask:
    """Any number of objectives: every point that is kept removes what it dominates, points x front steps."""
    left = np.arange(len(points))
    kept = np.zeros(len(points), dtype=np.bool_)
    while len(left):
        first, left = left[0], left[1:]
        kept[first] = True
        left = left[(points[left] < points[first]).any(axis=1)]
    return kept


_SAMPLE, _RIVALS = 2000, 32


_WITH_INTERVAL = ("document_speedup",)
"""Objectives that are measured in rounds. A score's interval is of another kind: over queries, which are the
same for all models, so that two scores may differ surely though their intervals overlap."""


def on_front(table: pa.Table, objectives: Mapping[str, Direction]) -> Mask:
    """(rows,) True where the row is on the front of ``objectives``; failed rows and nulls never are.

    Nor is a row that only its speed keeps there, where that is not beyond noise: another is at least as good
    in all other objectives, better in one, and its speed-up's interval reaches this one's.
    """
    costs = costs_of(table, objectives)
    mask = non_dominated(costs)
    names = list(objectives)
    for speed in _WITH_INTERVAL:
        if len(names) > 1 and speed in names and f"{speed}_low" in table.schema.names:
            low, high = (_filled(table, f"{speed}{end}", speed) for end in ("_low", "_high"))
            _leave_out_noise(mask, np.delete(costs, names.index(speed), axis=1), low, high)
    return mask


def _leave_out_noise(mask: Mask, others: Points, low: Points, high: Points) -> None:
    """Clears ``mask`` where a kept row with better ``others`` (costs) is not surely slower."""
    rows = np.flatnonzero(mask)
    kept: list[int] = []
    for row in rows[np.lexsort(others[rows].T[::-1])]:  # what could beat it comes before it
        better = others[kept]
        beats = (better <= others[row]).all(axis=1) & (better < others[row]).any(axis=1)
        if (beats & (high[kept] >= low[row])).any():
            mask[row] = False
        else:
            kept.append(row)


def _filled(table: pa.Table, name: str, instead: str) -> Points:
    """A column of floats, with another's values where it has none."""
    values = pc.coalesce(table[name].cast(pa.float64()), table[instead].cast(pa.float64()))
    return np.asarray(values.to_numpy(), dtype=np.float64)


def front(table: pa.Table, objectives: Mapping[str, Direction]) -> pa.Table:
    """The rows of ``table`` on the front of ``objectives``, best in the first objective first.

    Raises InputError for an objective that is no numeric column of the rows.
    """
    kept = table.filter(pa.array(on_front(table, objectives)))
    first, direction = next(iter(objectives.items()))
    return kept.sort_by([(first, "descending" if direction == "max" else "ascending")])


def costs_of(table: pa.Table, objectives: Mapping[str, Direction]) -> Points:
    """(rows, objectives): the columns with "max" ones negated, NaN for nulls and failed rows."""
    if not objectives:
        raise InputError("a front needs at least one objective, for example ndcg_at_10")
    columns = []
    for name, direction in objectives.items():
        if name not in table.schema.names or not _is_number(table.schema.field(name).type):
            raise InputError(
                f"objective '{name}' is not a measured column; choose from {', '.join(DIRECTIONS)}"
            )
        values = np.asarray(table[name].cast(pa.float64()).to_numpy(), dtype=np.float64)
        columns.append(-values if direction == "max" else values)
    costs = np.stack(columns, axis=1)
    if "status" in table.schema.names:
        costs[np.asarray(pc.fill_null(pc.equal(table["status"], "failed"), False))] = np.nan
    return costs


def objectives_for(table: pa.Table, names: tuple[str, ...] = ()) -> dict[str, Direction]:
    """Directions of ``names``; by default the search's own objectives, as far as the rows measured them.

    Raises InputError for an objective that there is not, for one that compares with the full model where the
    rows are of several backbones, and for a speed that was measured on several kinds of hardware.
    """
    unknown = [name for name in names if name not in DIRECTIONS]
    if unknown:
        raise InputError(f"unknown objective '{unknown[0]}'; choose from {', '.join(DIRECTIONS)}")
    several = sorted(filter(None, table["backbone"].unique().to_pylist()))
    usual = DEFAULT_OBJECTIVES if len(several) < 2 else OBJECTIVES_ACROSS_BACKBONES
    chosen = names or tuple(name for name in usual if table[name].null_count < len(table))
    relative = next((name for name in chosen if name in RELATIVE), None)
    if relative and len(several) > 1:
        one = f"--where \"backbone = '{several[0]}'\""
        raise InputError(
            f"objective '{relative}' compares a model with its own full one, and the rows are of "
            f"{len(several)} backbones ({', '.join(several)}); "
            f"take {', '.join(OBJECTIVES_ACROSS_BACKBONES)}, or one backbone: {one}"
        )
    _check_one_hardware(table, chosen)
    return {name: DIRECTIONS[name] for name in chosen}


def _check_one_hardware(table: pa.Table, objectives: tuple[str, ...]) -> None:
    timed = next((name for name in objectives if name in TIMED), None)
    if timed is None:
        return
    measured = table["hardware"].filter(pc.is_valid(table[timed])).unique().to_pylist()
    several = sorted(filter(None, measured))
    if len(several) > 1:
        raise InputError(
            f"objective '{timed}' was measured on {len(several)} kinds of hardware ({'; '.join(several)}): "
            f"no comparison; choose one, --where \"hardware = '{several[0]}'\", or objectives without speed, "
            "--objectives ndcg_at_10,parameters"
        )


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))
