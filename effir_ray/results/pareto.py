"""Which rows no other row beats: the size / quality / speed front."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from effir_ray.errors import InputError
from effir_ray.results.schema import DEFAULT_OBJECTIVES, DIRECTIONS, Direction

Points = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


def non_dominated(costs: Points) -> Mask:
    """``costs`` (points, objectives), lower is better -> (points,) True where no other point dominates.

    A point dominates another when it is at least as good in every objective and better in one; equal points
    therefore stay together. A point with a NaN is never on the front and dominates nothing.
    """
    valid: Mask = np.asarray(~np.isnan(costs).any(axis=1), dtype=np.bool_)
    mask: Mask = valid.copy()
    for index in np.flatnonzero(valid):
        others = costs[valid]
        beats = (others <= costs[index]).all(axis=1) & (others < costs[index]).any(axis=1)
        mask[index] = not beats.any()
    return mask


def on_front(table: pa.Table, objectives: Mapping[str, Direction]) -> Mask:
    """(rows,) True where the row is on the front of ``objectives``; failed rows and nulls never are."""
    return non_dominated(costs_of(table, objectives))


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
        costs[np.asarray(table["status"].to_pylist()) == "failed"] = np.nan
    return costs


def objectives_for(table: pa.Table, names: tuple[str, ...] = ()) -> dict[str, Direction]:
    """Directions of ``names``; by default the search's own objectives, as far as the rows measured them."""
    unknown = [name for name in names if name not in DIRECTIONS]
    if unknown:
        raise InputError(f"unknown objective '{unknown[0]}'; choose from {', '.join(DIRECTIONS)}")
    chosen = names or tuple(name for name in DEFAULT_OBJECTIVES if table[name].null_count < len(table))
    return {name: DIRECTIONS[name] for name in chosen}


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))
