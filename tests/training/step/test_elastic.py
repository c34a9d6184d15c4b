"""Elastic training: a rung computes what its extracted checkpoint does, and every rung's gradient arrives."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from effir_ray.config import parse
from effir_ray.data.pairs import Pair
from effir_ray.errors import InputError
from effir_ray.models.retriever import Retriever, load_retriever
from effir_ray.training.config import TrainConfig
from effir_ray.training.step.batches import Batch, Batches
from effir_ray.training.step.elastic import (
    ElasticStep,
    choose,
    extract,
    layer_widths,
    prepare_elastic,
    selected,
)
from effir_ray.training.step.engine import PlainEngine
from effir_ray.training.step.gradcache import ContrastiveStep
from effir_ray.training.step.ladder import Rung, make_ladder
from effir_ray.training.step.losses import build_objective
from effir_ray.training.step.text_encoder import TextEncoder

LADDER = make_ladder([(1, 1.0), (1, 0.75), (2, 0.5), (3, 0.25)], mlp_order=[2, 1], attention_order=[3])
TEXTS = ["a short text", "another text that is somewhat longer than the first one", "three"]
PAIRS = [
    Pair(str(i), f"query {i}", (f"document number {i}",), (f"other {i}",), None, (f"d{i}",), (f"n{i}",))
    for i in range(12)
]


@pytest.fixture(params=["llama", "gemma2", "bert", "modernbert"])
def elastic(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A sorted checkpoint of every kind of block."""
    return sorted_model(f"random:{request.param}", tmp_path)


def sorted_model(name: str, folder: Path) -> Path:
    widths = layer_widths(load_retriever(name))
    scores = {layer: np.random.default_rng(layer).random(width) for layer, width in enumerate(widths)}
    return prepare_elastic(name, scores, folder / "sorted")


def embed(retriever: Retriever, texts: list[str] = TEXTS) -> torch.Tensor:
    """(texts, hidden); padded on the right."""
    tokens = retriever.tokenize(texts, "document")
    ids = torch.zeros(len(tokens), max(map(len, tokens)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(tokens):
        ids[row, : len(text)], mask[row, : len(text)] = torch.tensor(text), 1
    hidden = retriever.model(input_ids=ids, attention_mask=mask).last_hidden_state
    return retriever.pool(hidden, mask)


def run_of(model: Path | str, **settings: object) -> tuple[Retriever, PlainEngine, TrainConfig, Batch]:
    config = parse(
        {"dataset": "unused", "batch_size": 4, "lora": None, "hard_negatives": 1, "elastic": LADDER}
        | settings,
        TrainConfig,
        source="test",
    )
    retriever = load_retriever(model)
    engine = PlainEngine(TextEncoder(retriever), config, torch.device("cpu"), False)
    batch = next(Batches(PAIRS, config, retriever.tokenize).run())
    return retriever, engine, config, batch


def test_a_rung_computes_what_its_checkpoint_does(elastic: Path, tmp_path: Path) -> None:
    retriever = load_retriever(elastic)
    with torch.no_grad():
        full = embed(retriever)
        for rung in LADDER:
            with selected(retriever, rung):
                inside = embed(retriever)
            small = load_retriever(extract(elastic, rung, tmp_path / rung.name))
            torch.testing.assert_close(embed(small), inside, atol=1e-5, rtol=0)
            assert (inside - full).abs().max() > 1e-3
            assert sum(layer_widths(small)) < sum(layer_widths(retriever))
        torch.testing.assert_close(embed(retriever), full)  # nothing stays selected


def test_sorting_changes_nothing_and_keeps_the_best_neurons(tmp_path: Path) -> None:
    plain = load_retriever("random:llama")
    ordered = load_retriever(sorted_model("random:llama", tmp_path))
    torch.testing.assert_close(embed(ordered), embed(plain), atol=1e-5, rtol=0)
    family = plain.family
    best = int(np.argmax(np.random.default_rng(1).random(128)))
    old, new = (family.mlp(family.layers(each.model)[1]) for each in (plain, ordered))
    assert old is not None and new is not None
    torch.testing.assert_close(family.down(new).weight[:, 0], family.down(old).weight[:, best])


@pytest.mark.parametrize("token_budget", [None, 40])
def test_gradients_are_the_mean_over_networks(token_budget: int | None, tmp_path: Path) -> None:
    model = sorted_model("random:llama", tmp_path)
    retriever, engine, config, batch = run_of(model)
    objective = build_objective(config, has_teacher_scores=False)
    step = ElasticStep(engine, retriever, objective, config, token_budget=token_budget)
    outcome = step(batch)
    found = {name: parameter.grad for name, parameter in retriever.model.named_parameters()}

    other, plain, _, _ = run_of(model)
    largest = ContrastiveStep(plain, objective)
    teacher = largest.embed(batch)
    networks = [Rung(), *choose(LADDER, config.seed, 0)]
    for rung in networks[1:]:
        with selected(other, rung):
            reference(other, batch, teacher, config).backward()
    losses = largest(batch)
    for name, parameter in other.model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], parameter.grad / len(networks), atol=1e-5, rtol=1e-4)
    assert outcome.loss == pytest.approx(losses.loss, abs=1e-5)
    assert set(outcome.terms) == {"info_nce", *(rung.name for rung in networks[1:])}


