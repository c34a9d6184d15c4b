"""Scores of a run against judgements, per query and averaged: the figures BEIR and MTEB report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from effir_ray.errors import InputError

Run = dict[str, dict[str, float]]  # query id -> document id -> score
METRICS = ("ndcg@10", "recall@100", "mrr@10", "map@100")


@dataclass(frozen=True)
class Scores:
    """``mean[metric]`` and ``per_query[query id][metric]``, all between 0 and 1."""

    mean: dict[str, float]
    per_query: dict[str, dict[str, float]]


def score_run(run: Run, qrels: Mapping[str, Mapping[str, int]]) -> Scores:
    """Score ``run`` as ``beir.retrieval.evaluation.EvaluateRetrieval`` does, unrounded.

    nDCG, recall and MAP come from pytrec_eval; MRR is cut at rank 10, which pytrec_eval cannot do, and
    computed as BEIR does. Documents with the id of the query are ignored (ArguAna's queries are documents of
    its corpus). A judged query that is absent from ``run`` scores 0: leaving hard queries out must not raise
    the mean.

    Raises InputError when no judged query is in the run.
    """
    import pytrec_eval

    if not any(query_id in run for query_id in qrels):
        raise InputError(
            "none of the judged queries is in the run: the run belongs to another data set or split"
        )
    cleaned = {query_id: without_self_match(query_id, run.get(query_id, {})) for query_id in qrels}
    measures = {"ndcg_cut.10", "recall.100", "map_cut.100"}
    evaluator = pytrec_eval.RelevanceEvaluator({q: dict(judged) for q, judged in qrels.items()}, measures)
    found = evaluator.evaluate({query_id: hits for query_id, hits in cleaned.items() if hits})
    per_query = {}
    for query_id, hits in cleaned.items():
        row = found.get(query_id, {})
        per_query[query_id] = {
            "ndcg@10": row.get("ndcg_cut_10", 0.0),
            "recall@100": row.get("recall_100", 0.0),
            "mrr@10": reciprocal_rank(hits, qrels[query_id], cut=10),
            "map@100": row.get("map_cut_100", 0.0),
        }
    mean = {metric: sum(row[metric] for row in per_query.values()) / len(per_query) for metric in METRICS}
    return Scores(mean, per_query)


def without_self_match(query_id: str, hits: Mapping[str, float]) -> dict[str, float]:
    """``hits`` without the document that is the query itself."""
    return {document_id: score for document_id, score in hits.items() if document_id != query_id}


def reciprocal_rank(hits: Mapping[str, float], judged: Mapping[str, int], *, cut: int) -> float:
    """1 / rank of the first relevant hit among the best ``cut``, else 0; ties stay in the run's own order."""
    ranked = sorted(hits, key=lambda document_id: -hits[document_id])[:cut]
    return next(
        (1 / rank for rank, document_id in enumerate(ranked, 1) if judged.get(document_id, 0) > 0), 0.0
    )
