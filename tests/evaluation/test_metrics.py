import random

import pytest
from beir.retrieval.custom_metrics import mrr
from beir.retrieval.evaluation import EvaluateRetrieval

from effir_ray.errors import InputError
from effir_ray.evaluation.metrics import METRICS, score_run


def random_run(seed: int, *, ties: bool) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, int]]]:
    """40 queries over 300 documents; ids of queries 0 to 39 are also document ids (as in ArguAna)."""
    rng = random.Random(seed)
    documents = [str(i) for i in range(300)]
    qrels = {str(q): {d: rng.randint(0, 3) for d in rng.sample(documents, 25)} for q in range(40)}
    qrels["7"] = dict.fromkeys(qrels["7"], 0)  # judged, nothing relevant
    score = (lambda: rng.randint(0, 20) / 4) if ties else rng.random
    run = {q: {d: score() for d in [q, *rng.sample(documents, 150)]} for q in qrels}
    return run, qrels


@pytest.mark.parametrize("cut", [1, 3, 100, 1000])
def test_any_rank_scores_as_beir_does(cut: int) -> None:
    run, qrels = random_run(0, ties=False)
    found = score_run(run, qrels, cutoffs=[cut]).mean
    ndcg, average_precision, recall, _ = EvaluateRetrieval.evaluate(qrels, run, [cut])
    expected = ndcg | average_precision | recall | mrr(qrels, run, [cut])
    for name in ("NDCG", "MAP", "Recall", "MRR"):
        assert round(found[f"{name.lower()}@{cut}"], 5) == pytest.approx(expected[f"{name}@{cut}"], abs=1e-6)
    assert set(METRICS) <= set(found)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_scores_are_those_of_beir(seed: int, ties: bool) -> None:
    run, qrels = random_run(seed, ties=ties)
    scores = score_run(run, qrels)
    ndcg, average_precision, recall, _ = EvaluateRetrieval.evaluate(
        qrels, run, [10, 100]
    )  # drops self-matches
    expected = {
        "ndcg@10": ndcg["NDCG@10"],
        "recall@100": recall["Recall@100"],
        "mrr@10": mrr(qrels, run, [10])["MRR@10"],
        "map@100": average_precision["MAP@100"],
    }
    assert {metric: round(value, 5) for metric, value in scores.mean.items()} == pytest.approx(
        expected, abs=1e-6
    )
    assert set(scores.per_query) == set(qrels)


def test_self_matches_do_not_count() -> None:
    scores = score_run({"a": {"a": 9.0, "b": 1.0}}, {"a": {"b": 1}})
    assert scores.mean == {"ndcg@10": 1.0, "recall@100": 1.0, "mrr@10": 1.0, "map@100": 1.0}


def test_a_judged_query_that_is_left_out_scores_zero() -> None:
    scores = score_run({"a": {"x": 1.0}}, {"a": {"x": 1}, "b": {"y": 1}})
    assert scores.mean["ndcg@10"] == 0.5
    assert scores.per_query["b"]["recall@100"] == 0.0


def test_a_rank_below_one_is_refused() -> None:
    with pytest.raises(InputError, match="a rank is at least 1"):
        score_run({"a": {"x": 1.0}}, {"a": {"x": 1}}, cutoffs=[10, 0])


def test_a_run_of_other_queries_is_refused() -> None:
    with pytest.raises(InputError, match="another data set or split"):
        score_run({"a": {"x": 1.0}}, {"b": {"y": 1}})
