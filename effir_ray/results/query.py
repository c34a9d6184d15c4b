"""SQL over result tables, by DuckDB, with nothing but the tables within its reach."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from effir_ray.errors import InputError
from effir_ray.results.measurements import measurements
from effir_ray.results.results import SCHEMAS, Results
from effir_ray.results.tables import Damaged, Folders

if TYPE_CHECKING:
    import duckdb

MEASUREMENTS = "measurements"


def query(folders: Folders, sql: str, *, damaged: Damaged | None = None) -> pa.Table:
    """The result of one SELECT over the tables of ``Results``; ``schema`` lists their columns. A table is
    read where its name stands in ``sql``. ``measurements`` is alone: what a benchmark wrote that measures no
    trials.

    The database cannot read or write files, load extensions or reach the network. ``damaged`` hears of files
    that cannot be read, which are then left out. Raises InputError for SQL that is wrong or is no SELECT.
    """
    if MEASUREMENTS in sql.lower() and "trials" not in sql.lower():
        return select({MEASUREMENTS: measurements(folders)}, sql)
    results = Results(folders, damaged=damaged)
    # Trials are always read: without any the place is wrong, whatever the SELECT names.
    asked = [name for name in SCHEMAS if name == "trials" or name in sql.lower()]
    return select({name: getattr(results, name).to_arrow() for name in asked}, sql)


def schema() -> pa.Table:
    """Every column that ``query`` knows: table, column, Arrow type and what it says."""
    return pa.Table.from_pylist(
        [
            {
                "table": table,
                "column": field.name,
                "type": str(field.type),
                "description": (field.metadata or {}).get(b"description", b"").decode(),
            }
            for table, fields in SCHEMAS.items()
            for field in fields
        ]
    )


def where(table: pa.Table, condition: str) -> pa.Table:
    """The rows for which the SQL ``condition`` holds, for example ``"dataset = 'scifact' AND seed = 0"``."""
    return select({"trials": table}, f"SELECT * FROM trials WHERE ({condition}\n)").cast(table.schema)


def select(tables: dict[str, pa.Table], sql: str) -> pa.Table:
    """Run one SELECT over the named tables."""
    import duckdb

    with duckdb.connect(":memory:") as connection:
        for name, table in tables.items():
            connection.register(name, table)
        for setting in _SANDBOX:
            connection.execute(f"SET {setting}")
        try:
            _check_one_select(connection, sql)
            with _memory():
                return _within_limits(connection, sql)
        except duckdb.Error as error:
            raise InputError(f"SQL: {' '.join(str(error).split())}") from None


@contextmanager
def _memory() -> Iterator[None]:
    """Within it this process gets no more than ``_PROCESS_BYTES`` in addition, where the system can say so.

    DuckDB's own limit does not count the text and lists that expressions make: ``repeat('x', 2000000000)``.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        yield
        return
    import resource

    used = next(line for line in status.read_text().splitlines() if line.startswith("VmData:"))
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = int(used.split()[1]) * 1024 + _PROCESS_BYTES
    known = [limit for limit in (soft, hard, wanted) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(known), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _within_limits(connection: duckdb.DuckDBPyConnection, sql: str) -> pa.Table:
    import duckdb

    late = threading.Event()

    def interrupt() -> None:
        late.set()
        connection.interrupt()

    alarm = threading.Timer(_SECONDS, interrupt)
    alarm.start()
    try:
        reader: Any = connection.sql(sql).to_arrow_reader(_BATCH)
        batches, size = [], 0
        for batch in reader:
            batches.append(batch)
            size += batch.nbytes
            if size > _BYTES:
                raise InputError(f"SQL: the result is larger than {_BYTES >> 20} MiB; add a LIMIT")
        return pa.Table.from_batches(batches, schema=reader.schema)
    except (duckdb.Error, OSError):  # between two batches it is pyarrow that hears of the interrupt
        if late.is_set():
            raise InputError(f"SQL: stopped after {_SECONDS:g} s; a SELECT over results takes less") from None
        raise
    finally:
        alarm.cancel()


def _check_one_select(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    import duckdb

    statements = connection.extract_statements(sql)
    if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
        found = ", ".join(statement.type.name for statement in statements) or "nothing"
        raise InputError(f"SQL: expected one SELECT over {', '.join(SCHEMAS)}, found {found}")


_SECONDS = 8.0
_BYTES = 256 * 2**20  # of a result
_PROCESS_BYTES = 2**30
_BATCH = 10_000  # rows

_SANDBOX = (
    "memory_limit = '512MB'",
    "enable_external_access = false",  # no files, no network
    "autoinstall_known_extensions = false",
    "python_enable_replacements = false",  # no variables of this process as tables
    "lock_configuration = true",
)
