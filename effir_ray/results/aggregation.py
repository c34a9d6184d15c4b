"""Trials that differ only in their seed, or only in their data set, as one row: the mean, with its spread."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from effir_ray.errors import InputError
from effir_ray.results.schema import DIRECTIONS

SEEDS = "seeds"
SPREAD = "ndcg_at_10_sd"
DATASETS = "datasets"

_MEANS = (*DIRECTIONS, "ndcg_at_10_low", "ndcg_at_10_high", "bm25_ndcg_at_10")
_OF_ONE = ("document_speedup_low", "document_speedup_high")  # intervals that say nothing of a mean
_OF_DATA = ("dataset", "held_out")

Key = tuple[str, ...]


def configuration(row: Mapping[str, Any], *, across_datasets: bool = False) -> Key:
    """What is the same of trials that differ only in seeds (and data set): backbone, schedule, the rest of
    the trial's own configuration. Samples are drawn by a seed of their own, which stays."""
    left_out = ("seed", *_OF_DATA) if across_datasets else ("seed",)
    rest = json.dumps(_without(json.loads(row["trial"]), left_out), sort_keys=True)
    place = () if across_datasets else (row["dataset"],)
    return row["backbone"], row["schedule"], str(row["recovered"]), row["split"], *place, rest


def _without(value: Any, names: Sequence[str]) -> Any:
    if isinstance(value, dict):
        return {name: _without(part, names) for name, part in value.items() if name not in names}
    return [_without(part, names) for part in value] if isinstance(value, list) else value


def mean_over_seeds(rows: pa.Table) -> pa.Table:
    """One row for all seeds of a configuration, with the column ``seeds``: how many, and ``ndcg_at_10_sd``:
    the standard deviation over them. It carries the trial whose nDCG@10 is in the middle."""
    groups: dict[Key, list[int]] = {}
    records = rows.select(["backbone", "schedule", "recovered", "split", "dataset", "trial"]).to_pylist()
    for number, record in enumerate(records):
        groups.setdefault(configuration(record), []).append(number)
    seeds, scores = rows["seed"].to_pylist(), np.asarray(rows["ndcg_at_10"].to_numpy(), dtype=np.float64)
    members: list[list[int]] = []
    for group in groups.values():
        different = len({seeds[number] for number in group}) == len(group)
        members += [sorted(group, key=lambda number: scores[number])] if different else [[n] for n in group]
    spread = [float(np.std(scores[group], ddof=1)) if len(group) > 1 else None for group in members]
    merged = _merged(rows, members)
    merged = merged.append_column(SEEDS, pa.array([len(group) for group in members], pa.int64()))
    return merged.append_column(SPREAD, pa.array(spread, pa.float64()))


def mean_over_datasets(rows: pa.Table) -> pa.Table:
    """One row for all data sets of a configuration that was measured on every one of them, with the column
    ``datasets``: each one's nDCG@10, JSON. Raises InputError where there is none."""
    names = ["backbone", "schedule", "recovered", "split", "dataset", "trial", "ndcg_at_10"]
    records = rows.select(names).to_pylist()
    groups: dict[Key, dict[str, int]] = {}
    for number, record in enumerate(records):
        groups.setdefault(configuration(record, across_datasets=True), {})[record["dataset"]] = number
    everywhere = set(rows["dataset"].to_pylist())
    members = [
        [group[name] for name in sorted(group)] for group in groups.values() if group.keys() == everywhere
    ]
    if not members:
        raise InputError(
            f"no configuration was measured on all of {', '.join(sorted(everywhere))}: schedules, samples, "
            "timing and training have to be the same on each"
        )
    single = [
        json.dumps({records[number]["dataset"]: round(records[number]["ndcg_at_10"], 6) for number in group})
        for group in members
    ]
    return _merged(rows, members).append_column(DATASETS, pa.array(single, pa.string()))


def _merged(rows: pa.Table, members: Sequence[Sequence[int]]) -> pa.Table:
    """A row a group: that in its middle, with means where there are numbers to average."""
    kept = rows.take(pa.array([group[(len(group) - 1) // 2] for group in members], pa.int64()))
    for name in _MEANS:
        if name not in rows.schema.names:
            continue
        values = rows[name].to_pylist()
        means = [_mean([values[number] for number in group]) for group in members]
        kind = rows.schema.field(name).type
        column = pa.array(means, pa.float64()) if pa.types.is_floating(kind) else _rounded(means, kind)
        kept = kept.set_column(kept.schema.get_field_index(name), name, column)
    for name in _OF_ONE:
        if name in rows.schema.names:
            single = pa.array([len(group) == 1 for group in members], pa.bool_())
            own = pc.if_else(single, kept[name], pa.scalar(None, rows.schema.field(name).type))
            kept = kept.set_column(kept.schema.get_field_index(name), name, own)
    return kept


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) and known else None


def _rounded(means: Sequence[float | None], kind: pa.DataType) -> pa.Array:
    return pa.array([None if mean is None else round(mean) for mean in means], kind)
