"""The table ``measurements``: what a benchmark that measures no trials has written, as it wrote it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from effir_ray.errors import InputError
from effir_ray.readers import check_regular, read_json
from effir_ray.results.tables import Folders, as_places


def _from_json(file: Path) -> pa.Table:
    """A list of rows, or one row."""
    found: Any = read_json(file)
    return pa.Table.from_pylist(found if isinstance(found, list) else [found])


_READERS: dict[str, Callable[[Path], pa.Table]] = {
    ".csv": pyarrow.csv.read_csv,
    ".json": _from_json,
    ".parquet": pq.read_table,
}


def measurements(folders: Folders) -> pa.Table:
    """The rows of these files, or of the CSV, JSON and Parquet files that lie in these folders.

    Raises InputError where there is none, one cannot be read, or they are of several kinds.
    """
    files = [file for place in as_places(folders) for file in ([place] if place.is_file() else _in(place))]
    tables = [_read(file) for file in files]
    for file, table in zip(files[1:], tables[1:], strict=True):
        if table.schema.names != tables[0].schema.names:
            raise InputError(
                f"{files[0]} and {file} have other columns: give one of them in place of its folder"
            )
    return pa.concat_tables(tables, promote_options="permissive")


def _in(folder: Path) -> list[Path]:
    found = sorted(file for file in folder.glob("*") if file.suffix in _READERS)
    if not found:
        raise InputError(f"{folder}: no measurements here; expected a CSV, JSON or Parquet file")
    return found


def _read(file: Path) -> pa.Table:
    check_regular(file)
    try:
        return _READERS[file.suffix](file)
    except KeyError:
        raise InputError(f"{file}: expected a CSV, JSON or Parquet file") from None
    except (pa.ArrowException, OSError, AttributeError) as error:  # AttributeError: rows that are no objects
        raise InputError(f"{file}: no table ({str(error).partition(chr(10))[0]})") from None
