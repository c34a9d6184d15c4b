"""One self-contained page with an interactive Pareto plot and a sortable table; or the front as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from effir_ray.errors import InputError
from effir_ray.files import write_whole
from effir_ray.pages import render
from effir_ray.results import store
from effir_ray.results.comparison import compare_rows
from effir_ray.results.picture import draw_front
from effir_ray.results.published import published, same_dataset
from effir_ray.results.schema import DIRECTIONS
from effir_ray.results.selection import is_doubtful, samples
from effir_ray.results.study_tables import kept
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
    "model",
    "n_queries",
    "ndcg_at_10_low",
    "ndcg_at_10_high",
    "bm25_ndcg_at_10",
    "document_speedup_low",
    "document_speedup_high",
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
    write_whole(target, page(table, folders))
    return target


def page(table: pa.Table, folders: Folders) -> str:
    """The HTML of a report. Rows of a table hold only text and numbers, and are escaped."""
    from plotly.offline import get_plotlyjs  # slow, and a picture needs none of it

    data = page_data(table) | {"against_full": _against_full(table, folders)}
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
    table = table.set_column(table.schema.get_field_index("sample"), "sample", _versioned_samples(table))
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
        "sample": record["sample"],
        "created_at": created.strftime("%Y-%m-%d %H:%M:%S UTC") if created else "",
        "layers": _layers(record),
        "doubtful": is_doubtful(record),
        **({} if _has_interval(record) else dict.fromkeys(_SPEED_INTERVAL)),
    }


_SPEED_INTERVAL = ("document_speedup_low", "document_speedup_high")


def _has_interval(record: dict[str, Any]) -> bool:
    """Rows before schema 5 had the range of the rounds in its place."""
    return (record["schema_version"] or 0) >= 5


def _layers(record: dict[str, Any]) -> list[tuple[bool, float]]:
    """(whether attention stays, what share of the MLP does) of every block of the full model."""
    width = record["mlp_width"] or 1
    return [(attention, neurons / width) for attention, neurons in kept(record)]


def _versioned_samples(table: pa.Table) -> pa.Array:
    """What part of which version of its data each row was measured on: rows that differ are no comparison."""
    versions = [json.loads(text or "{}").get("dataset") for text in table["contents"].to_pylist()]
    told: dict[str, set[str]] = {}
    for dataset, version in zip(table["dataset"].to_pylist(), versions, strict=True):
        told.setdefault(dataset, set()).add(version)
    columns = (samples(table).to_pylist(), table["dataset"].to_pylist(), versions)
    return pa.array(
        [
            f"{sample}, version {(version or 'unknown')[:8]}" if len(told[dataset]) > 1 else sample
            for sample, dataset, version in zip(*columns, strict=True)
        ],
        pa.string(),
    )


def _against_full(table: pa.Table, folders: Folders) -> dict[str, dict[str, Any]]:
    """Study and trial id -> how far a tested model is from the full one of its study; nothing where scores
    of single queries were not kept."""
    found: dict[str, dict[str, Any]] = {}
    tested = table.filter(pc.and_(pc.equal(table["split"], "test"), pc.equal(table["status"], "ok")))
    for group in tested.group_by(["study", "dataset"], use_threads=False).aggregate([]).to_pylist():
        same = pc.and_(pc.equal(table["study"], group["study"]), pc.equal(table["dataset"], group["dataset"]))
        try:
            compared = compare_rows(table.filter(same), folders, split="test")
        except InputError:
            continue
        for record in compared.to_pylist():
            if record["difference"] is not None:
                found[f"{record['study']}/{record['trial_id']}"] = {
                    "split": record["split"],
                    "difference": record["difference"],
                    "low": record["difference_low"],
                    "high": record["difference_high"],
                    "p": record["p_holm"],
                }
    return found


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
