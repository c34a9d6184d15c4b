"""A Parquet corpus reads as the same corpus in JSON lines does."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from effir_ray import parquet_files
from effir_ray.data.datasets import Dataset, load_dataset
from effir_ray.errors import InputError


def records(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "corpus.jsonl").read_text("utf-8").splitlines()]


def write(folder: Path, table: pa.Table, parts: int) -> None:
    (folder / "corpus.jsonl").unlink()
    target = folder / "corpus.parquet"
    if parts == 1:
        parquet.write_table(table, target, row_group_size=7)
        return
    target.mkdir()
    size = -(-len(table) // parts)
    for part in range(parts):
        parquet.write_table(table.slice(part * size, size), target / f"{part:03}.parquet", row_group_size=5)


@pytest.fixture(params=[1, 3], ids=["file", "folder"])
def pair(request, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Dataset, Dataset]:
    monkeypatch.setattr(parquet_files, "_ROWS", 3)
    other = shutil.copytree(folder, folder.parent / "columns")
    write(other, pa.Table.from_pylist(records(folder)), request.param)
    return load_dataset(folder), load_dataset(other)


def test_the_same_documents_in_any_order(pair: tuple[Dataset, Dataset]) -> None:
    lines, columns = pair
    assert columns.corpus.ids == lines.corpus.ids
    assert list(columns.corpus.iter_documents()) == list(lines.corpus.iter_documents())
    assert list(columns.corpus.iter_documents(11, 23)) == list(lines.corpus.iter_documents(11, 23))
    ids = ["d31", "d2", "d31", "d12", "d11"]
    assert columns.corpus.texts(ids) == lines.corpus.texts(ids)
    sample, expected = (data.sample("test", queries=3, documents=9).corpus for data in (columns, lines))
    assert len(sample) == len(expected) == 9
    assert columns.fingerprint != lines.fingerprint


def test_a_title_is_optional(folder: Path) -> None:
    write(folder, pa.Table.from_pylist(records(folder)).drop(["title"]), 1)
    assert load_dataset(folder).corpus.texts(["d3"]) == ["text 3 é"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda rows: [{"_id": r["_id"], "body": r["text"]} for r in rows],
            "no column 'text'; found _id, body",
        ),
        (lambda rows: [*rows, rows[4]], r"corpus.parquet:41: _id 'd4' was already used on line 5"),
        (lambda rows: [*rows, {"_id": "d40", "text": None}], r"corpus.parquet:41: field 'text'"),
        (lambda rows: [{"_id": n, "text": "t"} for n in range(40)], r"corpus.parquet:1: _id is 0"),
    ],
)
def test_what_is_wrong_is_named(folder: Path, change, said: str) -> None:
    write(folder, pa.Table.from_pylist(change(records(folder))), 1)
    with pytest.raises(InputError, match=said):
        load_dataset(folder)


def test_damaged_pages_are_named_while_reading(folder: Path) -> None:
    write(folder, pa.Table.from_pylist(records(folder)), 1)
    path = folder / "corpus.parquet"
    content = bytearray(path.read_bytes())
    content[4:200] = b"\xff" * 196  # the first row group; the footer stays readable
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"corpus.parquet: row group 0 is damaged"):
        load_dataset(folder)


def test_a_column_that_is_not_utf_8_is_named(folder: Path) -> None:
    table = pa.Table.from_pylist(records(folder))
    raw = pa.array([text.encode("latin-1") for text in table["text"].to_pylist()], pa.binary())
    text = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    write(folder, table.set_column(table.schema.get_field_index("text"), "text", text), 1)
    with pytest.raises(InputError, match=r"corpus.parquet:1: not UTF-8"):
        load_dataset(folder)


def test_no_parquet_at_all(folder: Path) -> None:
    (folder / "corpus.jsonl").rename(folder / "corpus.parquet")
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        load_dataset(folder)
