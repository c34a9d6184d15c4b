"""What the page of results shows, as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from effir_ray.errors import InputError
from effir_ray.results import query_scores
from effir_ray.results.comparison import compare_rows
from effir_ray.results.effects import effects, varying_settings
from effir_ray.results.published import published, same_dataset
from effir_ray.results.schema import DIRECTIONS, RELATIVE, TIMED, averaged
from effir_ray.results.selection import is_doubtful, samples
from effir_ray.results.study_tables import curves, importance, kept
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
    "index_bytes": ("Index of a million documents", "bytes"),
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
    "device_seconds",
    "document_speedup_low",
    "document_speedup_high",
)


def page_data(table: pa.Table, folders: Folders, *, damaged: Damaged | None = None) -> dict[str, Any]:
    """What the page draws: rows, failed rows, the paper's figures on the same data sets, what the studies in
    ``folders`` measured besides, and provenance."""
    table = table.set_column(table.schema.get_field_index("sample"), "sample", _versioned_samples(table))
    records = [record | {"key": str(index)} for index, record in enumerate(table.to_pylist())]
    settings = _settings(records)
    rows = [
        _row(record) | {"settings": settings[record["key"]]} for record in records if record["status"] == "ok"
    ]
    datasets = sorted({row["dataset"] for row in rows})
    looked_at = _looked_at(records)
    return {
        "columns": {
            name: {
                "label": label,
                "kind": kind,
                "better": DIRECTIONS[name],
                "relative": name in RELATIVE,
                "timed": name in TIMED,
            }
            for name, (label, kind) in LABELS.items()
        },
        "rows": sorted(rows, key=lambda row: (row["split"] != "dev", not row["averaged"])),
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
        "against_full": _against_full(table, folders),
        "effects": effects(records),
        "importance": _importance(folders, damaged),
        "curves": _curves(folders, looked_at, damaged),
        "query_scores": _query_scores(folders, looked_at, damaged),
        "provenance": _provenance(records),
    }


def _settings(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Row key -> what its trial sets that others of its study set otherwise."""
    studies: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        studies.setdefault(record["study"], []).append(record)
    found: dict[str, dict[str, Any]] = {record["key"]: {} for record in records}
    for group in studies.values():
        varying = varying_settings([json.loads(record["trial"] or "{}") for record in group])
        for name, column in varying.items():
            for record, value in zip(group, column, strict=True):
                found[record["key"]][name] = value
    return found


def _row(record: dict[str, Any]) -> dict[str, Any]:
    created = record["created_at"]
    return {name: record[name] for name in ("key", *_SHOWN, *LABELS)} | {
        "sample": record["sample"],
        "created_at": created.strftime("%Y-%m-%d %H:%M:%S UTC") if created else "",
        "layers": _layers(record),
        "doubtful": is_doubtful(record),
        "averaged": bool(averaged(record["dataset"])),
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
    """Study, trial id and data set -> how far a tested model is from the full one of its study; nothing where
    scores of single queries were not kept."""
    found: dict[str, dict[str, Any]] = {}
    tested = table.filter(pc.and_(pc.equal(table["split"], "test"), pc.equal(table["status"], "ok")))
    names = ["study", "dataset", "backbone"]
    for group in tested.group_by(names, use_threads=False).aggregate([]).to_pylist():
        same = table
        for name in names:
            same = same.filter(pc.equal(same[name], group[name]))
        try:
            compared = compare_rows(same, folders, split="test")
        except InputError:
            continue
        for record in compared.to_pylist():
            if record["difference"] is not None:
                found[f"{record['study']}/{record['trial_id']}/{record['dataset']}"] = {
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


_MOST = 60  # models whose curves and scores of single queries are on the page
_POINTS = 60  # of a curve


def _looked_at(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the models that somebody will compare: those that were tested, the full one, and the best."""
    good = [record for record in records if record["status"] == "ok"]
    tested = {(record["study"], record["trial_id"]) for record in good if record["split"] == "test"}
    ranked = sorted(
        good,
        key=lambda record: (
            (record["study"], record["trial_id"]) not in tested and record["schedule"] != "full",
            -record["ndcg_at_10"],
        ),
    )
    chosen = set(list(dict.fromkeys((record["study"], record["trial_id"]) for record in ranked))[:_MOST])
    return [record for record in good if (record["study"], record["trial_id"]) in chosen]


def _query_scores(folders: Folders, rows: list[dict[str, Any]], damaged: Damaged | None) -> dict[str, Any]:
    """Row key -> nDCG@10 of every query, by query id: what any two models are compared by."""
    kept_scores = query_scores.read(folders, trials=[row["trial_id"] for row in rows], damaged=damaged)
    found = query_scores.by_trial(kept_scores)
    names = ("study", "trial_id", "dataset", "split")
    scored = {row["key"]: found.get(tuple(row[name] for name in names)) for row in rows}
    return {
        key: {query: round(score, 4) for query, score in sorted(scores.items())}
        for key, scores in scored.items()
        if scores
    }


def _curves(folders: Folders, rows: list[dict[str, Any]], damaged: Damaged | None) -> dict[str, Any]:
    """Model, as rows name it -> its training: steps, and the mean loss up to each of them."""
    models = {row["model"] for row in rows if row["recovered"] and row["model"]}
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for record in curves(folders, models=models, damaged=damaged).to_pylist():
        found.setdefault(record["model"], {}).setdefault(record["folder"], []).append(record)
    # A stage of two folders is the same training: its key says all that it depends on.
    return {model: _thinned(next(iter(places.values()))) for model, places in found.items()}


def _thinned(history: list[dict[str, Any]]) -> dict[str, Any]:
    size = -(-len(history) // _POINTS)
    parts = [history[start : start + size] for start in range(0, len(history), size)]
    losses = [[row["loss"] for row in part if row["loss"] is not None] for part in parts]
    return {
        "steps": [part[-1]["step"] for part in parts],
        "loss": [sum(values) / len(values) if values else None for values in losses],
    }


def _short(folders: set[str]) -> dict[str, str]:
    """The last part of each path, or all of it where another ends alike."""
    last = {folder: Path(folder).resolve().name for folder in folders}
    return {folder: name if list(last.values()).count(name) == 1 else folder for folder, name in last.items()}


def _importance(folders: Folders, damaged: Damaged | None) -> list[dict[str, Any]]:
    """What each study's criteria made of every sublayer, for the figure of what goes first."""
    found: dict[tuple[str, str], dict[str, dict[int, list[float]]]] = {}
    for record in importance(folders, damaged=damaged).to_pylist():
        units = found.setdefault((record["folder"], record["criterion"]), {})
        units.setdefault(record["unit"], {}).setdefault(record["layer"], []).append(record["score"])
    names = _short({study for study, _ in found})
    return [
        {
            "study": names[study],
            "criterion": criterion,
            "units": {
                unit: [sum(layers[layer]) / len(layers[layer]) for layer in sorted(layers)]
                for unit, layers in units.items()
            },
        }
        for (study, criterion), units in found.items()
    ]
