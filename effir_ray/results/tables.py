"""Kinds of tables on disk: append-only Parquet files, written atomically, safe for parallel writers.

A study's folder has one folder a kind. When a study ends, its many files become one (``compact``), which
names those it replaces: whoever reads while both are there counts every row once.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from effir_ray import storage
from effir_ray.errors import InputError, is_disk_full
from effir_ray.files import whole
from effir_ray.mirrors import Mirror
from effir_ray.parquet_files import check_group, check_rows, check_size, chunks_of, coded
from effir_ray.parquet_footer import BadFooter
from effir_ray.readers import check_regular, json_object, parse_json, quoted

Folders = Path | str | Iterable[Path | str]
"""One study folder (a path or a URI), ``rows`` folder or Parquet file, or several."""

Damaged = Callable[[str], None]
"""Hears what is wrong with a file that is left out."""

FILE, ROW = "_file", "_row"
"""Columns that say where a row lies, see ``read``."""

_COMPACT = ".compact.parquet"
_REPLACES = b"effir_ray_replaces"
_EMPTY = b"effir_ray_empty"
"""Names of a compact file's columns that are null in every row. Parquet's own statistics would say it too,
but asking pyarrow for those of a damaged file ends the process."""

_GROUP = 2048  # rows a row group of a compact file: what one row of it costs to read
_LISTINGS = 5  # a folder that is compacted that often while it is read is no study's

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class TableKind:
    """``name`` is the folder below a study's; ``version`` stands in a file's metadata under ``version_key``.

    Columns are only ever added: one that a file lacks is null. ``json_columns`` hold JSON objects.
    """

    name: str
    schema: pa.Schema
    version: int
    version_key: bytes
    json_columns: frozenset[str] = frozenset()


def append(folder: Path | str, kind: TableKind, table: pa.Table) -> Path:
    """Write ``table`` as the new file ``folder/<kind>/<time>-<id>.parquet``; returns it.

    The file appears complete or not at all. Raises InputError when the disk is full.
    """
    target = Path(folder) / kind.name / f"{_new_name()}.parquet"
    with _said_when_full(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole(target) as aside:
            pq.write_table(table, aside)
    return target


def read(
    folders: Folders,
    kind: TableKind,
    *,
    columns: Sequence[str] | None = None,
    where: pc.Expression | None = None,
    damaged: Damaged | None = None,
    places: bool = False,
) -> pa.Table:
    """The rows of the given folders or files, file by file, oldest file of a folder first.

    ``columns``: only these; ``where``: only rows for which it is true. ``damaged`` hears of files that cannot
    be read, which without it raise InputError. With ``places`` the columns ``_file`` and ``_row`` say where
    each row lies, for ``rows_at``.
    """
    names = kind.schema.names if columns is None else columns
    schema = pa.schema([kind.schema.field(name) for name in names], metadata=kind.schema.metadata)

    def attempt() -> pa.Table:
        found, wrong = [], []
        for file in files_of(folders, kind):
            try:
                table = _read_file(file, kind, schema)
            except InputError as error:
                if damaged is None:
                    raise
                wrong.append(str(error))
                continue
            if places:
                table = _with_places(table, file)
            found.append(table if where is None else table.filter(where))
        for message in wrong:
            if damaged is not None:
                damaged(message)
        if not found:
            raise InputError(f"none of the {len(wrong)} files can be read ({wrong[0]})")
        return pa.concat_tables(found)

    return settled(attempt)


def rows_at(table: pa.Table, kind: TableKind) -> pa.Table:
    """All columns of the rows of ``table``, which was read with ``places``; the rest of a file is left alone.

    Raises FileNotFoundError where a file was compacted since, see ``settled``.
    """
    places = list(zip(table[FILE].to_pylist(), table[ROW].to_pylist(), strict=True))
    wanted: dict[str, set[int]] = {}
    for name, row in places:
        wanted.setdefault(name, set()).add(row)
    found: dict[tuple[str, int], int] = {}
    parts: list[pa.Table] = []
    for name, rows in wanted.items():
        for numbers, part in _rows_of_file(Path(name), kind, sorted(rows)):
            for number in numbers:
                found[name, number] = len(found)
            parts.append(part)
    if not places:
        return kind.schema.empty_table()
    return pa.concat_tables(parts).take([found[place] for place in places])


def settled(read_all: Callable[[], T]) -> T:
    """``read_all()``, again where a file that it had seen was compacted before it was read."""
    for _ in range(_LISTINGS - 1):
        try:
            return read_all()
        except FileNotFoundError:
            continue
    return read_all()


def compact(folder: Path | str, kind: TableKind) -> Path | None:
    """Make one file of the finished files of a kind; returns it, None where there is nothing to do.

    Writers may go on, and so may readers: the new file is there, complete, before the first old one goes, and
    says which it replaces. A file that cannot be read is left as it is. No two processes may compact the
    same folder at once.
    """
    target = Path(folder) / kind.name
    present = sorted(target.glob("*.parquet"))
    replaced = {file for file in present if file in _replaced(present)}
    readable = [file for file in present if file not in replaced and _is_whole(file, kind)]
    if len(readable) > 1:
        new = target / f"{_new_name()}{_COMPACT}"
        names = json.dumps([file.name for file in [*replaced, *readable]])
        schema = kind.schema.with_metadata({**kind.schema.metadata, _REPLACES: names})
        with _said_when_full(target), whole(new) as aside, pq.ParquetWriter(aside, schema) as writer:
            empty = set(schema.names)
            for group in _groups(readable, kind):
                writer.write_table(group.replace_schema_metadata(schema.metadata))
                empty -= {name for name in empty if group[name].null_count < len(group)}
            writer.add_key_value_metadata({_EMPTY: json.dumps(sorted(empty))})
        replaced |= set(readable)
    else:
        new = None
    for file in replaced:
        file.unlink(missing_ok=True)
    return new


def files_of(folders: Folders, kind: TableKind) -> list[Path]:
    """The files that hold the rows, each row once. Raises InputError for a place without any."""
    files = [file for place in as_places(folders) for file in _files(place, kind)]
    gone = _replaced(files)
    return [file for file in dict.fromkeys(files) if file not in gone]


def as_places(folders: Folders) -> list[Path]:
    """Of an object store's this machine has a copy then."""
    places = [folders] if isinstance(folders, Path | str) else folders
    return [_copied(str(place)) if storage.is_uri(place) else Path(place) for place in places]


