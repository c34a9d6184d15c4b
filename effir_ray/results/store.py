"""Tables of rows on disk: append-only Parquet files, written atomically, safe for parallel writers."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from effir_ray.config import parse
from effir_ray.errors import InputError, is_disk_full
from effir_ray.files import whole
from effir_ray.readers import json_object, parse_json, quoted
from effir_ray.results.schema import ARROW_SCHEMA, JSON_COLUMNS, SCHEMA_VERSION, TrialRow

ROWS_FOLDER = "rows"


def append(folder: Path | str, rows: Sequence[TrialRow]) -> Path:
    """Add ``rows`` to the study in ``folder`` as one new file ``rows/<time>-<id>.parquet``; returns it.

    The file appears complete or not at all. Raises InputError when the disk is full.
    """
    table = pa.Table.from_pylist([row.model_dump() for row in rows], schema=ARROW_SCHEMA)
    target = Path(folder) / ROWS_FOLDER
    name = f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}-{uuid.uuid4().hex[:8]}.parquet"
    try:
        target.mkdir(parents=True, exist_ok=True)
        with whole(target / name) as aside:
            pq.write_table(table, aside)
    except Exception as error:
        if is_disk_full(error):
            raise InputError(f"{target}: no disk space left to write results; free some and resume") from None
        raise
    return target / name


Folders = Path | str | Iterable[Path | str]
"""One study folder, ``rows`` folder or Parquet file, or several."""


def read(folders: Folders) -> pa.Table:
    """All rows of the given folders or files, oldest first.

    Files of older schema versions are accepted; their missing columns are null. Raises InputError when there
    is nothing to read, a file is no table of rows, or it was written by a newer effir-ray.
    """
    places = [folders] if isinstance(folders, Path | str) else folders
    files = [file for folder in places for file in _files(Path(folder))]
    table = pa.concat_tables([_read_file(file) for file in dict.fromkeys(files)])
    begun = pa.scalar(datetime.fromtimestamp(0, UTC), ARROW_SCHEMA.field("created_at").type)
    return table.take(pc.sort_indices(table["created_at"].fill_null(begun)))


def trial_rows(table: pa.Table) -> list[TrialRow]:
    """The rows as objects; InputError for one that no effir-ray has written."""
    source = "a row of the results"
    return [
        parse({name: value for name, value in row.items() if value is not None}, TrialRow, source=source)
        for row in table.to_pylist()
    ]


def latest(table: pa.Table) -> pa.Table:
    """One row of every (study, trial, data set, split): a success before any failure, then the last attempt.

    Clocks of machines differ: only between equal attempts does the later row win.
    """
    names = ("study", "trial_id", "dataset", "split", "status", "attempt")
    best: dict[tuple[str, ...], tuple[tuple[bool, int], int]] = {}
    for index, (*key, status, attempt) in enumerate(zip(*(table[n].to_pylist() for n in names), strict=True)):
        rank = (status == "ok", attempt or 1)  # no attempt is written in rows of schema 2
        if tuple(key) not in best or rank >= best[tuple(key)][0]:
            best[tuple(key)] = (rank, index)
    return table.take(pa.array(sorted(index for _, index in best.values()), pa.int64()))


def _files(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    if not place.exists():
        raise InputError(f"{place}: no such folder; give the --out folder of a search")
    nested = place / ROWS_FOLDER
    files = sorted((nested if nested.is_dir() else place).glob("*.parquet"))
    if not files:
        raise InputError(f"{place}: no results here; expected {ROWS_FOLDER}/*.parquet, written by a search")
    return files


def _read_file(file: Path) -> pa.Table:
    try:
        table = pq.read_table(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{file}: not a readable Parquet file ({_first_line(error)})") from None
    version = (table.schema.metadata or {}).get(b"effir_ray_schema")
    if version is None:
        raise InputError(f"{file}: not a table of effir-ray results (its metadata lacks effir_ray_schema)")
    if not version.isdigit() or len(version) > 9:
        raise InputError(f"{file}: results schema {quoted(version.decode('latin-1'))}; expected a number")
    if int(version) > SCHEMA_VERSION:
        raise InputError(
            f"{file}: results schema {int(version)}, newer than {SCHEMA_VERSION} read here; upgrade effir-ray"
        )
    columns = [_column(file, table, field) for field in ARROW_SCHEMA]
    return pa.Table.from_arrays(columns, schema=ARROW_SCHEMA)


def _column(file: Path, table: pa.Table, field: pa.Field) -> pa.ChunkedArray:
    """One column in its type; InputError where a file of others, or a damaged one, has something else."""
    if field.name not in table.schema.names:
        return pa.chunked_array([pa.nulls(len(table), field.type)])
    try:
        column = table[field.name].cast(field.type)
        column.validate(full=True)
    except (pa.ArrowException, KeyError) as error:  # KeyError: the name is there twice
        raise InputError(f"{file}: column {field.name}: {_first_line(error)[:200]}") from None
    if pa.types.is_floating(field.type) and pc.any(pc.invert(pc.is_finite(column))).as_py():
        raise InputError(f"{file}: column {field.name} holds a value that is no finite number")
    if field.name in JSON_COLUMNS:
        for text in column.unique().to_pylist():
            if text is not None:
                json_object(parse_json(text, f"{file}: column {field.name}"), f"{file}: column {field.name}")
    return column


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
