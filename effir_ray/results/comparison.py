"""Models against one of them, query by query: which differences are more than the choice of queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from effir_ray.errors import InputError
from effir_ray.results import query_scores, store
from effir_ray.results.schema import TrialRow
from effir_ray.results.selection import chosen_rows
from effir_ray.results.significance import Interval, bootstrap_interval, differences, holm, permutation_p
from effir_ray.results.tables import Damaged, Folders

LEVEL = 0.05
"""Of a difference that is called one."""

_KNOWN = (
    "study",
    "trial_id",
    "backbone",
    "schedule",
    "recovered",
    "seed",
    "parameters",
    "parameter_ratio",
    "document_speedup",
)
_TYPES = {field.name: field.type for field in store.ROWS.schema}

SCHEMA = pa.schema(
    [pa.field(name, _TYPES[name]) for name in _KNOWN]
    + [
        pa.field("dataset", pa.string()),
        pa.field("split", pa.string()),
        pa.field("metric", pa.string()),
        pa.field("queries", pa.int64()),
        pa.field("score", pa.float64()),
        pa.field("difference", pa.float64()),
        pa.field("difference_low", pa.float64()),
        pa.field("difference_high", pa.float64()),
        pa.field("p", pa.float64()),
        pa.field("p_holm", pa.float64()),
    ]
)


def compare(
    folders: Folders,
    trials: Sequence[str] = (),
    *,
    split: str | None = None,
    metric: str = "ndcg_at_10",
    damaged: Damaged | None = None,
) -> pa.Table:
    """How far models are from a baseline over the same queries; the baseline is the first row, without a
    difference, the others follow, best first. Of several backbones or seeds each model is compared with its
    own full one, one after the other.

    ``trials``: trial ids, which may be shortened, the baseline first; without them the full model and all
    others. ``split``: by default test, where at least two models have test scores, else dev. A difference has
    its paired bootstrap 95 % interval, the p of the paired randomisation test, and that p by Holm for all
    differences of the table; of rows that are means over several data sets it is the mean of those on each.
    ``damaged`` hears of files that cannot be read, which are then left out. Raises InputError when there is
    nothing to compare, rows are of several data sets or samples, or scores of single queries were not kept.
    """
    if metric not in query_scores.METRICS:
        raise InputError(f"--metric {metric}: expected one of {', '.join(query_scores.METRICS)}")
    table = store.latest(store.read(folders, damaged=damaged))
    return compare_rows(table, folders, trials, split=split, metric=metric, damaged=damaged)


def compare_rows(
    table: pa.Table,
    folders: Folders,
    trials: Sequence[str] = (),
    *,
    split: str | None = None,
    metric: str = "ndcg_at_10",
    damaged: Damaged | None = None,
) -> pa.Table:
    """``compare`` of rows that were read already."""
    if trials:
        table = _named(table, trials)
    rows = store.trial_rows(chosen_rows(table, split or _usual_split(table)))
    known = query_scores.read(folders, trials=[row.trial_id for row in rows], damaged=damaged)
    found = query_scores.by_trial(known, metric)
    scores = {_key(row): by_query for row in rows if (by_query := query_scores.of_row(found, *_key(row)))}
    kept = [row for row in rows if _key(row) in scores]
    if len(kept) < 2 or (trials and len(kept) < len(rows)):
        missing = ", ".join(sorted(row.trial_id for row in rows if _key(row) not in scores)) or "a second one"
        raise InputError(
            f"scores of single queries on split {rows[0].split} are missing ({missing}): there is nothing to "
            "compare; a search with this version of effir-ray keeps them"
        )
    groups = [kept] if trials else _with_one_full(kept)
    baselines = [_baseline(group, trials) for group in groups]
    pairs = [
        (scores[_key(baseline)], row)
        for baseline, group in zip(baselines, groups, strict=True)
        for row in group
        if row is not baseline
    ]
    apart = [
        [differences(*both) for both in zip(theirs, scores[_key(row)], strict=True)] for theirs, row in pairs
    ]
    p = [permutation_p(*found) for found in apart]
    compared = [
        _record(row, metric, scores[_key(row)], bootstrap_interval(*by_dataset), once, together)
        for (_, row), by_dataset, once, together in zip(pairs, apart, p, holm(p).tolist(), strict=True)
    ]
    compared.sort(key=lambda record: -record["score"])
    records = []
    for baseline in baselines:
        records.append(_record(baseline, metric, scores[_key(baseline)], None, None, None))
        records += [record for record in compared if trials or _is_beside(record, baseline)]
    return pa.Table.from_pylist(records, schema=SCHEMA)


def _with_one_full(rows: Sequence[TrialRow]) -> list[list[TrialRow]]:
    """By what a full model is of."""
    groups: dict[tuple[str, int], list[TrialRow]] = {}
    for row in rows:
        groups.setdefault((row.backbone, row.seed), []).append(row)
    return list(groups.values())


def _is_beside(record: Mapping[str, Any], baseline: TrialRow) -> bool:
    return (record["backbone"], record["seed"]) == (baseline.backbone, baseline.seed)


def _key(row: TrialRow) -> tuple[str, str, str, str]:
    return row.study, row.trial_id, row.dataset, row.split


def _named(table: pa.Table, trials: Sequence[str]) -> pa.Table:
    known = sorted(set(table["trial_id"].to_pylist()))
    wanted = []
    for trial in trials:
        fits = [name for name in known if name.startswith(trial)]
        if len(fits) != 1:
            what = "there is no such trial" if not fits else f"it fits {len(fits)}; give more digits"
            raise InputError(f"--trial {trial}: {what}; effir-ray pareto shows the ids there are")
        wanted += fits
    if len(set(wanted)) < 2:
        raise InputError("a comparison needs two different trials: --trial BASELINE --trial OTHER")
    return table.filter(pc.is_in(table["trial_id"], pa.array(wanted)))


def _usual_split(table: pa.Table) -> str | None:
    """Models were chosen on dev: its differences are too good."""
    tested = table.filter(pc.and_(pc.equal(table["split"], "test"), pc.equal(table["status"], "ok")))
    return "test" if len(tested) > 1 else None


def _baseline(rows: Sequence[TrialRow], trials: Sequence[str]) -> TrialRow:
    if trials:
        return next(row for row in rows if row.trial_id.startswith(trials[0]))
    full = [row for row in rows if row.schedule == "full"]
    if len(full) != 1:
        raise InputError(
            f"{len(full)} of these rows are the full model of {rows[0].backbone}: name the baseline, "
            "--trial BASELINE --trial OTHER"
        )
    return full[0]


def _record(
    row: TrialRow,
    metric: str,
    scores: tuple[query_scores.ByQuery, ...],
    difference: Interval | None,
    p: float | None,
    p_holm: float | None,
) -> dict[str, Any]:
    known = {name: getattr(row, name) for name in (*_KNOWN, "dataset", "split")}
    means = [sum(by_query.values()) / len(by_query) for by_query in scores]
    measured = {"metric": metric, "queries": sum(map(len, scores)), "score": sum(means) / len(means)}
    if difference is None:
        return {**known, **measured}
    bounds = {
        "difference": difference.mean,
        "difference_low": difference.low,
        "difference_high": difference.high,
    }
    return {**known, **measured, **bounds, "p": p, "p_holm": p_holm}
