"""BM25 against its formula, and as a model to evaluate."""

import math
from pathlib import Path

import pytest

from effir_ray.data.datasets import load_dataset
from effir_ray.errors import InputError
from effir_ray.evaluation.bm25 import bm25_ranker, bm25_scores
from effir_ray.evaluation.corpus_search import Feedback
from effir_ray.evaluation.evaluate import evaluate
from tests.helpers.real_data import real_data


def test_scores_are_those_of_the_formula() -> None:
    """Lucene's: idf ln(1 + (N - n + 0.5) / (n + 0.5)), tf / (tf + k1 (1 - b + b length / mean))."""
    texts = ["cat dog", "cat cat bird", "fish"]
    scores, places = bm25_ranker(texts, depth=3)(["cat"])
    idf = math.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
    expected = {
        place: idf * count / (count + 1.5 * (0.25 + 0.75 * length / 2))
        for place, count, length in ((0, 1, 2), (1, 2, 3))
    }
    found = dict(zip(places[0].tolist(), scores[0].tolist(), strict=True))
    assert {place: found[place] for place in expected} == pytest.approx(expected, rel=1e-5)
    assert found[2] == 0


def test_it_is_evaluated_like_a_model(folder: Path, tmp_path: Path) -> None:
    found = evaluate("bm25", folder, split="test", out=tmp_path / "out")
    assert found.model == "bm25" and (tmp_path / "out" / "run.trec").is_file()
    assert found.scores == bm25_scores(load_dataset(str(folder)), "test")
    with pytest.raises(InputError, match="bm25 has none"):
        evaluate("bm25", folder, split="test", feedback=Feedback(documents=3))


def test_cranfield_stands_where_it_is_known_to() -> None:
    """0.491 by another implementation (whose stop words differ)."""
    score = bm25_scores(load_dataset(str(real_data("cranfield"))), "test").mean["ndcg@10"]
    assert score == pytest.approx(0.491, abs=0.015)
