"""Rows written and read: complete, self-describing, tolerant of older files, unforgiving of foreign ones."""

import errno
import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from effir_ray.errors import InputError
from effir_ray.results import store
from effir_ray.results.schema import ARROW_SCHEMA, DIRECTIONS, SCHEMA_VERSION, TrialRow


def row(trial_id: str = "a", **values: object) -> TrialRow:
    base = {
        "study": "s",
        "trial_id": trial_id,
        "trial": json.dumps({"seed": 1}),
        "schedule": "full",
        "backbone": "random:llama",
        "dataset": "stdlib",
        "split": "dev",
        "ndcg_at_10": 0.5,
        "parameters": 1000,
    }
    return TrialRow.model_validate(base | values)


def test_what_is_appended_is_read_back_equal(tmp_path: Path) -> None:
    rows = [row("a"), row("b", status="failed", reason="loss is NaN", ndcg_at_10=None)]
    store.append(tmp_path, rows)
    table = store.read([tmp_path])
    assert table.schema.equals(ARROW_SCHEMA, check_metadata=True)
    assert [TrialRow.model_validate(record) for record in table.to_pylist()] == rows


def test_parallel_writers_lose_nothing(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda index: store.append(tmp_path, [row(str(index))]), range(32)))
    names = sorted(store.read([tmp_path])["trial_id"].to_pylist(), key=int)
    assert names == [str(index) for index in range(32)]


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(table: pa.Table, place: Path) -> None:
        place.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full_disk)
    with pytest.raises(InputError, match="no disk space"):
        store.append(tmp_path, [row()])
    assert list((tmp_path / "rows").iterdir()) == []


def test_an_older_file_reads_with_nulls_for_later_columns(tmp_path: Path) -> None:
    table = pq.read_table(store.append(tmp_path / "new", [row()]))
    older = table.drop_columns(["device_seconds", "query_speedup"]).replace_schema_metadata(
        {"effir_ray_schema": "0"}
    )
    pq.write_table(older, tmp_path / "old.parquet")
    both = store.read([tmp_path / "old.parquet", tmp_path / "new"])
    assert len(both) == 2
    assert both["device_seconds"].null_count == 2
    assert both["ndcg_at_10"].to_pylist() == [0.5, 0.5]


def test_a_damaged_column_name_is_a_damaged_file(tmp_path: Path) -> None:
    pq.write_table(pa.table({"columnname": [1]}), tmp_path / "a.parquet", compression="none")
    damaged = (tmp_path / "a.parquet").read_bytes().replace(b"columnname", b"\x80olumnname")
    (tmp_path / "a.parquet").write_bytes(damaged)
    with pytest.raises(InputError, match=r"a\.parquet: not a readable Parquet file"):
        store.read([tmp_path])


def test_a_newer_or_foreign_file_is_refused_by_name(tmp_path: Path) -> None:
    table = pa.table({"x": [1]})
    pq.write_table(table, tmp_path / "foreign.parquet")
    newer = table.replace_schema_metadata({"effir_ray_schema": str(SCHEMA_VERSION + 1)})
    pq.write_table(newer, tmp_path / "newer.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    for name, message in (("foreign", "not a table"), ("newer", "upgrade"), ("broken", "not a readable")):
        with pytest.raises(InputError, match=rf"{name}\.parquet.*{message}"):
            store.read([tmp_path / f"{name}.parquet"])


def test_missing_and_empty_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        store.read([tmp_path / "absent"])
    with pytest.raises(InputError, match="no results here"):
        store.read([tmp_path])


def test_rows_of_several_folders_come_oldest_first(tmp_path: Path) -> None:
    """A study measured again in another folder replaces the older row, whatever folder is named first."""
    days = [datetime(2026, 1, day, tzinfo=UTC) for day in (1, 2, 3)]
    store.append(tmp_path / "new", [row("a", created_at=days[2]), row("b", created_at=days[0])])
    store.append(tmp_path / "old", [row("a", created_at=days[1], ndcg_at_10=0.1)])
    table = store.read([tmp_path / "new", tmp_path / "old"])
    assert table["created_at"].to_pylist() == days
    assert store.latest(table)["ndcg_at_10"].to_pylist() == [0.5, 0.5]


def test_latest_keeps_the_last_row_of_a_trial_and_split(tmp_path: Path) -> None:
    store.append(tmp_path, [row("a", ndcg_at_10=0.1), row("b"), row("a", split="test")])
    store.append(tmp_path, [row("a", ndcg_at_10=0.2)])
    kept = store.latest(store.read([tmp_path])).to_pylist()
    assert [(record["trial_id"], record["split"], record["ndcg_at_10"]) for record in kept] == [
        ("b", "dev", 0.5),
        ("a", "test", 0.5),
        ("a", "dev", 0.2),
    ]


def test_attempts_count_more_than_clocks(tmp_path: Path) -> None:
    early, late = (datetime(2026, 1, day, tzinfo=UTC) for day in (1, 2))
    store.append(tmp_path, [row("a", attempt=2, ndcg_at_10=0.2, created_at=early)])
    store.append(tmp_path, [row("a", attempt=1, ndcg_at_10=0.1, created_at=late)])
    store.append(tmp_path, [row("a", attempt=3, status="failed", reason="no luck", ndcg_at_10=None)])
    assert store.latest(store.read(tmp_path))["ndcg_at_10"].to_pylist() == [0.2]


@pytest.mark.parametrize(
    "wrong",
    [
        {"ndcg_at_10": None},
        {"ndcg_at_10": 54.3},
        {"ndcg_at_10": float("nan")},
        {"status": "failed"},
        {"document_ms": 0.0},
        {"trial": "{not json"},
        {"split": "validation"},
        {"surprise": 1},
    ],
)
def test_a_row_that_cannot_be_trusted_cannot_be_made(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        row(**wrong)


def test_every_objective_is_a_described_numeric_column() -> None:
    for name in DIRECTIONS:
        field = ARROW_SCHEMA.field(name)
        assert pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
        assert field.metadata[b"description"]
