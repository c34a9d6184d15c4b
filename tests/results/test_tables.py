"""Tables on disk while they are compacted, and the scores of single queries beside the rows."""

from __future__ import annotations

import threading
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from effir_ray.errors import InputError
from effir_ray.results import query_scores, store, tables
from effir_ray.results.query import query
from effir_ray.results.query_scores import QUERY_SCORES
from effir_ray.results.schema import TrialRow


def row(trial_id: str, score: float = 0.5, **values: object) -> TrialRow:
    base = {"study": "s", "trial": "{}", "schedule": "full", "backbone": "m", "dataset": "d", "split": "dev"}
    return TrialRow.model_validate(base | {"trial_id": trial_id, "ndcg_at_10": score} | values)


def scores(*values: float) -> dict[str, dict[str, float]]:
    metrics = query_scores.METRICS.values()
    return {f"q{i}": dict.fromkeys(metrics, value) for i, value in enumerate(values)}


def ids(folder: Path) -> list[str]:
    return sorted(store.read(folder)["trial_id"].to_pylist())


def test_many_files_become_one_and_no_row_is_lost_or_doubled(tmp_path: Path) -> None:
    for number in range(7):
        store.append(tmp_path, [row(f"t{number}")])
    before = store.read(tmp_path).to_pylist()
    made = tables.compact(tmp_path, store.ROWS)
    assert made is not None and list((tmp_path / "rows").iterdir()) == [made]
    assert store.read(tmp_path).to_pylist() == before
    written = tables._columns_with_values(made, pq.ParquetFile(made))
    assert {"trial_id", "ndcg_at_10"} <= set(written) and "query_ms" not in written
    store.append(tmp_path, [row("later")])
    assert ids(tmp_path) == sorted([*(f"t{number}" for number in range(7)), "later"])
    tables.compact(tmp_path, store.ROWS)
    assert len(list((tmp_path / "rows").iterdir())) == 1 and len(ids(tmp_path)) == 8
    assert tables.compact(tmp_path, store.ROWS) is None


def test_a_kill_before_the_old_files_go_counts_no_row_twice(tmp_path: Path) -> None:
    old = [store.append(tmp_path, [row(f"t{number}")]) for number in range(3)]
    contents = [file.read_bytes() for file in old]
    tables.compact(tmp_path, store.ROWS)
    for file, content in zip(old[1:], contents[1:], strict=True):
        file.write_bytes(content)  # as if they had not been deleted yet
    assert ids(tmp_path) == ["t0", "t1", "t2"]
    tables.compact(tmp_path, store.ROWS)
    assert len(list((tmp_path / "rows").iterdir())) == 1 and ids(tmp_path) == ["t0", "t1", "t2"]


def test_readers_and_writers_go_on_while_it_happens(tmp_path: Path) -> None:
    store.append(tmp_path, [row("first")])
    counts, ended = [], threading.Event()

    def read() -> None:
        while not ended.is_set():
            counts.append(len(store.read(tmp_path)))

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(30):
        store.append(tmp_path, [row(f"t{number}")])
        if number % 5 == 4:
            tables.compact(tmp_path, store.ROWS)
    ended.set()
    reader.join()
    assert counts == sorted(counts) and len(ids(tmp_path)) == 31


def test_a_damaged_file_is_left_as_it_is(tmp_path: Path) -> None:
    for number in range(3):
        store.append(tmp_path, [row(f"t{number}")])
    damaged = tmp_path / "rows" / "00-damaged.parquet"
    damaged.write_bytes(b"PAR1 and no more")
    tables.compact(tmp_path, store.ROWS)
    assert damaged.exists()
    with pytest.raises(InputError, match=r"00-damaged\.parquet: not a readable Parquet file"):
        store.read(tmp_path)
    heard: list[str] = []
    assert len(store.read(tmp_path, damaged=heard.append)) == 3
    assert len(heard) == 1 and "00-damaged.parquet" in heard[0]


def test_columns_go_by_the_names_of_the_schema_which_row_groups_repeat(tmp_path: Path) -> None:
    store.append(tmp_path, [row("first")])
    (file,) = (tmp_path / "rows").glob("*.parquet")
    content = file.read_bytes()
    repeated = [at for at in range(len(content)) if content.startswith(b"\x05study", at)][1] + 1
    file.write_bytes(content[:repeated] + b"\x80" + content[repeated + 1 :])
    with pytest.raises(UnicodeDecodeError):
        pq.read_metadata(file).row_group(0).to_dict()
    assert ids(tmp_path) == ["first"]


def test_single_queries_are_a_table_of_sql(tmp_path: Path) -> None:
    for trial, values in (("a", (0.0, 1.0)), ("b", (0.5, 1.0))):
        store.append(tmp_path, [row(trial, sum(values) / 2)])
        query_scores.append(tmp_path, row(trial), scores(*values))
    query_scores.append(tmp_path, row("b"), scores(0.25, 0.75))  # tried again: the last one counts
    tables.compact(tmp_path, QUERY_SCORES)
    found = query(
        tmp_path,
        "SELECT trial_id, avg(q.ndcg_at_10) AS mean FROM trials JOIN query_scores q USING (trial_id) "
        "GROUP BY trial_id ORDER BY trial_id",
    )
    assert found.to_pylist() == [{"trial_id": "a", "mean": 0.5}, {"trial_id": "b", "mean": 0.5}]
    by_trial = query_scores.by_trial(query_scores.read(tmp_path, trials=["b"]))
    assert by_trial == {("s", "b", "d", "dev"): {"q0": 0.25, "q1": 0.75}}
    assert len(query_scores.read(tmp_path / "elsewhere")) == 0
