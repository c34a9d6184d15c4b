"""Making rows: the columns that every measured model has, whether a search or a benchmark measured it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from effir_ray.hardware import detect
from effir_ray.models import accounting
from effir_ray.models.plan import Plan
from effir_ray.provenance import git_commit, package_versions
from effir_ray.results.schema import TrialRow

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_SCORES = {
    "ndcg_at_10": "ndcg@10",
    "recall_at_100": "recall@100",
    "mrr_at_10": "mrr@10",
    "map_at_100": "map@100",
}


def make_row(**columns: Any) -> TrialRow:
    """A row with these columns, the code and packages that run, and, unless given, this machine."""
    made_by = {"git_commit": git_commit(), "versions": json.dumps(package_versions())}
    here = {} if "hardware" in columns else {"hardware": detect().name}
    return TrialRow(**(made_by | here | columns))


def score_columns(mean: Mapping[str, float]) -> dict[str, float]:
    """``mean``: metric -> mean over queries, as ``evaluation.metrics`` names them."""
    return {column: mean[metric] for column, metric in _SCORES.items()}


def size_columns(backbone: PreTrainedConfig, plan: Plan, *, document_tokens: int) -> dict[str, Any]:
    """The columns that follow from backbone and plan alone. Ratios are to the backbone with all its layers;
    FLOPs are for one document of ``document_tokens`` tokens."""
    parameters = accounting.count_parameters(backbone, plan)
    full = accounting.count_parameters(backbone, Plan.full(len(plan.layers)))
    return {
        "plan": json.dumps(plan.per_layer_config()),
        "parameters": parameters,
        "parameter_ratio": parameters / full,
        "flops_per_document": accounting.flops(backbone, plan, document_tokens) or None,
    }
