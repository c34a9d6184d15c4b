"""The padded pass: equal to texts alone whatever the padding, and differentiable."""

from __future__ import annotations

import pytest
import torch

from effir_ray.encoding.padded import PaddedTexts, embed, hidden_states, pad
from effir_ray.models.retriever import load_retriever
from tests.helpers.compression_examples import TEXTS, vectors


def test_texts_are_padded_on_the_right() -> None:
    texts = pad([[5, 6, 7], [8]])
    assert texts.input_ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert texts.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert len(texts) == 2
    same = pad([torch.tensor([5, 6, 7]), torch.tensor([8])])
    assert torch.equal(same.input_ids, texts.input_ids)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "bert", "modernbert"])
def test_padding_changes_nothing_whatever_token_it_is(kind: str) -> None:
    retriever = load_retriever(f"random:{kind}")
    texts = pad(retriever.tokenize(TEXTS, "document"))
    other = PaddedTexts(
        input_ids=texts.input_ids.where(texts.attention_mask.bool(), torch.tensor(9)),
        attention_mask=texts.attention_mask,
    )
    with torch.inference_mode():
        found, same = embed(retriever, texts), embed(retriever, other)
    assert torch.equal(found, same)
    torch.testing.assert_close(found, vectors(retriever, TEXTS), atol=1e-5, rtol=0)


def test_gradients_reach_the_weights() -> None:
    retriever = load_retriever("random:llama")
    texts = pad(retriever.tokenize(TEXTS, "document"))
    assert hidden_states(retriever, texts).shape[:2] == texts.input_ids.shape
    embed(retriever, texts).square().sum().backward()
    assert all(p.grad is not None for p in retriever.family.layers(retriever.model)[0].parameters())
