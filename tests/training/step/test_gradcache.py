"""The step in one process, without DeepSpeed; ``test_equality`` has every engine and several ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from effir_ray.data.pairs import Pair
from effir_ray.models.retriever import load_retriever
from effir_ray.training.config import TrainConfig
from effir_ray.training.step.batches import Batch, Batches
from effir_ray.training.step.engine import PlainEngine
from effir_ray.training.step.gradcache import (
    ContrastiveStep,
    common_chunks,
    kept_passes,
    mean_cosine,
    split_chunks,
)
from effir_ray.training.step.losses import build_objective
from effir_ray.training.step.text_encoder import TextEncoder
from tests.helpers.equality_worker import training_pairs


def gradients(model: str, budget: int | None, **settings: Any) -> tuple[dict[str, torch.Tensor], Any]:
    config = TrainConfig(dataset="d", hard_negatives=3, batch_size=8, lora=None, steps=1, **settings)
    retriever = load_retriever(model)
    retriever.model.train()
    if config.gradient_checkpointing:
        retriever.model.gradient_checkpointing_enable({"use_reentrant": False})
    engine = PlainEngine(TextEncoder(retriever), config, torch.device("cpu"), False)

    def tokenize(texts: Any, kind: Any) -> list[list[int]]:
        return retriever.tokenize(texts, kind, max_length=64)

    (batch,) = Batches(training_pairs(), config, tokenize).run()
    objective = build_objective(config, has_teacher_scores=True)

    def teacher(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.randn(len(batch.texts), 64, generator=torch.Generator().manual_seed(1))
        return rows[: batch.n_queries], rows[batch.n_queries :]

    step = ContrastiveStep(engine, objective, token_budget=budget, teacher=teacher)
    torch.manual_seed(5)
    outcome = step(batch)
    return {
        name: engine.gradient(value).clone() for name, value in retriever.model.named_parameters()
    }, outcome


@pytest.mark.parametrize("model", ["random:llama", "random:bert", "random:modernbert"])
def test_a_token_budget_changes_the_memory_not_the_gradients(model: str) -> None:
    settings: dict[str, Any] = {
        "matryoshka": (16, 32),
        "distillation": {"teacher": "t", "embedding": 0.3, "similarity": 0.7},
    }
    whole, expected = gradients(model, None, **settings)
    cached, outcome = gradients(model, 100, **settings)
    assert outcome.computed > expected.computed
    assert outcome.loss == pytest.approx(expected.loss, rel=1e-5)
    assert outcome.terms == pytest.approx(expected.terms, rel=1e-4)
    largest = max(float(value.abs().max()) for value in whole.values())
    for name in whole:
        assert float((whole[name] - cached[name]).abs().max()) < 1e-5 * max(1.0, largest), name


def test_recomputed_passes_draw_the_dropout_they_drew_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout the gradient of a pass is only right if it is the gradient of that very pass."""
    seen: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    forward = TextEncoder.forward

    def with_dropout(self: TextEncoder, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        embeddings = torch.nn.functional.dropout(forward(self, ids, lengths), 0.5)
        seen[torch.is_grad_enabled()].append(embeddings.detach())
        return embeddings

    monkeypatch.setattr(TextEncoder, "forward", with_dropout)
    gradients("random:llama", 100)
    again = seen[True][-len(seen[False]) :]
    assert len(seen[False]) > 1
    assert all(torch.equal(first, second) for first, second in zip(seen[False], again, strict=True))


def test_gradient_checkpointing_changes_nothing() -> None:
    plain, _ = gradients("random:llama", None)
    checkpointed, _ = gradients("random:llama", None, gradient_checkpointing=True)
    for name in plain:
        assert torch.allclose(plain[name], checkpointed[name], atol=1e-5), name


def test_copies_of_a_positive_under_other_ids_are_no_negatives() -> None:
    """NFCorpus has 40 texts twice. Two copies as positives, one as a hard negative; spacing tells nothing."""
    pairs = [
        Pair("1", "one", ("The same.",), negatives=("other",), positive_ids=("a",), negative_ids=("x",)),
        Pair("2", "two", ("the  same.",), negatives=("more",), positive_ids=("b",), negative_ids=("y",)),
        Pair("3", "three", ("third",), negatives=("Third ",), positive_ids=("c",), negative_ids=("d",)),
    ]
    retriever = load_retriever("random:llama")
    config = TrainConfig(dataset="d", hard_negatives=1, batch_size=3, lora=None, steps=1)
    engine = PlainEngine(TextEncoder(retriever), config, torch.device("cpu"), False)
    (batch,) = Batches(pairs, config, lambda texts, kind: retriever.tokenize(texts, kind)).run()
    targets = ContrastiveStep(engine, build_objective(config, has_teacher_scores=False))._targets(batch)
    queries, documents = batch.texts[:3], batch.texts[3:]
    left = {
        query: {documents[column] for column in row.nonzero().flatten().tolist()}
        for query, row in zip(queries, targets.allowed, strict=True)
    }
    assert left["one"] == {"The same.", "other", "more", "third", "Third "}
    assert left["two"] == {"the  same.", "other", "more", "third", "Third "}
    assert left["three"] == {"The same.", "the  same.", "other", "more", "third"}


def test_chunks_are_halved_until_ranks_have_equally_many() -> None:
    chunks = [[1], [7, 8], [4, 0, 2, 3], [5, 6]]
    assert split_chunks(chunks, 5) == [[1], [7, 8], [4, 0], [2, 3], [5, 6]]
    assert len(split_chunks(chunks, 9)) == 9
    assert sorted(row for rows in split_chunks(chunks, 8) for row in rows) == list(range(9))


def test_a_batch_little_larger_than_the_budget_recomputes_little() -> None:
    engine = PlainEngine(
        TextEncoder(load_retriever("random:llama")),
        TrainConfig(dataset="d", lora=None),
        torch.device("cpu"),
        False,
    )
    lengths, budget = [100] * 24, 2048
    chunks = common_chunks(lengths, engine, budget)
    costs = [100 * len(rows) for rows in chunks]
    kept = sum(costs[len(chunks) - kept_passes(costs, budget) :])
    assert kept <= budget
    assert sum(lengths) - kept < sum(lengths) / 3
    assert len(common_chunks(lengths, engine, None)) == 2  # nothing to recompute: passes as large as can be


def test_mean_cosine_is_one_for_collapsed_embeddings() -> None:
    assert mean_cosine(torch.ones(5, 3)) == pytest.approx(1.0)
    assert mean_cosine(torch.eye(4)) == pytest.approx(0.0, abs=1e-7)
