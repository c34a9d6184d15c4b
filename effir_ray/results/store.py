"""Rows of trials on disk: written, read, and of several attempts the one that counts."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from effir_ray.config import parse
from effir_ray.results import tables
from effir_ray.results.schema import ARROW_SCHEMA, JSON_COLUMNS, SCHEMA_VERSION, TrialRow
from effir_ray.results.tables import Damaged, Folders, TableKind

ROWS_FOLDER = "rows"
ROWS = TableKind(
    name=ROWS_FOLDER,
    schema=ARROW_SCHEMA,
    version=SCHEMA_VERSION,
    version_key=b"effir_ray_schema",
    json_columns=JSON_COLUMNS,
)


def append(folder: Path | str, rows: Sequence[TrialRow]) -> Path:
    """Add ``rows`` to the study in ``folder`` as one new file ``rows/<time>-<id>.parquet``; returns it.

    The file appears complete or not at all. Raises InputError when the disk is full.
    """
    table = pa.Table.from_pylist([row.model_dump() for row in rows], schema=ARROW_SCHEMA)
    return tables.append(folder, ROWS, table)


def read(
    folders: Folders,
    *,
    columns: Sequence[str] | None = None,
    damaged: Damaged | None = None,
    places: bool = False,
) -> pa.Table:
    """All rows of the given folders or files, oldest first; only ``columns``, where some are enough.

    Files of older schema versions are accepted; their missing columns are null. Raises InputError when there
    is nothing to read, a file is no table of rows, or it was written by a newer effir-ray; with ``damaged``,
    which hears of them, such files are left out. ``places``: see ``tables.read``.
    """
    names = None if columns is None else list(dict.fromkeys(["created_at", *columns]))
    table = tables.read(folders, ROWS, columns=names, damaged=damaged, places=places)
    begun = pa.scalar(datetime.fromtimestamp(0, UTC), ARROW_SCHEMA.field("created_at").type)
    times = np.asarray(table["created_at"].fill_null(begun).cast(pa.int64()))
    if (times[1:] >= times[:-1]).all():  # as a file is that was compacted: nothing is moved
        return table
    return table.take(pa.array(np.argsort(times, kind="stable")))


def trial_rows(table: pa.Table) -> list[TrialRow]:
    """The rows as objects; InputError for one that no effir-ray has written."""
    source = "a row of the results"
    return [
        parse({name: value for name, value in row.items() if value is not None}, TrialRow, source=source)
        for row in table.to_pylist()
    ]


KEY = ("study", "trial_id", "dataset", "split")
"""What a row measured; several rows of one key are attempts."""

LATEST_COLUMNS = (*KEY, "status", "attempt")


def latest(table: pa.Table) -> pa.Table:
    """One row of every (study, trial, data set, split): a success before any failure, then the last attempt.

    Clocks of machines differ: only between equal attempts does the later row win.
    """
    if len(table) == 0:
        return table
    key = np.zeros(len(table), np.int64)
    for name in KEY:
        found, values = codes(table[name])
        key = key * (values + 1) + found
        key = np.unique(key, return_inverse=True)[1] if values > 1 else key  # small again: no overflow
    succeeded = np.asarray(pc.fill_null(pc.equal(table["status"], "ok"), False))
    attempt = np.asarray(table["attempt"].fill_null(1))  # no attempt is written in rows of schema 2
    order = np.lexsort((np.arange(len(table)), np.maximum(attempt, 1), succeeded, key))
    last = np.append(key[order][1:] != key[order][:-1], True)
    if last.all():
        return table
    return table.take(pa.array(np.sort(order[last])))


def codes(column: pa.ChunkedArray) -> tuple[np.ndarray, int]:
    """(rows,) the same number for the same text, and how many texts there are; a null is a text too."""
    encoded = column.combine_chunks().dictionary_encode()
    codes = np.asarray(encoded.indices.fill_null(len(encoded.dictionary)), dtype=np.int64)
    return codes, len(encoded.dictionary)
