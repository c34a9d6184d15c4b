"""Tables of benchmarks that measure no trials."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from effir_ray.errors import InputError
from effir_ray.results.query import query


def test_files_of_one_kind_are_one_table(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("method,loss\nx,1\ny,2\n")
    pq.write_table(pa.table({"method": ["z"], "loss": [0.5]}), tmp_path / "b.parquet")
    (tmp_path / "picture.svg").write_text("<svg/>")
    found = query(tmp_path, "SELECT method, loss FROM measurements ORDER BY loss")
    assert found.to_pylist() == [
        {"method": "z", "loss": 0.5},
        {"method": "x", "loss": 1.0},
        {"method": "y", "loss": 2.0},
    ]
    (tmp_path / "c.json").write_text(json.dumps([{"documents": 5}]))
    with pytest.raises(InputError, match="have other columns: give one of them in place of its folder"):
        query(tmp_path, "SELECT * FROM measurements")
    assert query(tmp_path / "c.json", "SELECT documents FROM measurements").to_pylist() == [{"documents": 5}]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "", "a.csv: no table"),
        ("a.json", "[1, 2]", "a.json: no table"),
        ("a.json", "{", "a.json"),
        ("a.parquet", "PAR1", "a.parquet: no table"),
        ("a.txt", "x", "no measurements here"),
    ],
)
def test_what_is_no_table_is_said(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        query(tmp_path, "SELECT * FROM measurements")


def test_a_measurement_reaches_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x\n1\n")
    with pytest.raises(InputError, match="SQL"):
        query(tmp_path, f"SELECT * FROM measurements, '{tmp_path}/a.csv'")
