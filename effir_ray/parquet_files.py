"""Parquet of others: bounded by what it unpacks to, before that is in memory.

A file of a few kB can hold gigabytes: compressed well, or as one long value that every row points to.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from effir_ray.errors import InputError
from effir_ray.parquet_footer import BadFooter, Chunk, read_footer
from effir_ray.readers import check_regular

MAX_GROUP_BYTES = 512 * 2**20
"""Of the columns that are read of a row group. Usual ones have 128 MiB, a million passages 350."""

MAX_RATIO = 1000
"""Times that a file of texts may shrink by compression; 3 to 10 are usual."""

MAX_ROW_BYTES = 64 * 2**10
"""Of a row of results, in the mean of a file; usual ones have 3 kB."""

_ROWS = 1024  # in memory at once
_DAMAGED = (pa.ArrowException, OSError, UnicodeDecodeError, BadFooter)  # the third: of names and texts


class ParquetGroups:
    """The row groups of ``source``, a path or a file of ``storage``; ``place`` opens the errors.

    Raises InputError for what is no ordinary file and no Parquet.
    """

    def __init__(self, source: Path | Any, place: str) -> None:
        if isinstance(source, Path):
            check_regular(source)  # pyarrow opens paths itself, without Python's lock
        self.place = place
        try:
            self._plain = pq.ParquetFile(source)
            self._coded = coded(source, self._plain)
            self.names: list[str] = self._plain.schema_arrow.names
            self._chunks = chunks_of(source, self._plain)
        except _DAMAGED as error:
            raise InputError(f"{place}: cannot be read as Parquet: {_reason(error)}") from None
        parts = [chunk for group in self._chunks for _, chunk in group]
        packed, size = sum(chunk.packed for chunk in parts), sum(chunk.unpacked for chunk in parts)
        if size > MAX_GROUP_BYTES + MAX_RATIO * packed:
            raise InputError(f"{place}: {packed} bytes unpack to {size >> 20} MiB; expected a file of texts")

    @property
    def rows(self) -> list[int]:
        """How many every row group has."""
        metadata = self._plain.metadata
        return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def batches(self, group: int, columns: list[str] | None = None) -> Iterator[Any]:
        """A row group, some rows at a time; texts may be dictionary-encoded.

        Raises InputError where it is damaged or unpacks to more than ``MAX_GROUP_BYTES``.
        """
        where = f"{self.place}: row group {group}"
        check_group(self._chunks[group], self.names if columns is None else columns, where)
        size = 0
        try:
            file = self._coded if self._repeats(group, columns) else self._plain
            for batch in file.iter_batches(_ROWS, row_groups=[group], columns=columns):
                size += sum(written_out(column) for column in batch.columns)
                check_size(size, where)
                yield batch
        except _DAMAGED as error:
            raise InputError(f"{where} is damaged: {_reason(error)}") from None

    def _repeats(self, group: int, columns: list[str] | None) -> bool:
        """Whether a batch could be large because many rows point to the same text: then it is read with
        every text once, which is slower.
        """
        parts = self._chunks[group]
        if sum(part.values * part.unpacked for _, part in parts) <= MAX_GROUP_BYTES:
            return False
        most: dict[str, int] = {}  # values of a column in a batch; one row may have all of a list's
        for path, part in parts:
            name, _, nested = path.partition(".")
            most[name] = max(most.get(name, 0), part.values if nested else min(part.values, _ROWS))
        for first in self._coded.iter_batches(1, row_groups=[group], columns=columns):
            sizes = [most.get(name, 0) * _longest(first.column(name)) for name in first.schema.names]
            return sum(sizes) > MAX_GROUP_BYTES
        return False


def chunks_of(source: Path | Any, file: pq.ParquetFile) -> list[list[tuple[str, Chunk]]]:
    """The columns of every row group of ``file``, that of ``source``, beside their paths: those of the
    schema, by which they are read. Raises BadFooter.
    """
    with source.open("rb") if isinstance(source, Path) else nullcontext(source) as stream:
        groups = read_footer(stream)
    paths = [file.schema.column(number).path for number in range(len(file.schema))]
    if len(groups) != file.num_row_groups or any(len(group) != len(paths) for group in groups):
        raise BadFooter("damaged footer: row groups of other columns than the schema's")
    rows = [file.metadata.row_group(number).num_rows for number in range(len(groups))]
    most = [max((chunk.values for chunk in group), default=0) for group in groups]
    if any(not 0 <= count <= values for count, values in zip(rows, most, strict=True)) or (
        sum(rows) != file.metadata.num_rows
    ):
        raise BadFooter("damaged footer: other numbers of rows than of values")
    return [list(zip(paths, group, strict=True)) for group in groups]


def coded(source: Path | Any, plain: pq.ParquetFile) -> pq.ParquetFile:
    """``plain``, the file of ``source``, with every text read as a dictionary: once, however many rows have
    it."""
    columns = [plain.schema.column(number) for number in range(len(plain.schema))]
    texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
    return pq.ParquetFile(source, metadata=plain.metadata, read_dictionary=texts)


def check_group(group: Sequence[tuple[str, Chunk]], columns: Collection[str], where: str) -> None:
    """Raise InputError where a row group, with every text once, is too large by what the file says."""
    wanted = set(columns)
    check_size(
        sum(max(part.unpacked, 4 * part.values) for path, part in group if path.partition(".")[0] in wanted),
        where,
    )


def check_rows(table: pa.Table, where: str) -> None:
    """Raise InputError where rows of results are so long that no effir-ray has written them."""
    size = sum(written_out(chunk) for column in table.columns for chunk in column.chunks)
    if size > MAX_ROW_BYTES * (len(table) + _ROWS):
        raise InputError(f"{where}: its {len(table)} rows unpack to {size >> 20} MiB; expected results")


def check_size(size: int, where: str) -> None:
    """Raise InputError for more bytes of a row group than are read."""
    if size > MAX_GROUP_BYTES:
        raise InputError(
            f"{where} unpacks to {size >> 20} MiB or more, at most {MAX_GROUP_BYTES >> 20} are read; "
            "write the file with smaller row groups"
        )


def written_out(column: pa.Array) -> int:
    """Bytes of the values of an array, those that it holds once for many rows counted for each."""
    if pa.types.is_dictionary(column.type):
        lengths = pc.binary_length(column.dictionary)
        return pc.sum(lengths.cast(pa.int64()).take(column.indices)).as_py() or 0
    return int(column.nbytes) if not _parts(column) else sum(written_out(part) for part in _parts(column))


def _longest(column: pa.Array) -> int:
    """Bytes of the longest text in the dictionaries of an array."""
    if pa.types.is_dictionary(column.type):
        return pc.max(pc.binary_length(column.dictionary)).as_py() or 0
    return max((_longest(part) for part in _parts(column)), default=0)


def _parts(column: pa.Array) -> list[pa.Array]:
    """What a column of lists or of structures is made of."""
    if pa.types.is_struct(column.type):
        return list(column.flatten())
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_map)
    if not any(is_kind(column.type) for is_kind in lists):
        return []
    return [column.keys, column.items] if pa.types.is_map(column.type) else [column.flatten()]


def _reason(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
