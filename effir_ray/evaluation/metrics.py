"""Scores of a run against judgements, per query and averaged: the figures BEIR and MTEB report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from effir_ray.errors import InputError

Run = dict[str, dict[str, float]]  # query id -> document id -> score
METRICS = ("ndcg@10", "recall@100", "mrr@10", "map@100")
"""What is always reported: the figures of BEIR, MTEB and the paper."""

_TREC_NAMES = {"ndcg": "ndcg_cut", "recall": "recall", "mrr": "", "map": "map_cut"}  # "": not pytrec_eval's


@dataclass(frozen=True)
class Scores:
    """``mean[metric]`` and ``per_query[query id][metric]``, all between 0 and 1."""

    mean: dict[str, float]
    per_query: dict[str, dict[str, float]]


def score_run(run: Run, qrels: Mapping[str, Mapping[str, int]], *, cutoffs: Sequence[int] = ()) -> Scores:
    """Score ``run`` as ``beir.retrieval.evaluation.EvaluateRetrieval`` does, unrounded.

    Always ``METRICS``, then nDCG, recall, MRR and MAP at each of ``cutoffs`` (ranks; the run must be as
    deep).
    nDCG, recall and MAP come from pytrec_eval; MRR is cut at a rank, which pytrec_eval cannot do, and
    computed as BEIR does. Documents with the id of the query are ignored (ArguAna's queries are documents of
    its corpus). A judged query that is absent from ``run`` scores 0: leaving hard queries out must not raise
    the mean.

    Raises InputError when no judged query is in the run and for a cutoff below 1.
    """
    import pytrec_eval

    if not any(query_id in run for query_id in qrels):
        raise InputError(
            "none of the judged queries is in the run: the run belongs to another data set or split"
        )
    check_cutoffs(cutoffs)
    metrics = list(dict.fromkeys([*METRICS, *(f"{name}@{cut}" for cut in cutoffs for name in _TREC_NAMES)]))
    cleaned = {query_id: without_self_match(query_id, run.get(query_id, {})) for query_id in qrels}
    cuts: dict[str, set[str]] = {}
    for name, _, cut in (metric.partition("@") for metric in metrics):
        cuts.setdefault(_TREC_NAMES[name], set()).add(cut)
    measures = {f"{name}.{','.join(sorted(found, key=int))}" for name, found in cuts.items() if name}
    evaluator = pytrec_eval.RelevanceEvaluator({q: dict(judged) for q, judged in qrels.items()}, measures)
    found = evaluator.evaluate({query_id: hits for query_id, hits in cleaned.items() if hits})
    per_query = {}
    for query_id, hits in cleaned.items():
        row = found.get(query_id, {})
        per_query[query_id] = {metric: _score(metric, row, hits, qrels[query_id]) for metric in metrics}
    mean = {metric: sum(row[metric] for row in per_query.values()) / len(per_query) for metric in metrics}
    return Scores(mean, per_query)


def check_cutoffs(cutoffs: Sequence[int]) -> None:
    """Raise InputError for what is no rank."""
    if any(cut < 1 for cut in cutoffs):
        raise InputError(f"cutoffs are {', '.join(map(str, cutoffs))}; a rank is at least 1")


def _score(
    metric: str, row: Mapping[str, float], hits: Mapping[str, float], judged: Mapping[str, int]
) -> float:
    name, _, cut = metric.partition("@")
    if name == "mrr":
        return reciprocal_rank(hits, judged, cut=int(cut))
    return row.get(f"{_TREC_NAMES[name]}_{cut}", 0.0)


def without_self_match(query_id: str, hits: Mapping[str, float]) -> dict[str, float]:
    """``hits`` without the document that is the query itself."""
    return {document_id: score for document_id, score in hits.items() if document_id != query_id}


def reciprocal_rank(hits: Mapping[str, float], judged: Mapping[str, int], *, cut: int) -> float:
    """1 / rank of the first relevant hit among the best ``cut``, else 0; ties stay in the run's own order."""
    ranked = sorted(hits, key=lambda document_id: -hits[document_id])[:cut]
    return next(
        (1 / rank for rank, document_id in enumerate(ranked, 1) if judged.get(document_id, 0) > 0), 0.0
    )
