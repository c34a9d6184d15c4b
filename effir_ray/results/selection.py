"""From folders of rows to a front, and from a front to one model."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from effir_ray.errors import InputError
from effir_ray.results import store
from effir_ray.results.pareto import costs_of, front, objectives_for
from effir_ray.results.query import where as filter_rows
from effir_ray.results.schema import DIRECTIONS

TEST_COLUMN = "test_ndcg_at_10"


def pareto(
    folders: store.Folders,
    *,
    where: str | None = None,
    pick: str | None = None,
    objectives: Sequence[str] = (),
    split: str | None = None,
) -> pa.Table:
    """The Pareto front of the rows in ``folders``, best in the first objective first.

    The front is chosen on ``split`` (dev, where there are dev rows); the column ``test_ndcg_at_10`` gives the
    test score of a row that has one. ``where`` is an SQL condition, ``objectives`` are columns (by default
    the search's), ``pick`` leaves one row: see ``pick_row``. Raises InputError when the rows are of
    more than one data set, version of it or sample of it (their scores cannot be compared) or none is left.
    """
    table = store.latest(store.read(folders))
    if where:
        table = filter_rows(table, where)
    chosen = chosen_rows(table, split)
    directions = objectives_for(chosen, tuple(objectives))
    best = front(chosen, directions)
    if pick:
        best = pick_row(best, pick, tuple(directions))
    return with_test_scores(best, table)


def chosen_rows(table: pa.Table, split: str | None = None) -> pa.Table:
    """The successful rows a front is chosen from: one split (dev, where there is one), one data set, one
    sample of it."""
    chosen = _of_split(_successful(table), split)
    datasets = sorted(set(chosen["dataset"].to_pylist()))
    if len(datasets) > 1:
        raise InputError(
            f"the rows are of {len(datasets)} data sets ({', '.join(datasets)}): no comparison; "
            f"choose one, for example --where \"dataset = '{datasets[0]}'\""
        )
    _check_one_sample(chosen)
    _check_one_content(chosen)
    return chosen


def _check_one_sample(rows: pa.Table) -> None:
    """Scores over other queries or fewer documents are higher or lower for that alone."""
    records = rows.select(["trial", "split", "dataset", "study", "seed"]).to_pylist()
    found = {_sample(record): record for record in records}
    if len(found) < 2:
        return
    (one, first), (other, second) = list(found.items())[:2]
    column = next((name for name in ("study", "seed") if first[name] != second[name]), None)
    fix = (
        f'--where "{column} = {first[column]!r}"'
        if column
        else "the folder of one study, or a --where on `trial`"
    )
    raise InputError(
        f"the rows are of {len(found)} samples of {first['dataset']} ({one}; {other}): no comparison; "
        f"choose one, for example {fix}"
    )


def _check_one_content(rows: pa.Table) -> None:
    """A data set that was written anew keeps its name. Rows before schema 3 do not say what they read."""
    studies = {
        contents["dataset"]: study
        for study, text in zip(rows["study"].to_pylist(), rows["contents"].to_pylist(), strict=True)
        if "dataset" in (contents := json.loads(text or "{}"))
    }
    if len(studies) > 1:
        raise InputError(
            f"the rows are of {len(studies)} versions of {rows['dataset'][0].as_py()}, which changed in "
            "between: no comparison; choose the folder of one study"
        )


def _sample(record: dict[str, Any]) -> str:
    """In words, which part of its split a row was measured on."""
    trial = json.loads(record["trial"])
    sample = trial.get(record["split"]) or {}
    if sample.get("queries") is None:
        return f"all of {record['split']}"
    seed = trial.get("sample_seed", trial.get("seed", 0))  # one seed for both, once
    return f"{sample['queries']} queries, {sample['documents']} documents, seed {seed}"


def pick_row(rows: pa.Table, pick: str, objectives: Sequence[str]) -> pa.Table:
    """One row of a front.

    ``"knee"``: the row nearest to the ideal point, every objective scaled to [0, 1] over the front
    (compromise programming, Zeleny 1973). Otherwise conditions such as ``"ndcg_at_10>=0.45"`` or
    ``"parameters<=5e7,document_speedup>=1.5"``: of the rows that meet them, the best in the first objective
    that no condition names.
    """
    if len(rows) == 0:
        raise InputError("the front is empty: no row has every objective measured")
    if pick.strip() == "knee":
        costs = costs_of(rows, objectives_for(rows, tuple(objectives)))
        span = np.ptp(costs, axis=0)
        scaled = (costs - costs.min(axis=0)) / np.where(span > 0, span, 1.0)
        return rows.slice(int(np.linalg.norm(scaled, axis=1).argmin()), 1)
    conditions = [_condition(text) for text in pick.split(",")]
    for column, compare, value in conditions:
        if column not in DIRECTIONS:
            raise InputError(f"--pick: '{column}' is not measured; choose from {', '.join(DIRECTIONS)}")
        kept = [item is not None and compare(item, value) for item in rows[column].to_pylist()]
        rows = rows.filter(pa.array(kept, pa.bool_()))
    if len(rows) == 0:
        raise InputError(f"--pick: no row of the front has {pick}; see the front without --pick")
    named = {column for column, _, _ in conditions}
    decisive = next((name for name in objectives if name not in named), objectives[0])
    costs = costs_of(rows, objectives_for(rows, (decisive,)))
    return rows.slice(int(costs[:, 0].argmin()), 1)


_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_CONDITION = re.compile(r"\s*(\w+)\s*(>=|<=|>|<)\s*([-+.\deE]+)\s*")


def _condition(text: str) -> tuple[str, Callable[[float, float], bool], float]:
    match = _CONDITION.fullmatch(text)
    try:
        if match:
            return match[1], _COMPARISONS[match[2]], float(match[3])
    except ValueError:
        pass
    raise InputError(
        f"--pick: cannot read '{text}'; expected 'knee' or conditions such as 'ndcg_at_10>=0.45'"
    )


def _successful(table: pa.Table) -> pa.Table:
    kept = table.filter(pa.array([status == "ok" for status in table["status"].to_pylist()], pa.bool_()))
    if len(kept) == 0:
        raise InputError(f"no successful trial among the {len(table)} rows that were asked for")
    return kept


def _of_split(table: pa.Table, split: str | None) -> pa.Table:
    splits = table["split"].to_pylist()
    wanted = split or ("dev" if "dev" in splits else splits[0])
    if wanted not in splits:
        raise InputError(f"no rows of split '{wanted}'; there are {', '.join(sorted(set(splits)))}")
    return table.filter(pa.array([item == wanted for item in splits], pa.bool_()))


def with_test_scores(rows: pa.Table, table: pa.Table) -> pa.Table:
    """``rows`` with the column ``test_ndcg_at_10``, looked up among the test rows of ``table``."""
    scores = {
        (record["study"], record["trial_id"]): record["ndcg_at_10"]
        for record in table.select(["study", "trial_id", "split", "ndcg_at_10"]).to_pylist()
        if record["split"] == "test"
    }
    keys = zip(rows["study"].to_pylist(), rows["trial_id"].to_pylist(), strict=True)
    return rows.append_column(TEST_COLUMN, pa.array([scores.get(key) for key in keys], pa.float64()))