def _copied(uri: str) -> Path:
    """The tables of the study at ``uri``, and what its stages say of importance and of trainings."""
    mirror = Mirror.to_read(uri)
    when = _copies.get(mirror.folder, -_COPIED_FOR)
    if time.monotonic() - when < _COPIED_FOR:
        return mirror.folder
    if not storage.exists(mirror.at("rows")):  # an InputError where nothing can be reached
        raise InputError(f"{uri}: no results here; expected rows/*.parquet, written by a search")
    for name in _TABLES:
        mirror.pull_files(name)
    for kind, files in _OF_STAGES.items():
        for key in storage.entries(mirror.at(f"stages/{kind}")):
            for file in files:
                if not (mirror.folder / "stages" / kind / key / file).exists():
                    mirror.pull_file(f"stages/{kind}/{key}/{file}")
    _copies[mirror.folder] = time.monotonic()
    return mirror.folder


_copies: dict[Path, float] = {}
_COPIED_FOR = 20.0  # seconds: a report asks many times
_TABLES = ("rows", "query_scores")
_OF_STAGES = {
    "importance": ("importance.json", "stage.json"),
    "base": ("history.jsonl", "stage.json"),
    "elastic": ("history.jsonl", "stage.json"),
    "recovered": ("history.jsonl", "stage.json"),
}
"""Kinds of stages, and the small files in them that tables are made of."""


def _files(place: Path, kind: TableKind) -> list[Path]:
    if place.is_file():
        return [place]
    if not place.exists():
        raise InputError(f"{place}: no such folder; give the --out folder of a search")
    nested = place / kind.name
    files = sorted((nested if nested.is_dir() else place).glob("*.parquet"))
    if not files:
        raise InputError(f"{place}: no results here; expected {kind.name}/*.parquet, written by a search")
    return files


def _replaced(files: Iterable[Path]) -> set[Path]:
    """What the compact ones among ``files`` stand for."""
    gone: set[Path] = set()
    for file in files:
        if file.name.endswith(_COMPACT):
            try:
                check_regular(file)
                listed = (pq.read_schema(file).metadata or {}).get(_REPLACES, b"[]")
                gone |= {file.parent / name for name in json.loads(listed) if isinstance(name, str)}
            except (pa.ArrowException, OSError, ValueError, TypeError, InputError):
                continue  # whoever reads its rows says what is wrong with it
    return gone


def _is_whole(file: Path, kind: TableKind) -> bool:
    try:
        _read_file(file, kind, kind.schema)
    except InputError:
        return False
    return True


def _groups(files: Iterable[Path], kind: TableKind) -> Iterator[pa.Table]:
    """The rows of ``files`` in pieces of ``_GROUP``: single rows would each be a row group of their own."""
    waiting: list[pa.Table] = []
    for file in files:
        waiting.append(_read_file(file, kind, kind.schema))
        while sum(len(table) for table in waiting) >= _GROUP:
            table = pa.concat_tables(waiting)
            yield table.slice(0, _GROUP)
            waiting = [table.slice(_GROUP)]
    if any(len(table) for table in waiting):
        yield pa.concat_tables(waiting)


def _new_name() -> str:
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}-{uuid.uuid4().hex[:8]}"


@contextmanager
def _said_when_full(target: Path) -> Iterator[None]:
    """Turns a full disk into one clear line."""
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            raise InputError(f"{target}: no disk space left to write results; free some and resume") from None
        raise


