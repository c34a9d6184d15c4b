"""One self-contained page with an interactive Pareto plot and a sortable table; or the front as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from effir_ray.errors import InputError
from effir_ray.files import write_whole
from effir_ray.pages import render
from effir_ray.results import store
from effir_ray.results.picture import draw_front
from effir_ray.results.published import published, same_dataset
from effir_ray.results.schema import DIRECTIONS
from effir_ray.results.tables import Damaged, Folders

LABELS = {
    "ndcg_at_10": ("nDCG@10", "score"),
    "recall_at_100": ("Recall@100", "score"),
    "mrr_at_10": ("MRR@10", "score"),
    "map_at_100": ("MAP@100", "score"),
    "parameters": ("Parameters", "count"),
    "parameter_ratio": ("Parameters of full", "ratio"),
    "block_parameters": ("Parameters of the blocks", "count"),
    "flops_per_document": ("Compute a document", "flops"),
    "bytes": ("Size of the weights", "bytes"),
    "document_ms": ("Time a document", "ms"),
    "query_ms": ("Time a query", "ms"),
    "document_speedup": ("Document speed-up", "speedup"),
    "query_speedup": ("Query speed-up", "speedup"),
    "query_ms_p95": ("Time a query, 95th percentile", "ms"),
    "tokens_per_s": ("Document tokens a second", "count"),
    "peak_memory_bytes": ("Memory while encoding", "bytes"),
}
"""Objective -> what an axis is called and how its numbers are written."""

_SHOWN = (
    "study",
    "trial_id",
    "schedule",
    "plan",
    "backbone",
    "dataset",
    "split",
    "seed",
    "recovered",
    "hardware",
)


def report(folders: Folders, out: Path | str, *, damaged: Damaged | None = None) -> Path:
    """Write the rows of ``folders`` to ``out``: ``.html`` an interactive page, ``.svg``, ``.png`` a picture.

    The page needs no network: plotly.js, data and styles are inside. ``damaged`` hears of files that cannot
    be read, which are then left out. Raises InputError for another suffix or when no trial has succeeded.
    """
    target = Path(out)
    table = store.latest(store.read(folders, damaged=damaged))
    if target.suffix in (".svg", ".png"):
        return draw_front(table, target)
    if target.suffix != ".html":
        raise InputError(f"{target}: a report is written as .html, .svg or .png")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, page(table))
    return target


def page(table: pa.Table) -> str:
    """The HTML of a report. Rows of a table hold only text and numbers, and are escaped."""
    from plotly.offline import get_plotlyjs  # slow, and a picture needs none of it

    data = page_data(table)
    if not data["rows"]:
        raise InputError(f"no successful trial among the {len(table)} rows; nothing to report")
    studies = ", ".join(dict.fromkeys(row["study"] for row in data["rows"]))
    return render(
        "effir_ray.results",
        "page/report.html",
        title=f"Pareto front of {studies}",
        plotly=get_plotlyjs(),
        data=data,
    )


def page_data(table: pa.Table) -> dict[str, Any]:
    """What the page draws: rows, failed rows, the paper's figures on the same data sets, and provenance."""
    records = [record | {"key": str(index)} for index, record in enumerate(table.to_pylist())]
    rows = [_row(record) for record in records if record["status"] == "ok"]
    datasets = sorted({row["dataset"] for row in rows})
    return {
        "columns": {
            name: {"label": label, "kind": kind, "better": DIRECTIONS[name]}
            for name, (label, kind) in LABELS.items()
        },
        "rows": sorted(rows, key=lambda row: row["split"] != "dev"),
        "failed": [
            {name: record[name] for name in ("schedule", "dataset", "split", "reason")}
            for record in records
            if record["status"] == "failed"
        ],
        "published": [
            reference | {"ours": name}
            for reference in published().to_pylist()
            for name in datasets
            if same_dataset(name, reference["dataset"])
        ],
        "provenance": _provenance(records),
    }


def _row(record: dict[str, Any]) -> dict[str, Any]:
    created = record["created_at"]
    return {name: record[name] for name in ("key", *_SHOWN, *LABELS)} | {
        "created_at": created.strftime("%Y-%m-%d %H:%M UTC") if created else ""
    }


def _provenance(records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What the rows say about themselves, each distinct value once."""
    parts = [
        ("studies", [record["study"] for record in records]),
        ("hardware", [record["hardware"] for record in records]),
        ("code", [record["git_commit"] for record in records]),
        ("packages", [_packages(record["versions"]) for record in records]),
    ]
    seconds = sum(record["device_seconds"] or 0.0 for record in records)
    rows = [(name, "; ".join(dict.fromkeys(filter(None, values)))) for name, values in parts]
    return [*rows, ("device time", f"{seconds / 3600:.2f} hours over {len(records)} rows")]


def _packages(versions: str | None) -> str:
    return ", ".join(f"{name} {version}" for name, version in json.loads(versions or "{}").items())
