"""Showing results: tables for people, one JSON document for programs."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from effir_ray.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

_WIDE = 240  # columns when the output is a file or a pipe: cutting cells would lose data


def console() -> Console:
    return Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False, soft_wrap=True)


def show_json(value: Any) -> None:
    """Print ``value`` (dataclasses, configurations, paths, dates and NaN included) as standard JSON."""
    print(json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False))


def plain(value: Any) -> Any:
    """``value`` in the types of JSON; NaN and infinity, which JSON lacks, become null."""
    if hasattr(value, "model_dump"):
        return plain(value.model_dump(mode="json"))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, str | bool | int | None):
        return value
    if isinstance(value, float | Decimal):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Iterable):
        return [plain(item) for item in value]
    return str(value)


def show_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str | None = None) -> None:
    """A table with numbers aligned right and nothing in it read as markup."""
    rows = [list(row) for row in rows]
    heading = None if title is None else Text(title)  # as it is: rich reads ":llama:" as an emoji
    table = Table(title=heading, title_justify="left", title_style="bold", header_style="bold")
    for index, name in enumerate(columns):
        cells = [figure(row[index]) for row in rows]
        numeric = any(cells) and all(cell[:1] in "-0123456789" for cell in cells)
        table.add_column(Text(name), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(figure(value)) for value in row))
    console().print(table)


Format = Literal["table", "csv", "json", "parquet", "arrow", "md"]


def show_as(table: pa.Table, form: Format) -> None:
    """``table`` on standard output: for people, or whole, for other programs."""
    names = table.schema.names
    if form in ("parquet", "arrow"):
        _write_binary(table, form)
    elif form == "json":
        show_json(table.to_pylist())
    elif form == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([_csv_cell(row[name]) for name in names] for row in table.to_pylist())
    else:
        rows = [[row[name] for name in names] for row in table.to_pylist()]
        (show_table if form == "table" else _show_markdown)(names, rows)


def _write_binary(table: pa.Table, form: Format) -> None:
    if sys.stdout.isatty():
        raise InputError(f"--format {form}: not for a terminal; write it to a file: > table.{form}")
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    if form == "parquet":
        pq.write_table(table, sink)
    else:
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    sys.stdout.buffer.write(sink.getvalue())


def _csv_cell(value: Any) -> Any:
    value = plain(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value


def _show_markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    for row in [columns, ["---"] * len(columns), *rows]:
        cells = (" ".join(figure(value).split()).replace("|", "\\|") for value in row)
        print(f"| {' | '.join(cells)} |")


def figure(value: Any) -> str:
    """A cell: four significant digits, nothing for what was not measured."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4g}"
    return str(value)


def quantity(value: float | None) -> str:
    """``134515008`` -> ``134.5 M``."""
    if value is None:
        return ""
    for factor, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= factor:
            return f"{value / factor:.4g}{unit}"
    return f"{value:.4g}"


def warn(text: str) -> None:
    """One line for people, on standard error."""
    print(text, file=sys.stderr)


def say(text: str) -> None:
    """One line for people, on standard output; nothing in it is read as markup."""
    console().print(Text(text))
