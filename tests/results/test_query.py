"""SQL over results sees the tables and nothing else."""

import resource
from pathlib import Path

import pyarrow as pa
import pytest

from effir_ray.errors import InputError
from effir_ray.results import query
from effir_ray.results.published import published, same_dataset, schedule_of
from effir_ray.results.query import select, where

TABLE = pa.table({"schedule": ["full", "2M"], "ndcg_at_10": [0.5, 0.4], "trial": ['{"seed": 1}', "{}"]})


def test_rows_can_be_selected_joined_and_their_json_read() -> None:
    sql = """SELECT r.schedule, r.trial->>'seed' AS seed, max(p.ndcg_at_10) AS best
             FROM trials r LEFT JOIN published p USING (schedule) GROUP BY ALL ORDER BY r.schedule"""
    found = select({"trials": TABLE, "published": published()}, sql).to_pylist()
    assert [(row["schedule"], row["seed"]) for row in found] == [("2M", None), ("full", "1")]
    assert found[1]["best"] > 0.8


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM read_csv('{file}')",
        "SELECT * FROM '{file}'",
        "COPY trials TO '{file}'",
        "ATTACH '{file}.db'",
        "INSTALL httpfs",
        "SET enable_external_access = true",
        "SELECT 1; SELECT 2",
        "SELECT * FROM secret_variable",
        "SELEC 1",
        "",
    ],
)
def test_nothing_but_one_select_over_the_tables_runs(sql: str, tmp_path: Path) -> None:
    secret_variable = pa.table({"x": [1]})
    file = tmp_path / "data.csv"
    file.write_text("a\n1\n")
    with pytest.raises(InputError, match=r"^SQL: "):
        select({"trials": TABLE}, sql.format(file=file))
    assert secret_variable.num_rows == 1
    assert file.read_text() == "a\n1\n"
    assert [path.name for path in tmp_path.iterdir()] == ["data.csv"]


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT md5(repeat('x', 2000000000))",
        "SELECT [i FOR i IN range(500000000)]",
        "SELECT string_agg(range::VARCHAR, '') FROM range(1000000000)",
    ],
)
def test_a_query_that_wants_all_memory_is_stopped(sql: str) -> None:
    """DuckDB's own limit leaves out the first two."""
    limit = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises(InputError, match=r"^SQL: Out of Memory"):
        select({"trials": TABLE}, sql)
    assert resource.getrlimit(resource.RLIMIT_DATA) == limit


def test_a_query_that_is_interrupted_while_its_result_is_read_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(query, "_SECONDS", 0.2)
    monkeypatch.setattr(query, "_BYTES", 1 << 40)
    with pytest.raises(InputError, match="stopped after"):
        select({}, "SELECT * FROM range(100000000000)")


def test_a_condition_keeps_the_schema() -> None:
    kept = where(TABLE, "ndcg_at_10 > 0.45 -- a comment")
    assert kept.schema == TABLE.schema
    assert kept["schedule"].to_pylist() == ["full"]
    with pytest.raises(InputError, match="nosuch"):
        where(TABLE, "nosuch = 1")


def test_the_published_tables_hold_the_figures_of_the_paper() -> None:
    rows = published().to_pylist()
    effir = {
        row["source"]: row
        for row in rows
        if row["variant"] == "EffiR-16M-width-30" and row["dataset"] == "Average"
    }
    assert effir["T3-main"]["ndcg_at_10"] == pytest.approx(0.543)
    assert effir["T3-main"]["document_speedup"] == 1.82
    assert effir["T3-main"]["schedule"] == "16M-w30"
    assert len(rows) == 788
    assert sum(row["ndcg_at_10"] is None for row in rows) == 1  # the unreadable cell


@pytest.mark.parametrize(
    ("variant", "schedule"),
    [
        ("full", "full"),
        ("drop-16M8A", "16M8A"),
        ("drop-last-16B", "last16B"),
        ("EffiR-16M-width-30", "16M-w30"),
        ("RepLLaMA", None),
        ("full nf4 (4.3 GB)", None),
    ],
)
def test_variants_of_the_paper_are_named_as_schedules(variant: str, schedule: str | None) -> None:
    assert schedule_of(variant) == schedule


def test_data_sets_match_under_the_names_beir_gives_them() -> None:
    assert same_dataset("webis-touche2020", "Touche-2020")
    assert same_dataset("scifact", "SciFact")
    assert not same_dataset("stdlib", "SciFact")
