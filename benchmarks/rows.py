"""Result rows of benchmarks: known by all their settings, so that a run that was stopped goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from effir_ray.compression.schedule import Schedule
from effir_ray.data.datasets import Dataset
from effir_ray.errors import InputError
from effir_ray.evaluation.metrics import Scores
from effir_ray.evaluation.rows import make_row, score_columns, size_columns
from effir_ray.models.accounting import model_bytes
from effir_ray.models.loading import load_config
from effir_ray.models.plan import Plan
from effir_ray.results.store import append, latest, read


class Measured(Protocol):
    """What an evaluation found, and how long it took."""

    @property
    def scores(self) -> Scores: ...
    @property
    def seconds(self) -> float: ...


def measure_once(
    out: Path,
    settings: dict[str, Any],
    evaluate: Callable[[], Measured],
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
    result, config = evaluate(), load_config(backbone)
    plan = plan or Plan.full(config.num_hidden_layers)
    made = {
        **score_columns(result.scores),
        **size_columns(config, plan, document_tokens=settings["document_length"]),
        "bytes": model_bytes(config, plan),
        "wall_seconds": result.seconds,
    }
    row = make_row(
        study=settings["benchmark"],
        trial_id=trial_id,
        trial=trial,
        schedule=(schedule or Schedule()).name,
        backbone=backbone,
        dataset=dataset.name,
        split=split,
        **made | columns,
    )
    append(out, [row])


def known(out: Path) -> list[dict[str, Any]]:
    """The rows that are there, one a trial."""
    try:
        rows: list[dict[str, Any]] = latest(read([out])).to_pylist()
    except InputError:  # nothing yet
        return []
    return rows
