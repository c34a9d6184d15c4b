"""BM25: the score that any dense model has to be seen beside, and a miner of hard negatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from effir_ray.data.datasets import Dataset
from effir_ray.errors import InputError
from effir_ray.evaluation.metrics import Run, Scores, score_run

NAME = "bm25"

Rank = Callable[[Sequence[str]], tuple[npt.NDArray[np.floating], npt.NDArray[np.integer]]]
"""Queries -> scores and places of the best documents, (queries, depth) each, best first."""


def bm25_ranker(texts: Sequence[str], depth: int) -> Rank:
    """BM25 (k1 1.5, b 0.75, Lucene's variant) with English stop words, by bm25s.

    Raises InputError where no document has a word.
    """
    import bm25s

    index = bm25s.BM25()
    words = bm25s.tokenize(list(texts), stopwords="en", show_progress=False)
    if not any(words.ids):
        raise InputError(f"BM25: none of the {len(texts)} documents has a word of two letters or more")
    index.index(words, show_progress=False)
    found = min(depth, len(texts))

    def rank(queries: Sequence[str]) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.integer]]:
        tokens = bm25s.tokenize(list(queries), stopwords="en", return_ids=False, show_progress=False)
        indices, scores = index.retrieve(tokens, k=found, show_progress=False)
        return scores, indices

    return rank


def bm25_run(dataset: Dataset, split: str, *, depth: int) -> Run:
    """The best ``depth`` documents of every query of ``split``; those that share no word with it are none."""
    documents, queries = dataset.corpus, dataset.queries(split)
    ids = documents.ids
    rank = bm25_ranker([document.document_text for document in documents.iter_documents()], depth)
    scores, places = rank(list(queries.values()))
    return {
        query_id: {ids[place]: float(score) for place, score in zip(row, values, strict=True) if score > 0}
        for query_id, row, values in zip(queries, places.tolist(), scores.tolist(), strict=True)
    }


def bm25_scores(dataset: Dataset, split: str, *, depth: int = 100) -> Scores:
    """Scores of BM25 on ``split``, as ``evaluate`` reports a model's."""
    return score_run(bm25_run(dataset, split, depth=depth), dataset.qrels(split))
