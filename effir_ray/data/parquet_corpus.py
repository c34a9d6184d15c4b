"""A corpus in Parquet: ``corpus.parquet``, a file or a folder of part files (in the order of their names).

Columns ``_id``, ``text`` and, if there is one, ``title``. Rows are read in small batches; a part of the
corpus is read from the row group it begins in, so small row groups make many shards cheap.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effir_ray.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

    from effir_ray.parquet_files import ParquetGroups

_COLUMNS = ("_id", "title", "text")


class ParquetRows:
    """Rows of a Parquet corpus by their number from 0. Raises InputError for what is no such corpus."""

    def __init__(self, path: Path) -> None:
        from effir_ray.parquet_files import ParquetGroups

        self._path = path
        files = [ParquetGroups(part, str(part)) for part in _parts(path)]
        self._columns = {file: _columns(file, path) for file in files}
        self._groups = [(file, group) for file in files for group in range(len(file.rows))]
        self._starts: list[int] = list(accumulate((rows for file in files for rows in file.rows), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, rows: Sequence[int]) -> Iterator[dict[str, Any]]:
        """The records of ``rows``; in ascending order every row group is read once."""
        group, first = -1, 0
        batches: Iterator[pa.RecordBatch] = iter(())
        batch: pa.RecordBatch | None = None
        for row in rows:
            wanted = bisect_right(self._starts, row) - 1
            if wanted != group or row < first:
                group, first = wanted, self._starts[wanted]
                file, number = self._groups[group]
                batches = file.batches(number, self._columns[file])
                batch = self._next(batches, row)
            assert batch is not None
            while row >= first + len(batch):
                first += len(batch)
                batch = self._next(batches, row)
            try:
                record = {name: batch.column(name)[row - first].as_py() for name in batch.schema.names}
            except UnicodeDecodeError as error:
                raise InputError(f"{self._path}:{row + 1}: not UTF-8: {error}") from None
            yield record

    def _next(self, batches: Iterator[pa.RecordBatch], row: int) -> pa.RecordBatch:
        for batch in batches:
            return batch
        raise InputError(f"{self._path}:{row + 1}: no such row, although the file says so; it is damaged")


def part_files(path: Path) -> list[Path]:
    """The files that ``path`` stands for."""
    return sorted(path.glob("*.parquet")) if path.is_dir() else [path]


def _parts(path: Path) -> list[Path]:
    parts = part_files(path)
    if not parts:
        raise InputError(f"{path}: holds no .parquet files")
    return parts


def _columns(file: ParquetGroups, path: Path) -> list[str]:
    found = file.names
    for name in ("_id", "text"):
        if name not in found:
            raise InputError(
                f"{path}: no column '{name}'; found {', '.join(found)}; expected _id, title, text"
            )
    return [name for name in _COLUMNS if name in found]
