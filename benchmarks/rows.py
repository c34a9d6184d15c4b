"""Result rows of benchmarks: known by all their settings, so that a run that was stopped goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from effir_ray.compression.schedule import Schedule
from effir_ray.data.datasets import Dataset
from effir_ray.errors import InputError
from effir_ray.evaluation.evaluate import Evaluation
from effir_ray.hardware import detect
from effir_ray.models.accounting import count_parameters, flops, model_bytes
from effir_ray.models.loading import load_config
from effir_ray.models.plan import Plan
from effir_ray.provenance import git_commit, package_versions
from effir_ray.results.schema import TrialRow
from effir_ray.results.store import append, latest, read


def measure_once(
    out: Path,
    settings: dict[str, Any],
    evaluate: Callable[[], Evaluation],
    *,
    backbone: str,
    dataset: Dataset,
    split: str,
    schedule: Schedule | None = None,
    plan: Plan | None = None,
    **columns: Any,
) -> None:
    """Append one row to OUT/rows unless there is one with these ``settings`` (all that determines it)."""
    trial = json.dumps(settings, sort_keys=True)
    trial_id = hashlib.sha256(trial.encode()).hexdigest()[:16]
    if trial_id in {row["trial_id"] for row in known(out)}:
        return
    result = evaluate()
    scores, config = result.scores.mean, load_config(backbone)
    full = Plan.full(config.num_hidden_layers)
    plan = plan or full
    row = TrialRow(
        study=settings["benchmark"],
        trial_id=trial_id,
        trial=trial,
        schedule=(schedule or Schedule()).name,
        plan=json.dumps(plan.per_layer_config()),
        backbone=backbone,
        dataset=dataset.name,
        split=split,
        ndcg_at_10=scores["ndcg@10"],
        recall_at_100=scores["recall@100"],
        mrr_at_10=scores["mrr@10"],
        map_at_100=scores["map@100"],
        parameters=count_parameters(config, plan),
        parameter_ratio=count_parameters(config, plan) / count_parameters(config, full),
        flops_per_document=max(1, flops(config, plan, settings["document_length"])),
        bytes=model_bytes(config, plan),
        git_commit=git_commit(),
        versions=json.dumps(package_versions()),
        hardware=detect().name,
        **{"wall_seconds": result.seconds} | columns,
    )
    append(out, [row])


def known(out: Path) -> list[dict[str, Any]]:
    """The rows that are there, one a trial."""
    try:
        rows: list[dict[str, Any]] = latest(read([out])).to_pylist()
    except InputError:  # nothing yet
        return []
    return rows
