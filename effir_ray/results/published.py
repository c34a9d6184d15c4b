"""Reference rows: the figures of "Making Large Language Models Efficient Dense Retrievers", arXiv 2512.20612.

``reference/effir_beir_ndcg10.csv`` transcribes tables 1-6 and 8-12, ``effir_speedup_h100.csv`` the encoding
speeds of table 3. Known irregularities of the source: one cell (drop-16B, ArguAna) is unreadable and empty;
Gemma-2-2B and Qwen1.5-4B in table 3 and Llama-3-8B full in table 8 do not average to their printed
``Average``, which is kept.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import pyarrow as pa

_COLUMNS = {
    "source": (pa.string(), "table of the paper"),
    "backbone": (pa.string(), "model, as printed"),
    "variant": (pa.string(), "compressed model, as printed"),
    "schedule": (pa.string(), "the same in our notation; null where no schedule says it"),
    "dataset": (pa.string(), "BEIR data set, as printed"),
    "ndcg_at_10": (pa.float64(), "nDCG@10, 0 to 1"),
    "parameters": (pa.int64(), "parameters, printed in billions with one digit"),
    "query_speedup": (pa.float64(), "query encoding speed / that of the full model, on one H100"),
    "document_speedup": (pa.float64(), "document encoding speed / that of the full model, on one H100"),
}
PUBLISHED_SCHEMA = pa.schema(
    [
        pa.field(name, kind, metadata={"description": description})
        for name, (kind, description) in _COLUMNS.items()
    ]
)

_VARIANT = re.compile(r"(?:EffiR-|drop-)?(?P<last>last-)?(?P<depth>(?:\d+[ABM])+)(?:-width-(?P<width>\d+))?")


def published() -> pa.Table:
    """The paper's nDCG@10 a table, model and BEIR data set, with speeds on one H100 where measured."""
    speeds = {(row["backbone"], row["variant"]): row for row in _read("effir_speedup_h100.csv")}
    return pa.Table.from_pylist(
        [_reference_row(row, speeds) for row in _read("effir_beir_ndcg10.csv")], schema=PUBLISHED_SCHEMA
    )


def schedule_of(variant: str) -> str | None:
    """``EffiR-16M-width-30`` -> ``16M-w30``, ``drop-last-16B`` -> ``last16B``, ``full`` -> ``full``."""
    if variant == "full":
        return "full"
    match = _VARIANT.fullmatch(variant)
    if match is None:
        return None
    width = f"-w{match['width']}" if match["width"] else ""
    return f"{'last' if match['last'] else ''}{match['depth']}{width}"


def same_dataset(name: str, published_name: str) -> bool:
    """Whether our ``name`` (``webis-touche2020``) is the paper's ``published_name`` (``Touche-2020``)."""
    plain = published_name.lower()
    return name.lower() == _BEIR_NAMES.get(plain, plain)


_BEIR_NAMES = {"dbpedia": "dbpedia-entity", "touche-2020": "webis-touche2020"}


def _reference_row(row: dict[str, str], speeds: dict[tuple[str, str], dict[str, str]]) -> dict[str, Any]:
    speed = speeds.get((row["backbone"], row["variant"]), {})
    return {
        "source": row["table"],
        "backbone": row["backbone"],
        "variant": row["variant"],
        "schedule": schedule_of(row["variant"]),
        "dataset": row["dataset"],
        "ndcg_at_10": round(float(row["ndcg_at_10"]) / 100, 4) if row["ndcg_at_10"] else None,
        "parameters": round(float(row["params_billion"]) * 1e9) if row["params_billion"] else None,
        "query_speedup": float(speed["query_speedup"]) if speed else None,
        "document_speedup": float(speed["document_speedup"]) if speed else None,
    }


def _read(name: str) -> Iterator[dict[str, str]]:
    text = files("effir_ray.results").joinpath("reference", name).read_text(encoding="utf-8")
    yield from csv.DictReader(text.splitlines())
