"""Calibration batches: complete, within the budget; the loss of a batch of pairs."""

import pytest
import torch

from effir_ray.compression.calibration import make_batches, pair_batch, pair_loss
from effir_ray.data.pairs import Pair
from effir_ray.encoding.padded import embed
from effir_ray.models.retriever import load_retriever
from tests.helpers.compression_examples import TEXTS, vectors


def test_batches_hold_every_text_once_within_the_budget() -> None:
    retriever = load_retriever("random:llama")
    texts = TEXTS * 5
    batches = list(make_batches(retriever, texts, token_budget=40))
    assert sum(len(batch) for batch in batches) == len(texts)
    assert all(batch.input_ids.numel() <= 40 or len(batch) == 1 for batch in batches)
    lengths = sorted(int(row.sum()) for batch in batches for row in batch.attention_mask)
    assert lengths == sorted(len(tokens) for tokens in retriever.tokenize(texts, "document"))


def test_pairs_of_one_document_are_no_negatives_of_each_other() -> None:
    """The loss of pairs 0 and 1, which share a document, sees one negative only: the document of pair 2."""
    retriever = load_retriever("random:bert")
    queries_and_texts = (("a", TEXTS[0]), ("the cell", TEXTS[0]), ("data", TEXTS[1]))
    pairs = [Pair(str(i), query, (text,)) for i, (query, text) in enumerate(queries_and_texts)]
    batch = pair_batch(retriever, pairs)
    assert batch.allowed.tolist() == [[True, False, True], [False, True, True], [True, True, True]]
    queries = torch.nn.functional.normalize(vectors(retriever, [pair.query for pair in pairs], "query"))
    documents = torch.nn.functional.normalize(vectors(retriever, [pair.positives[0] for pair in pairs]))
    similarity = queries @ documents.T / 0.02
    expected = sum(
        float(similarity[row, seen].logsumexp(0) - similarity[row, row]) / 3
        for row, seen in enumerate(([0, 2], [1, 2], [0, 1, 2]))
    )
    with torch.inference_mode():
        loss = pair_loss(embed(retriever, batch.queries), embed(retriever, batch.documents), batch.allowed)
    assert float(loss) == pytest.approx(expected, abs=1e-3)
