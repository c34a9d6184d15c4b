"""The table ``query_scores``: what every query scored under every row's model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from effir_ray.results import tables
from effir_ray.results.schema import TrialRow, averaged
from effir_ray.results.tables import Damaged, Folders, TableKind

METRICS = {
    "ndcg_at_10": "ndcg@10",
    "recall_at_100": "recall@100",
    "mrr_at_10": "mrr@10",
    "map_at_100": "map@100",
}
"""Column -> what ``evaluation.metrics`` calls it."""

QueryScores = Mapping[str, Mapping[str, float]]
"""Query id -> metric, as ``evaluation.metrics`` names it -> score, 0 to 1."""

ByQuery = Mapping[str, float]
"""Query id -> one score."""

_VERSION = 1
_KEY = {
    "study": "name of the study that ran the trial",
    "trial_id": "the row's trial_id",
    "dataset": "the row's data set",
    "split": "the row's split",
    "query_id": "id of the query in its data set",
}
QUERY_SCORES = TableKind(
    name="query_scores",
    schema=pa.schema(
        [pa.field(name, pa.string(), metadata={"description": text}) for name, text in _KEY.items()]
        + [
            pa.field(name, pa.float64(), metadata={"description": f"{metric} of this query, 0 to 1"})
            for name, metric in METRICS.items()
        ],
        metadata={"effir_ray_query_scores": str(_VERSION)},
    ),
    version=_VERSION,
    version_key=b"effir_ray_query_scores",
)


def append(folder: Path | str, row: TrialRow, scores: QueryScores) -> Path:
    """Add the ``scores`` that ``row`` has the means of to the study in ``folder``, as one new file."""
    columns: dict[str, object] = {name: [getattr(row, name)] * len(scores) for name in list(_KEY)[:-1]}
    columns["query_id"] = list(scores)
    for name, metric in METRICS.items():
        columns[name] = [found[metric] for found in scores.values()]
    return tables.append(folder, QUERY_SCORES, pa.table(columns, schema=QUERY_SCORES.schema))


def read(
    folders: Folders, *, trials: Collection[str] | None = None, damaged: Damaged | None = None
) -> pa.Table:
    """The scores beside the rows of ``folders``, each query of a row once; none where none were kept.

    ``trials``: only rows of these trial ids.
    """
    kept = [place for place in map(_beside, tables.as_places(folders)) if any(place.glob("*.parquet"))]
    if not kept:
        return QUERY_SCORES.schema.empty_table()
    where = None if trials is None else pc.field("trial_id").isin(list(trials))
    table = tables.read(kept, QUERY_SCORES, where=where, damaged=damaged)
    # A trial that was tried again after its scores were written has them twice.
    numbered = table.append_column("_number", pa.array(range(len(table)), pa.int64()))
    last = numbered.group_by(list(_KEY)).aggregate([("_number", "max")])
    return table.take(last["_number_max"].combine_chunks().sort())


def by_trial(table: pa.Table, column: str = "ndcg_at_10") -> dict[tuple[str, ...], dict[str, float]]:
    """(study, trial id, data set, split) -> query id -> score."""
    found: dict[tuple[str, ...], dict[str, float]] = {}
    names = (*_KEY, column)
    for *key, query, score in zip(*(table[name].to_pylist() for name in names), strict=True):
        found.setdefault(tuple(key), {})[query] = score
    return found


def of_row(
    scores: Mapping[tuple[str, ...], ByQuery], study: str, trial_id: str, dataset: str, split: str
) -> tuple[ByQuery, ...]:
    """What ``by_trial`` has of one row, for each data set that it is the mean of; none where one lacks."""
    parts = averaged(dataset) or (dataset,)
    found = [scores.get((study, trial_id, part, split)) for part in parts]
    return tuple(part for part in found if part) if all(found) else ()


def _beside(place: Path) -> Path:
    """The folder of scores that belongs to a study's folder, its folder of rows, or one file of rows."""
    folder = place.parent if place.is_file() else place
    return (folder.parent if folder.name == "rows" else folder) / QUERY_SCORES.name
