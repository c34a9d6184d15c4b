"""The footer reader agrees with pyarrow, and survives what pyarrow's own does not."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from effir_ray.errors import InputError
from effir_ray.parquet_files import ParquetGroups
from effir_ray.parquet_footer import BadFooter, Chunk, read_footer


def written(table: pa.Table, **options: object) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


TABLES = {
    "texts": pa.table({"_id": ["a", "b", None], "text": ["x" * 1000, "", "y"]}),
    "lists": pa.table({"a": [[1, 2], [], None], "b": [{"c": 1.0, "d": ["e"]}] * 3}),
    "empty": pa.table({"a": pa.array([], pa.float32())}),
    "wide": pa.table({f"c{number}": np.arange(100) for number in range(40)}),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize(
    "options", [{}, {"row_group_size": 2}, {"compression": "NONE", "version": "1.0"}], ids=str
)
def test_sizes_are_those_of_pyarrow(name: str, options: dict[str, object]) -> None:
    content = written(TABLES[name], **options)
    metadata = pq.read_metadata(io.BytesIO(content))
    expected = []
    for group in range(metadata.num_row_groups):
        parts = [metadata.row_group(group).column(number) for number in range(metadata.num_columns)]
        expected.append(
            [
                Chunk(
                    values=part.num_values,
                    packed=part.total_compressed_size,
                    unpacked=part.total_uncompressed_size,
                )
                for part in parts
            ]
        )
    assert read_footer(io.BytesIO(content)) == expected


@pytest.mark.parametrize("cut", [0, 3, 11, 40])
def test_what_is_no_footer_is_said(cut: int) -> None:
    content = written(TABLES["texts"])
    with pytest.raises(BadFooter):
        read_footer(io.BytesIO(content[:cut]))
    damaged = content[: -8 - cut - 1] + b"\xff" * (cut + 1) + content[-8:]
    with pytest.raises(BadFooter):
        read_footer(io.BytesIO(damaged))


def test_structures_without_end_are_refused() -> None:
    deep = b"\x1c" * 10_000  # a structure in the first field of a structure, and so on
    content = b"PAR1" + deep + len(deep).to_bytes(4, "little") + b"PAR1"
    with pytest.raises(BadFooter, match="structures in structures"):
        read_footer(io.BytesIO(content))


def test_statistics_that_are_not_the_schemas_end_no_process(tmp_path: Path) -> None:
    """A column that is made required has histograms of levels that it cannot have."""
    content = bytearray(written(TABLES["texts"]))
    name = content.index(b"\x03_id", len(content) - 8 - int.from_bytes(content[-8:-4], "little"))
    assert content[name - 3 : name] == b"\x25\x02\x18", "repetition: optional, then the name"
    content[name - 2] = 0
    file = tmp_path / "corpus.parquet"
    file.write_bytes(content)
    groups = ParquetGroups(file, "corpus.parquet")
    with pytest.raises(InputError, match="row group 0 is damaged"):
        _ = list(groups.batches(0))
