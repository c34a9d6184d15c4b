"""Every criterion against a direct, slow computation on every family."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from effir_ray.compression.depth.importance import best_sets, measure_importance
from effir_ray.compression.pipeline import depth_plan, importance_scores
from effir_ray.compression.planning import ImportanceScores
from effir_ray.compression.schedule import Calibration, Schedule
from effir_ray.compression.surgery import apply_plan
from effir_ray.data.datasets import load_dataset
from effir_ray.errors import InputError, TrialFailure
from effir_ray.evaluation.evaluate import evaluate
from effir_ray.models.plan import LayerPlan, Plan
from effir_ray.models.retriever import Retriever, load_retriever
from tests.helpers.compression_examples import PAIRS, QUERIES, TEXTS, vectors
from tests.helpers.real_data import real_data

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "bert", "modernbert"]


def without(name: str, dropped: list[tuple[str, int]]) -> Retriever:
    retriever = load_retriever(name)
    layers = [
        LayerPlan(
            attention=("attention", i) not in dropped and ("block", i) not in dropped,
            mlp=("mlp", i) not in dropped and ("block", i) not in dropped,
        )
        for i in range(len(retriever.plan.layers))
    ]
    return apply_plan(retriever, Plan(layers=tuple(layers)))


def groups(scores: ImportanceScores) -> np.ndarray:
    return np.array([scores.attention, scores.mlp, scores.block])


Change = tuple[str, int, torch.Tensor, torch.Tensor]


def streams(name: str, texts: list[list[int]]) -> list[list[Change]]:
    """(unit, layer, x, x + F(x)) of unpadded texts, each (tokens, hidden), by cutting the model short.

    The middle of block l is the output of that block in a model whose layer l has lost its MLP.
    """
    full = load_retriever(name)
    halves = [without(name, [("mlp", layer)]) for layer in range(4)]
    found = []
    for tokens in texts:
        outputs = block_outputs(full, tokens)
        changes: list[Change] = []
        for layer, half in enumerate(halves):
            middle = block_outputs(half, tokens)[layer + 1]
            changes.append(("attention", layer, outputs[layer], middle))
            changes.append(("mlp", layer, middle, outputs[layer + 1]))
            changes.append(("block", layer, outputs[layer], outputs[layer + 1]))
        found.append(changes)
    return found


def block_outputs(retriever: Retriever, tokens: list[int]) -> list[torch.Tensor]:
    """What enters block 0 and what every block puts out, (tokens, hidden) each."""
    outputs: list[torch.Tensor] = []
    layers = retriever.family.layers(retriever.model)
    handles = [layer.register_forward_hook(lambda m, a, out: outputs.append(out[0])) for layer in layers]
    handles.append(
        layers[0].register_forward_pre_hook(
            lambda m, a, k: outputs.append((a[0] if a else k["hidden_states"])[0]), with_kwargs=True
        )
    )
    ids = torch.tensor([tokens])
    with torch.inference_mode():
        retriever.model(input_ids=ids, attention_mask=torch.ones_like(ids))
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize("kind", FAMILIES)
def test_cosine_is_the_mean_over_real_tokens(kind: str) -> None:
    retriever = load_retriever(f"random:{kind}")
    expected = np.zeros((3, 4))
    count = 0
    texts = retriever.tokenize(TEXTS, "document")
    for tokens, changes in zip(texts, streams(retriever.name, texts), strict=True):
        for unit, layer, before, after in changes:
            turned = 1 - torch.cosine_similarity(before.double(), after.double(), dim=-1)
            expected[["attention", "mlp", "block"].index(unit), layer] += turned.sum().item()
        count += len(tokens)
    for budget in (1, 64, 4096):  # one text a batch, some padding, all in one batch
        scores = measure_importance(retriever, TEXTS, criterion="cosine", token_budget=budget)
        np.testing.assert_allclose(groups(scores), expected / count, atol=2e-6)


def damage(name: str, unit: str, layers: Sequence[int]) -> float:
    """1 - cos to the full model's vectors of texts and queries, by physical removal."""
    full, small = load_retriever(name), without(name, [(unit, layer) for layer in layers])
    moved = [
        1 - torch.cosine_similarity(vectors(full, texts, kind), vectors(small, texts, kind))
        for texts, kind in ((TEXTS, "document"), (QUERIES, "query"))
    ]
    return torch.cat(moved).mean().item()


@pytest.mark.parametrize("kind", ["gemma3", "bert", "modernbert"])
def test_pooled_finds_the_sets_that_move_the_final_vectors_least(kind: str) -> None:
    """Of 4 layers all sets are tried; what a set does is what physical removal does."""
    name = f"random:{kind}"
    scores = measure_importance(
        load_retriever(name), TEXTS, queries=QUERIES, criterion="pooled", token_budget=50
    )
    for unit in ("attention", "mlp", "block"):
        best = scores.best[unit]  # type: ignore[index]  # its keys are these names
        for size, found in enumerate(best, start=1):
            expected = min(itertools.combinations(range(4), size), key=lambda s: damage(name, unit, s))
            assert damage(name, unit, found) == pytest.approx(damage(name, unit, expected), abs=1e-6)
        kept = [(1 + sum(layer not in dropped for dropped in best)) / 4 for layer in range(4)]
        assert getattr(scores, unit) == pytest.approx(kept)


