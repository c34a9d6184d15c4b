"""From folders of rows to a front, and from a front to one model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from effir_ray.errors import InputError
from effir_ray.results import query_scores, store, tables
from effir_ray.results.aggregation import (
    DATASETS,
    SEEDS,
    configuration,
    mean_over_datasets,
    mean_over_seeds,
)
from effir_ray.results.conditions import Condition, condition
from effir_ray.results.pareto import costs_of, front, objectives_for
from effir_ray.results.query import where as filter_rows
from effir_ray.results.schema import (
    DEFAULT_OBJECTIVES,
    DIRECTIONS,
    OBJECTIVES_ACROSS_BACKBONES,
    TrialRow,
    averaged,
    sample_in_words,
)
from effir_ray.results.significance import Interval, bootstrap_interval, differences
from effir_ray.results.tables import Damaged, Folders

TEST_COLUMN = "test_ndcg_at_10"
EQUAL_COLUMN = "not_better_than"
FAILED = b"failed"
"""In the metadata of a front: how many of the trials it was chosen from failed."""


def pareto(
    folders: Folders,
    *,
    where: str | None = None,
    pick: str | None = None,
    objectives: Sequence[str] = (),
    split: str | None = None,
    mean_datasets: bool = False,
    damaged: Damaged | None = None,
) -> pa.Table:
    """The Pareto front of the rows in ``folders``, best in the first objective first.

    Trials that differ in nothing but their seed are one row of means, with the columns ``seeds`` and
    ``ndcg_at_10_sd``; with ``mean_datasets`` so are trials of several data sets (``datasets``: each one's
    nDCG@10, JSON), of which those that were not measured on all are left out. Of a study over several data
    sets the rows are its means already, with the same column.

    The front is chosen on ``split`` (dev, where there are dev rows); the column ``test_ndcg_at_10`` gives the
    test score of a row that has one, ``not_better_than`` the trial id of the smallest smaller model on the
    front that the row's nDCG@10 cannot be told from (the paired 95 % interval over queries holds zero).
    The table's metadata says under ``failed`` how many trials failed and are left out.
    ``where`` is an SQL condition, ``objectives`` are columns (by default
    the search's), ``pick`` leaves one row: see ``pick_row``. ``damaged`` hears of files that cannot be read,
    which are then left out. Raises InputError when the rows are of more than one data set, version of it or
    sample of it (their scores cannot be compared), a file cannot be read, or no row is left.
    """

    def attempt() -> pa.Table:
        named = (*objectives, *_columns_of(pick))
        everything = _rows_to_choose_from(folders, where, damaged, None if mean_datasets else named)
        table = filter_rows(everything, where) if where else everything
        chosen = chosen_rows(table, split, several_datasets=mean_datasets)
        if _of_several_seeds(chosen):
            if "schedule" not in table.schema.names:
                heard = _unheard if damaged else None
                table = everything = _rows_to_choose_from(folders, where, heard, None)
                chosen = chosen_rows(table, split)
            chosen = mean_over_seeds(chosen)
        if mean_datasets:
            chosen = mean_over_datasets(chosen)
        directions = objectives_for(chosen, tuple(objectives))
        best = front(chosen, directions)
        if pick:
            best = pick_row(best, pick, tuple(directions))
        scored = with_test_scores(best, everything, across_datasets=mean_datasets)
        if any(map(averaged, best["dataset"].unique().to_pylist())):
            scored = _with_each_dataset(scored, everything)
        if tables.FILE in best.schema.names:
            scored = _filled_up(tables.rows_at(best, store.ROWS), scored)
        complete = _with_smaller_equals(scored, folders, damaged, known=not mean_datasets)
        failed = _failed_beside(chosen, table)
        return complete.replace_schema_metadata({**(complete.schema.metadata or {}), FAILED: str(failed)})

    return tables.settled(attempt)


def _failed_beside(chosen: pa.Table, table: pa.Table) -> int:
    """How many trials of ``table`` failed where those ``chosen`` from were measured."""
    lost = table.filter(pc.equal(table["status"], "failed"))
    for name in ("dataset", "split"):
        lost = lost.filter(pc.is_in(lost[name], chosen[name].unique()))
    return len(lost)


_INTERVAL = ("document_speedup_low", "document_speedup_high")
_NARROW = (
    *store.LATEST_COLUMNS,
    *("seed", "sample", "contents", "backbone", "hardware", "parameters"),
    *DEFAULT_OBJECTIVES,
    *OBJECTIVES_ACROSS_BACKBONES,
    *_INTERVAL,
)
"""What choosing a front needs besides the objectives; the rest is read of the front alone."""


_CONFIGURED = ("trial", "schedule", "recovered")
_AVERAGED = ("ndcg_at_10_low", "ndcg_at_10_high", "bm25_ndcg_at_10")
"""What telling seeds and data sets of one configuration needs besides."""


def _rows_to_choose_from(
    folders: Folders, where: str | None, damaged: Damaged | None, named: Sequence[str] | None
) -> pa.Table:
    """The last row of each trial. Without ``where``, which may name any column, few columns are read: those
    ``named``, or, where rows are to be averaged (None), all that have a mean."""
    if where:
        return store.latest(store.read(folders, damaged=damaged))
    if named is None:
        columns = (*_NARROW, *DIRECTIONS, *_CONFIGURED, *_AVERAGED)
        return store.latest(store.read(folders, columns=columns, damaged=damaged, places=True))
    columns = (*_NARROW, *(name for name in named if name in DIRECTIONS))
    table = store.read(folders, columns=columns, damaged=damaged, places=True)
    if pc.any(pc.equal(table["sample"].fill_null(""), "")).as_py():  # rows before schema 4
        table = store.read(
            folders, columns=(*columns, "trial"), damaged=None if damaged is None else _unheard, places=True
        )
    return store.latest(table)


def _unheard(message: str) -> None:
    """Of a file that was told of already."""


def _of_several_seeds(rows: pa.Table) -> bool:
    return bool(pc.count_distinct(rows["seed"].fill_null(0)).as_py() > 1)


def _filled_up(full: pa.Table, scored: pa.Table) -> pa.Table:
    """All columns of some rows, with what was made of them in the place of their own."""
    for name in scored.schema.names:
        if name in full.schema.names:
            full = full.set_column(full.schema.get_field_index(name), name, scored[name])
        elif name not in (tables.FILE, tables.ROW):
            full = full.append_column(name, scored[name])
    return full


def chosen_rows(table: pa.Table, split: str | None = None, *, several_datasets: bool = False) -> pa.Table:
    """The successful rows a front is chosen from: one split (dev, where there is one), one data set unless
    several are wanted, one sample of each. Of a study over several data sets these are its means."""
    chosen = _of_split(_successful(table), split)
    chosen = _without_means(chosen) if several_datasets else _means_alone(chosen)
    datasets = sorted(chosen["dataset"].unique().to_pylist())
    if len(datasets) > 1 and not several_datasets:
        raise InputError(
            f"the rows are of {len(datasets)} data sets ({', '.join(datasets)}): no comparison; "
            f"choose one, for example --where \"dataset = '{datasets[0]}'\", or --mean-datasets"
        )
    for dataset in datasets:
        rows = _only(chosen, "dataset", dataset)
        _check_one_sample(rows)
        _check_one_content(rows)
    return chosen


def _means_alone(rows: pa.Table) -> pa.Table:
    """Without the rows of single data sets that others here are the means of."""
    of_means = _of_means(rows)
    if not pc.any(of_means).as_py():
        return rows
    has_mean = pc.is_in(rows["trial_id"], rows.filter(of_means)["trial_id"].unique())
    return rows.filter(pc.or_(of_means, pc.invert(has_mean)))


def _without_means(rows: pa.Table) -> pa.Table:
    of_means = _of_means(rows)
    return rows.filter(pc.invert(of_means)) if pc.any(of_means).as_py() else rows


def _of_means(rows: pa.Table) -> pa.ChunkedArray:
    names = [name for name in rows["dataset"].unique().to_pylist() if averaged(name)]
    return pc.is_in(rows["dataset"], pa.array(names, pa.string()))


def _check_one_sample(rows: pa.Table) -> None:
    """Scores over other queries or fewer documents are higher or lower for that alone."""
    names = ["sample", "split", "dataset", "study", "seed"]
    rows = rows.set_column(rows.schema.get_field_index("sample"), "sample", samples(rows))
    found: dict[str, dict[str, Any]] = {}
    for record in rows.group_by(names, use_threads=False).aggregate([]).to_pylist():
        found.setdefault(record["sample"], record)
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


def samples(rows: pa.Table) -> pa.Array:
    """What part of its split each row was measured on. Rows before schema 4 say so in their ``trial``."""
    told = rows["sample"].fill_null("")
    if pc.all(pc.not_equal(told, "")).as_py():
        return told
    columns = (told.to_pylist(), rows["trial"].to_pylist(), rows["split"].to_pylist())
    return pa.array(
        [
            sample or sample_in_words(json.loads(trial), split)
            for sample, trial, split in zip(*columns, strict=True)
        ],
        pa.string(),
    )


def _check_one_content(rows: pa.Table) -> None:
    """A data set that was written anew keeps its name. Rows before schema 3 do not say what they read."""
    told = rows.select(["study", "contents"]).group_by(["study", "contents"], use_threads=False).aggregate([])
    studies = {
        contents["dataset"]: record["study"]
        for record in told.to_pylist()
        if "dataset" in (contents := json.loads(record["contents"] or "{}"))
    }
    if len(studies) > 1:
        raise InputError(
            f"the rows are of {len(studies)} versions of {rows['dataset'][0].as_py()}, which changed in "
            "between: no comparison; choose the folder of one study"
        )


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
    conditions = [_pick_condition(text) for text in pick.split(",")]
    for wanted in conditions:
        kept = [wanted.holds(value) for value in rows[wanted.column].to_pylist()]
        rows = rows.filter(pa.array(kept, pa.bool_()))
    if len(rows) == 0:
        raise InputError(f"--pick: no row of the front has {pick}; see the front without --pick")
    named = {wanted.column for wanted in conditions}
    decisive = next((name for name in objectives if name not in named), objectives[0])
    costs = costs_of(rows, objectives_for(rows, (decisive,)))
    return rows.slice(int(costs[:, 0].argmin()), 1)


def _columns_of(pick: str | None) -> list[str]:
    """What the conditions of ``pick_row`` name."""
    if not pick or pick.strip() == "knee":
        return []
    return [_pick_condition(text).column for text in pick.split(",")]


def _pick_condition(text: str) -> Condition:
    try:
        return condition(text)
    except InputError as error:
        raise InputError(f"--pick: {error}, or 'knee'") from None


_ABOVE_FLOPS = 1.15  # normalisation and memory traffic go with the FLOPs, and are not counted


def is_doubtful(row: Mapping[str, Any]) -> bool:
    """Whether a row's speed-up is surely more than the FLOPs that were saved."""
    speedup, flops = row["document_speedup_low"] or row["document_speedup"], row["flops_ratio"]
    return bool(speedup and flops) and speedup * flops > _ABOVE_FLOPS


def rows_of_trial(table: pa.Table, trial: str, split: str | None = None) -> list[TrialRow]:
    """The rows of one trial in ``table``. Raises InputError where ``trial``, which may be shortened, fits
    none or several."""
    rows = [
        row
        for row in store.trial_rows(table.filter(pc.starts_with(table["trial_id"], trial)))
        if split in (None, row.split)
    ]
    if not rows:
        where = f" on split {split}" if split else ""
        raise InputError(f"there is no trial '{trial}'{where}; effir-ray pareto shows the ids there are")
    found = sorted({row.trial_id for row in rows})
    if len(found) > 1:
        raise InputError(f"'{trial}' fits {len(found)} trials ({', '.join(found)}); give more digits")
    return rows


def _successful(table: pa.Table) -> pa.Table:
    kept = _only(table, "status", "ok")
    if len(kept) == 0:
        raise InputError(f"no successful trial among the {len(table)} rows that were asked for")
    return kept


def _of_split(table: pa.Table, split: str | None) -> pa.Table:
    splits = table["split"].unique().to_pylist()
    wanted = split or ("dev" if "dev" in splits else splits[0])
    if wanted not in splits:
        raise InputError(f"no rows of split '{wanted}'; there are {', '.join(sorted(splits))}")
    return _only(table, "split", wanted)


def _only(table: pa.Table, column: str, value: str) -> pa.Table:
    kept = pc.equal(table[column], value)
    return table if pc.all(kept.fill_null(False)).as_py() else table.filter(kept)


def with_test_scores(rows: pa.Table, table: pa.Table, *, across_datasets: bool = False) -> pa.Table:
    """``rows`` with the column ``test_ndcg_at_10``, looked up among the test rows of ``table``; that of a
    mean is the mean over the seeds (and data sets) that were tested."""
    if SEEDS in rows.schema.names or DATASETS in rows.schema.names:
        return _with_mean_test_scores(rows, table, across_datasets)
    names = ["study", "trial_id", "dataset", "ndcg_at_10"]
    same = pc.is_in(table["trial_id"], rows["trial_id"].unique())
    tested = table.filter(pc.and_(same, pc.equal(table["split"], "test"))).select(names).to_pylist()
    scores = {tuple(record[name] for name in names[:-1]): record["ndcg_at_10"] for record in tested}
    keys = zip(*(rows[name].to_pylist() for name in names[:-1]), strict=True)
    return rows.append_column(TEST_COLUMN, pa.array([scores.get(key) for key in keys], pa.float64()))


def _with_each_dataset(rows: pa.Table, table: pa.Table) -> pa.Table:
    """``rows`` that are means over data sets with the column ``datasets``: what ``table`` has of each, of
    several seeds the mean."""
    several = SEEDS in rows.schema.names
    names = ["backbone", "schedule", "recovered", "split", "trial"] if several else ["trial_id", "split"]

    def key(record: Mapping[str, Any]) -> tuple[str, ...]:
        if several:
            return configuration({**record, "dataset": ""})
        return tuple(record[name] for name in names)

    names = ["study", *names]
    parts = pa.array([part for name in rows["dataset"].unique().to_pylist() for part in averaged(name)])
    same = table.filter(pc.and_(pc.is_in(table["dataset"], parts), pc.equal(table["status"], "ok")))
    scores: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for record in same.select([*names, "dataset", "ndcg_at_10"]).to_pylist():
        scores.setdefault(key(record), {}).setdefault(record["dataset"], []).append(record["ndcg_at_10"])
    found = [scores.get(key(record), {}) for record in rows.select(names).to_pylist()]
    means = [{name: round(float(np.mean(values)), 6) for name, values in each.items()} for each in found]
    return rows.append_column(DATASETS, pa.array(map(json.dumps, means), pa.string()))


def _with_mean_test_scores(rows: pa.Table, table: pa.Table, across_datasets: bool) -> pa.Table:
    names = ["backbone", "schedule", "recovered", "dataset", "trial"]

    def key(record: Mapping[str, Any]) -> tuple[str, ...]:
        return configuration({**record, "split": "test"}, across_datasets=across_datasets)

    tested = table.filter(pc.and_(pc.equal(table["split"], "test"), pc.equal(table["status"], "ok")))
    scores: dict[tuple[str, ...], list[float]] = {}
    for record in tested.select([*names, "ndcg_at_10"]).to_pylist():
        scores.setdefault(key(record), []).append(record["ndcg_at_10"])
    found = [scores.get(key(record)) for record in rows.select(names).to_pylist()]
    means = [None if values is None else float(np.mean(values)) for values in found]
    return rows.append_column(TEST_COLUMN, pa.array(means, pa.float64()))


def _difference(theirs: Sequence[query_scores.ByQuery], mine: Sequence[query_scores.ByQuery]) -> Interval:
    return bootstrap_interval(*(differences(*both) for both in zip(theirs, mine, strict=True)))


def _with_smaller_equals(
    rows: pa.Table, folders: Folders, damaged: Damaged | None, *, known: bool = True
) -> pa.Table:
    """``rows`` of a front with the column ``not_better_than``; null where scores of single queries are
    missing, and everywhere where they are not ``known`` to be of one data set."""
    if not known:
        return rows.append_column(EQUAL_COLUMN, pa.nulls(len(rows), pa.string()))
    names = ("study", "trial_id", "dataset", "split", "parameters")
    records = rows.select(names).to_pylist()
    kept = query_scores.read(folders, trials=rows["trial_id"].unique().to_pylist(), damaged=damaged)
    scores = query_scores.by_trial(kept)
    by_size = [
        (record["parameters"], record["trial_id"], found)
        for record in records
        if record["parameters"]
        and (found := query_scores.of_row(scores, *(record[name] for name in names[:-1])))
    ]
    by_size.sort(key=lambda entry: entry[:2])
    equals = {
        trial: next(
            (
                smaller
                for size, smaller, theirs in by_size
                if size < parameters and _difference(theirs, mine).low <= 0
            ),
            None,
        )
        for parameters, trial, mine in by_size
    }
    column = [equals.get(record["trial_id"]) for record in records]
    return rows.append_column(EQUAL_COLUMN, pa.array(column, pa.string()))