def _read_file(file: Path, kind: TableKind, schema: pa.Schema) -> pa.Table:
    with _opened(file, kind) as parquet:
        present = set(_columns_with_values(file, parquet))
        names = [name for name in schema.names if name in present]
        for number, group in enumerate(_decoded(file, partial(chunks_of, file, parquet))):
            check_group(group, names, f"{file}: row group {number}")
        rows = parquet.metadata.num_rows
        if not names:  # nothing is read that would show whether there are so many
            check_size(8 * rows, str(file))
        table = _decoded(file, lambda: parquet.read(columns=names))
        return _typed(file, table, rows if not names else len(table), kind, schema)


def _rows_of_file(file: Path, kind: TableKind, wanted: Sequence[int]) -> Iterator[tuple[list[int], pa.Table]]:
    """``wanted`` rows, in ascending order, with their numbers, a row group at a time."""
    with _opened(file, kind) as parquet:
        names, start = _columns_with_values(file, parquet), 0
        chunks = _decoded(file, partial(chunks_of, file, parquet))
        for group in range(parquet.num_row_groups):
            size = parquet.metadata.row_group(group).num_rows
            here = [row for row in wanted if start <= row < start + size]
            if here:
                check_group(chunks[group], names, f"{file}: row group {group}")
                places = pa.array([row - start for row in here], pa.int64())
                # One column after the other: a few rows of a million should not hold them all in memory.
                columns = [_decoded(file, partial(_taken, parquet, group, name, places)) for name in names]
                table = pa.Table.from_arrays(columns, names)
                yield here, _typed(file, table, len(here), kind, kind.schema)
            start += size


def _columns_with_values(file: Path, parquet: pq.ParquetFile) -> list[str]:
    """Those that are not null in every row of a compact file: of a column that nobody measured, the nulls
    need not be read."""
    listed = (parquet.metadata.metadata or {}).get(_EMPTY, b"[]")
    empty = parse_json(listed, f"{file}: {_EMPTY.decode()}")
    return [name for name in parquet.schema_arrow.names if not (isinstance(empty, list) and name in empty)]


def _taken(parquet: pq.ParquetFile, group: int, name: str, places: pa.Array) -> pa.ChunkedArray:
    return parquet.read_row_group(group, columns=[name]).column(0).take(places)


def _opened(file: Path, kind: TableKind) -> pq.ParquetFile:
    check_regular(file)

    def opened() -> pq.ParquetFile:
        with pq.ParquetFile(file) as plain:
            return coded(file, plain)

    parquet = _decoded(file, opened)
    version = (parquet.schema_arrow.metadata or {}).get(kind.version_key)
    wrong = ""
    if version is None:
        key = kind.version_key.decode()
        wrong = f"not a table of effir-ray results (its metadata lacks {key})"
    elif not version.isdigit() or len(version) > 9:
        wrong = f"results schema {quoted(version.decode('latin-1'))}; expected a number"
    elif int(version) > kind.version:
        wrong = f"results schema {int(version)}, newer than {kind.version} read here; upgrade effir-ray"
    if wrong:
        parquet.close()
        raise InputError(f"{file}: {wrong}")
    return parquet


def _decoded(file: Path, decode: Callable[[], Any]) -> Any:
    try:
        return decode()
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError, BadFooter) as error:
        raise InputError(f"{file}: not a readable Parquet file ({_first_line(error)})") from None


def _typed(file: Path, table: pa.Table, rows: int, kind: TableKind, schema: pa.Schema) -> pa.Table:
    check_rows(table, str(file))
    columns = [_column(file, table, rows, kind, field) for field in schema]
    return _decoded(file, lambda: pa.Table.from_arrays(columns, schema=schema))  # of unequal lengths


def _column(file: Path, table: pa.Table, rows: int, kind: TableKind, field: pa.Field) -> pa.ChunkedArray:
    """One column in its type; InputError where a file of others, or a damaged one, has something else."""
    if field.name not in table.schema.names:
        return pa.chunked_array([pa.nulls(rows, field.type)])
    try:
        column = table[field.name].cast(field.type)
        column.validate(full=True)
    except (pa.ArrowException, KeyError) as error:  # KeyError: the name is there twice
        raise InputError(f"{file}: column {field.name}: {_first_line(error)[:200]}") from None
    if pa.types.is_floating(field.type) and pc.any(pc.invert(pc.is_finite(column))).as_py():
        raise InputError(f"{file}: column {field.name} holds a value that is no finite number")
    if field.name in kind.json_columns:
        for text in column.unique().to_pylist():
            if text is not None:
                json_object(parse_json(text, f"{file}: column {field.name}"), f"{file}: column {field.name}")
    return column


def _with_places(table: pa.Table, file: Path) -> pa.Table:
    name = pa.DictionaryArray.from_arrays(pa.nulls(len(table), pa.int32()).fill_null(0), [str(file)])
    return table.append_column(FILE, name).append_column(ROW, pa.array(np.arange(len(table))))


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