def test_sets_are_all_tried_within_the_budget_and_else_a_beam() -> None:
    """Layers 1 and 3 hurt together only; 2 alone is the cheapest."""
    tried: list[tuple[int, ...]] = []

    def evaluate(sets: list[tuple[int, ...]]) -> np.ndarray:
        tried.extend(sets)
        worth = {0: 5.0, 1: 1.5, 2: 1.0, 3: 1.5}
        return np.array(
            [sum(worth[layer] for layer in dropped) - 4 * ({1, 3} <= set(dropped)) for dropped in sets]
        )

    assert best_sets(range(4), evaluate) == [(2,), (1, 3), (1, 2, 3)]
    assert len(tried) == 4 + 6 + 4
    tried.clear()
    assert best_sets(range(4), evaluate, budget=0) == [(2,), (1, 2), (1, 2, 3)]  # greedy
    assert len(tried) == 4 + 3 + 2
    tried.clear()
    assert best_sets(range(4), evaluate, budget=15) == [(2,), (1, 2), (1, 2, 3)]
    tried.clear()
    assert best_sets([3], evaluate) == [] == tried


@pytest.mark.integration
def test_pooled_keeps_the_right_half_of_minilm() -> None:
    """Blocks {0, 4, 5} alone keep a retriever; the first three, or the last, do not. nDCG@10, SciFact dev."""
    data = load_dataset(str(real_data("scifact")))
    dev = data.sample("dev", queries=75, documents=500)
    calibration = Calibration(dataset=str(real_data("scifact")), texts=24, max_length=96)
    schedule, full = Schedule(drop_block=3, importance="pooled"), load_retriever("minilm-l6")
    plan = depth_plan(schedule, full.plan, importance_scores(full, schedule, calibration, {"block"}))
    assert [index for index, layer in enumerate(plan.layers) if layer.attention] == [0, 4, 5]

    def score(plan: Plan) -> float:
        pruned = apply_plan(load_retriever("minilm-l6"), plan)
        found = evaluate(pruned, dev, split="dev", query_max_length=64, document_max_length=96)
        return found.scores.mean["ndcg@10"]

    last = depth_plan(Schedule(drop_last_blocks=3), full.plan, None)
    assert score(plan) > max(0.75, score(last) + 0.1)


@pytest.mark.parametrize("kind", ["qwen3", "modernbert"])
def test_dev_loss_is_the_loss_increase_of_physical_removal(kind: str) -> None:
    name = f"random:{kind}"

    def loss(retriever: Retriever) -> float:
        queries = vectors(retriever, [pair.query for pair in PAIRS], "query")
        documents = vectors(retriever, [pair.positives[0] for pair in PAIRS])
        log_probabilities = (queries @ documents.T / 0.02).log_softmax(dim=1)
        return -log_probabilities.diagonal().mean().item()

    base = loss(load_retriever(name))
    scores = measure_importance(load_retriever(name), criterion="dev-loss", pairs=PAIRS)
    expected = [
        [loss(without(name, [(unit, i)])) - base for i in range(4)] for unit in ("attention", "mlp", "block")
    ]
    np.testing.assert_allclose(groups(scores), expected, atol=2e-4)


def test_dropped_sublayers_score_nothing_and_are_no_candidates() -> None:
    retriever = without("random:llama", [("attention", 1), ("block", 3)])
    for criterion in ("cosine", "pooled"):
        scores = measure_importance(retriever, TEXTS, criterion=criterion)
        assert scores.attention[1] == scores.attention[3] == scores.mlp[3] == 0.0
        assert scores.block[3] == pytest.approx(0.0, abs=1e-6)
        assert min(scores.attention[0], scores.attention[2], scores.mlp[1], scores.block[1]) > 0


def test_random_scores_follow_the_seed() -> None:
    retriever = load_retriever("random:bert")
    first, again, other = (measure_importance(retriever, criterion="random", seed=seed) for seed in (3, 3, 4))
    assert first == again != other
    assert len(first.mlp) == 4


def test_measuring_leaves_the_model_as_it_was() -> None:
    retriever = load_retriever("random:modernbert")
    before = vectors(retriever, TEXTS)
    for criterion in ("cosine", "pooled", "dev-loss"):
        measure_importance(retriever, TEXTS, criterion=criterion, pairs=PAIRS)
    assert torch.equal(vectors(retriever, TEXTS), before)
    assert all("forward" not in module.__dict__ for module in retriever.model.modules())


def test_missing_texts_and_pairs_are_named() -> None:
    retriever = load_retriever("random:llama")
    with pytest.raises(InputError, match="needs calibration texts"):
        measure_importance(retriever, criterion="cosine")
    with pytest.raises(InputError, match="expected one of cosine, pooled"):
        measure_importance(retriever, TEXTS, criterion="cosin")  # type: ignore[arg-type]  # the point
    with pytest.raises(InputError, match="1 training pairs"):
        measure_importance(retriever, criterion="dev-loss", pairs=PAIRS[:1])


def test_a_broken_model_is_a_failed_trial() -> None:
    retriever = load_retriever("random:llama")
    next(retriever.model.parameters()).data.fill_(float("nan"))
    with pytest.raises(TrialFailure, match="not a finite number"):
        measure_importance(retriever, TEXTS)
