"""Similarity by blocks against the hidden states that transformers itself returns."""

import numpy as np
import pytest
import torch

from effir_ray.compression.analysis.similarity import layer_similarities
from effir_ray.data.pairs import Pair
from effir_ray.models.random_models import RANDOM_MODELS
from effir_ray.models.retriever import Retriever, load_retriever
from tests.helpers.compression_examples import QUERIES, TEXTS


def pair(number: int, document: int) -> Pair:
    return Pair(f"q{number}", QUERIES[number], (TEXTS[document],), positive_ids=(f"d{document}",))


def vectors(retriever: Retriever, text: str, kind: str) -> np.ndarray:
    """(blocks, hidden): the mean or last token, whichever the model pools, of every hidden state but the
    last, which is behind the final norm."""
    (tokens,) = retriever.tokenize([text], kind)  # type: ignore[arg-type]
    ids = torch.tensor([tokens])
    with torch.inference_mode():
        states = retriever.model(input_ids=ids, output_hidden_states=True).hidden_states[:-1]
    pooled = [state[0, -1] if retriever.spec.pooling == "last" else state[0].mean(0) for state in states]
    return torch.nn.functional.normalize(torch.stack(pooled), dim=-1).numpy()


@pytest.mark.parametrize("kind", RANDOM_MODELS)
def test_cosines_are_those_of_transformers_hidden_states(kind: str) -> None:
    retriever = load_retriever(f"random:{kind}")
    found = layer_similarities(retriever, [pair(0, 0), pair(1, 3)])
    assert [row.blocks for row in found] == [0, 1, 2, 3, 4]
    queries = [vectors(retriever, text, "query") for text in QUERIES[:2]]
    documents = [vectors(retriever, TEXTS[number], "document") for number in (0, 3)]
    for row in found[:-1]:
        near = [float(queries[i][row.blocks] @ documents[i][row.blocks]) for i in (0, 1)]
        far = [float(queries[i][row.blocks] @ documents[1 - i][row.blocks]) for i in (0, 1)]
        assert row.positive == pytest.approx(np.mean(near), abs=1e-5)
        assert row.negative == pytest.approx(np.mean(far), abs=1e-5)
        assert row.positive_low == pytest.approx(np.quantile(near, 0.25), abs=1e-5)
        assert row.negative_high == pytest.approx(np.quantile(far, 0.75), abs=1e-5)


def test_a_document_of_both_queries_is_no_negative() -> None:
    retriever = load_retriever("random:llama")
    assert layer_similarities(retriever, [pair(0, 2), pair(1, 2)]) == []
    assert layer_similarities(retriever, [pair(0, 2)]) == []
