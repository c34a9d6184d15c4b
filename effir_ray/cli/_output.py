"""Showing results: tables for people, one JSON document for programs."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

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


def say(text: str) -> None:
    """One line for people, on standard output; nothing in it is read as markup."""
    console().print(Text(text))