def reference(retriever: Retriever, batch: Batch, teacher: torch.Tensor, config: TrainConfig) -> torch.Tensor:
    """InfoNCE plus KL to the largest network's ranking of the batch, written out."""
    tokens, b = batch.tokens, batch.n_queries
    ids = torch.zeros(len(tokens), max(map(len, tokens)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(tokens):
        ids[row, : len(text)], mask[row, : len(text)] = torch.tensor(text), 1
    embeddings = retriever.pool(retriever.model(ids, attention_mask=mask).last_hidden_state, mask)
    cosines, wanted = (each[:b] @ each[b:].T for each in (embeddings, teacher))
    temperature = config.distillation.similarity_temperature
    scores, wanted = cosines / temperature, wanted / temperature
    positives = torch.arange(b) * batch.document_ids.shape[1]
    contrast = torch.nn.functional.cross_entropy(cosines / config.temperature, positives)
    soft = wanted.softmax(dim=1)
    return contrast + (soft * (wanted.log_softmax(dim=1) - scores.log_softmax(dim=1))).sum(dim=1).mean()


def test_every_rung_learns_from_the_teacher_that_the_settings_name(tmp_path: Path) -> None:
    teaching = {"info_nce": 0, "distillation": {"teacher": "t", "embedding": 1.0}}
    retriever, engine, config, batch = run_of(sorted_model("random:llama", tmp_path), **teaching)
    rows = torch.randn(len(batch.texts), 64, generator=torch.Generator().manual_seed(0))
    said = rows[: batch.n_queries], rows[batch.n_queries :]
    objective = build_objective(config, has_teacher_scores=False)
    step = ElasticStep(engine, retriever, objective, config, teacher=lambda batch: said)
    first = step(batch).terms
    for _ in range(15):
        engine.step(1e-3)
        last = step(batch).terms
    assert "embedding" in first
    assert last[LADDER[-1].name] < 0.7 * first[LADDER[-1].name]


def test_the_smallest_rung_learns(tmp_path: Path) -> None:
    retriever, engine, config, batch = run_of(sorted_model("random:llama", tmp_path))
    objective = build_objective(config, has_teacher_scores=False)
    step = ElasticStep(engine, retriever, objective, config)
    smallest = LADDER[-1].name
    first = step(batch).terms[smallest]
    for _ in range(15):
        engine.step(1e-3)
        last = step(batch).terms[smallest]
    assert last < 0.7 * first


def test_the_sandwich_is_the_same_everywhere_and_reaches_every_rung() -> None:
    seen = set()
    for number in range(20):
        rungs = choose(LADDER, 7, number)
        assert rungs == choose(LADDER, 7, number)
        assert rungs[-1] == LADDER[-1]
        assert len(rungs) == len(set(rungs)) == 3
        seen.update(rungs)
    assert seen == set(LADDER)
    assert choose(LADDER[:1], 7, 0) == list(LADDER[:1])


def test_ladders_follow_the_order_and_are_nested() -> None:
    assert [rung.name for rung in LADDER] == ["1M", "1M-w25", "1M1A-w50", "2M1A-w75"]
    assert LADDER[-1].drop_mlp == (1, 2)
    with pytest.raises(InputError, match="rung 1M-w50 is not a smaller"):
        make_ladder([(2, 1.0), (1, 0.5)], mlp_order=[0, 1])
    with pytest.raises(InputError, match="drops 3 sublayers; the drop order has 2"):
        make_ladder([(3, 1.0)], mlp_order=[0, 1])
    with pytest.raises(InputError, match=r"elastic: .*not a smaller sub-network"):
        parse({"dataset": "stdlib", "elastic": [{"width": 0.5}, {"width": 0.7}]}, TrainConfig, source="file")
    with pytest.raises(InputError, match="drops layer 9; the model has layers 0 to 3"):
        Rung(drop_mlp=(9,)).plan([128] * 4)


@pytest.mark.integration
def test_an_elastic_fine_tune_through_the_launcher(tmp_path: Path) -> None:
    from effir_ray.training.run.launcher import train

    model = sorted_model("random:llama", tmp_path)
    file = tmp_path / "pairs.jsonl"
    lines = [
        {"query": pair.query, "positive": pair.positives[0], "negative": pair.negatives[0]} for pair in PAIRS
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = TrainConfig(
        dataset=str(file), steps=6, batch_size=4, hard_negatives=1, elastic=LADDER, learning_rate=1e-3
    )
    result = train(model, config, tmp_path / "run")
    smallest = LADDER[-1]
    assert f"loss_{smallest.name}" in result.history[0]
    trained = load_retriever(result.checkpoint)
    small = load_retriever(extract(result.checkpoint, smallest, tmp_path / "small"))
    with torch.no_grad(), selected(trained, smallest):
        torch.testing.assert_close(embed(small), embed(trained), atol=1e-5, rtol=0)
    before = load_retriever(extract(model, smallest, tmp_path / "before"))
    assert (embed(before) - embed(small)).abs().max() > 1e-3
