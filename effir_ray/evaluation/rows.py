"""Making rows: the columns that every measured model has, whether a search or a benchmark measured it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from effir_ray.evaluation.metrics import Scores
from effir_ray.hardware import detect
from effir_ray.models import accounting
from effir_ray.models.plan import Plan
from effir_ray.provenance import git_commit, package_versions
from effir_ray.results.query_scores import METRICS, QueryScores
from effir_ray.results.schema import TrialRow
from effir_ray.results.significance import Interval, bootstrap_interval

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def make_row(**columns: Any) -> TrialRow:
    """A row with these columns, the code and packages that run, and, unless given, this machine."""
    made_by = {"git_commit": git_commit(), "versions": json.dumps(package_versions())}
    here = {} if "hardware" in columns else {"hardware": detect().name}
    return TrialRow(**(made_by | here | columns))


def score_columns(scores: Scores) -> dict[str, float]:
    """Means over queries, how many there are, and how far the choice of queries moves nDCG@10."""
    interval = bootstrap_interval([found["ndcg@10"] for found in scores.per_query.values()])
    return {
        **{column: scores.mean[metric] for column, metric in METRICS.items()},
        **_interval_columns(interval),
    }


def mean_columns(parts: Sequence[tuple[Mapping[str, Any], QueryScores]]) -> dict[str, Any]:
    """The columns of one model's means over several data sets, from its columns and scores of single queries
    on each. A mean counts every data set alike, however many queries it has; of one it is its own."""
    first, _ = parts[0]
    if len(parts) == 1:
        return dict(first)
    interval = bootstrap_interval(*([found["ndcg@10"] for found in scores.values()] for _, scores in parts))
    return {**first, **{name: _mean(name, parts) for name in _MEANS}, **_interval_columns(interval)}


_MEANS = (*METRICS, "bm25_ndcg_at_10", "isotropy")


def _mean(name: str, parts: Sequence[tuple[Mapping[str, Any], QueryScores]]) -> float | None:
    values = [columns.get(name) for columns, _ in parts]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _interval_columns(interval: Interval) -> dict[str, float]:
    return {
        "n_queries": interval.n,
        "ndcg_at_10_se": interval.standard_error,
        "ndcg_at_10_low": min(interval.low, 1.0),  # a mean of ones may be a rounding error above
        "ndcg_at_10_high": min(interval.high, 1.0),
    }


def size_columns(backbone: PreTrainedConfig, plan: Plan, *, document_tokens: int) -> dict[str, Any]:
    """The columns that follow from backbone and plan alone. Ratios are to the backbone with all its layers;
    FLOPs are for one document of ``document_tokens`` tokens."""
    parameters = accounting.count_parameters(backbone, plan)
    whole = Plan.full(len(plan.layers))
    full = accounting.count_parameters(backbone, whole)
    flops = accounting.flops(backbone, plan, document_tokens)
    return {
        "plan": json.dumps(plan.per_layer_config()),
        "blocks": len(plan.layers),
        "mlp_width": max(layer.width for layer in accounting.anatomy_of(backbone).layers),
        "parameters": parameters,
        "parameter_ratio": parameters / full,
        "block_parameters": accounting.count_block_parameters(backbone, plan),
        "flops_per_document": flops or None,
        "index_bytes": accounting.index_bytes(backbone, plan),
        "flops_ratio": flops / accounting.flops(backbone, whole, document_tokens) or None,
    }
