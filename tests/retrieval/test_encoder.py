"""Encoder: order, batching, prompts, and what happens when memory runs out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from effir_ray.backbones.random_models import RANDOM_MODELS
from effir_ray.backbones.retriever import load_retriever
from effir_ray.errors import InputError
from effir_ray.retrieval import encoder as encoder_module
from effir_ray.retrieval.batching import token_budget_batches
from effir_ray.retrieval.encoder import Encoder

TEXTS = [
    "the study of cells and protein",
    "a",
    "results of the search in this document are from the model and the data " * 3,
    "list the value of string",
    "number of the file",
    "the study of cells and protein",
] + [f"query number {i} " + "of the data " * (i % 5) for i in range(12)]


def alone(retriever, texts):
    """The reference: one text at a time through the model's own forward, no padding, no batching."""
    rows = []
    for ids in retriever.tokenize(texts, "document"):
        input_ids = torch.tensor([ids])
        with torch.no_grad():
            hidden = retriever.model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
        rows.append(retriever.pool(hidden.last_hidden_state, torch.ones_like(input_ids))[0].numpy())
    return np.stack(rows)


@pytest.mark.parametrize("family", RANDOM_MODELS)
@pytest.mark.parametrize("budget", [16, 100_000])
def test_same_embedding_alone_and_in_any_batch(family, budget):
    retriever = load_retriever(f"random:{family}")
    got = Encoder(retriever, token_budget=budget).encode(TEXTS, "document")
    np.testing.assert_allclose(got, alone(retriever, TEXTS), atol=1e-5, rtol=0)


@pytest.mark.parametrize("padded", [True, False])
def test_batches_hold_every_text_once_within_the_budget(padded):
    lengths = [3, 9, 1, 40, 7, 7, 2, 12, 5]
    batches = token_budget_batches(lengths, 20, padded=padded)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    for batch in batches:
        sizes = [lengths[i] for i in batch]
        cost = max(sizes) * len(sizes) if padded else sum(sizes)
        assert cost <= 20 or len(sizes) == 1
    assert token_budget_batches([], 20) == []


def test_windows_keep_the_input_order(monkeypatch):
    retriever = load_retriever("random:llama")
    whole = Encoder(retriever).encode(TEXTS, "document")
    monkeypatch.setattr(encoder_module, "WINDOW", 5)
    np.testing.assert_allclose(Encoder(retriever).encode(TEXTS, "document"), whole, atol=1e-5, rtol=0)


def test_no_texts():
    assert Encoder(load_retriever("random:bert")).encode([], "query").shape == (0, 64)


def test_out_of_memory_halves_the_budget_and_goes_on():
    retriever = load_retriever("random:llama")
    expected = Encoder(retriever).encode(TEXTS, "document")
    encoder = Encoder(retriever, token_budget=400)
    forward = encoder._forward

    class Small:
        padded = forward.padded

        def __call__(self, tokens):
            if sum(map(len, tokens)) > 90:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(tokens)

    encoder._forward = Small()
    np.testing.assert_allclose(encoder.encode(TEXTS, "document"), expected, atol=1e-5, rtol=0)
    assert encoder.token_budget <= 200


def test_one_text_that_does_not_fit_is_an_input_error():
    encoder = Encoder(load_retriever("random:llama"))

    class Full:
        padded = True

        def __call__(self, tokens):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    encoder._forward = Full()
    with pytest.raises(InputError, match="out of memory with a single text"):
        encoder.encode(["the study"], "query")


def test_bad_budget():
    with pytest.raises(InputError, match="token_budget"):
        Encoder(load_retriever("random:llama"), token_budget=0)
