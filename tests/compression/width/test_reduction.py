"""Neuron rankings and self-slimming against the paper's formulas, computed the long way."""

import math

import numpy as np
import pytest
import torch

from effir_ray.compression.calibration import pair_batch
from effir_ray.compression.surgery import apply_plan
from effir_ray.compression.width.neurons import fresh_gates, frozen, mlps, sort_neurons
from effir_ray.compression.width.reduction import (
    SlimmingConfig,
    activation_function,
    rank_neurons,
    slimming_loss,
    sparsity_penalty,
    train_gates,
)
from effir_ray.errors import InputError
from effir_ray.models.plan import LayerPlan, Plan
from effir_ray.models.retriever import Retriever, load_retriever
from tests.helpers.compression_examples import PAIRS, TEXTS, vectors

KINDS = ["llama", "gemma2", "bert", "modernbert"]
METHODS = ["self-slimming", "magnitude", "activation", "gate-activation", "taylor", "random"]


def state(retriever: Retriever) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in retriever.model.state_dict().items()}


def projections(retriever: Retriever, layer: int) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """(gate, up, down) weights, fused projections split."""
    family, mlp = retriever.family, mlps(retriever)[layer]
    up, down, gate = family.up(mlp).weight, family.down(mlp).weight, family.gate(mlp)
    if family.fused:
        first, second = up.chunk(2)
        return first, second, down
    return None if gate is None else gate.weight, up, down


def mlp_inputs(retriever: Retriever) -> dict[int, torch.Tensor]:
    """What enters every MLP, over all tokens of PAIRS one text at a time: layer -> (tokens, hidden)."""
    found: dict[int, list[torch.Tensor]] = {layer: [] for layer in mlps(retriever)}
    handles = [
        retriever.family.up(mlp).register_forward_pre_hook(
            lambda module, args, layer=layer: found[layer].append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for layer, mlp in mlps(retriever).items()
    ]
    vectors(retriever, [pair.query for pair in PAIRS], "query")
    vectors(retriever, [pair.positives[0] for pair in PAIRS])
    for handle in handles:
        handle.remove()
    return {layer: torch.cat(parts) for layer, parts in found.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_activation_rankings(kind: str) -> None:
    retriever = load_retriever(f"random:{kind}")
    act = activation_function(retriever)
    plain, gated = (rank_neurons(retriever, method, PAIRS) for method in ("activation", "gate-activation"))
    for layer, inputs in mlp_inputs(retriever).items():
        gate, up, _ = projections(retriever, layer)
        bias = retriever.family.up(mlps(retriever)[layer]).bias
        upward = inputs @ up.T + (0 if bias is None else bias)
        activated = act(upward) if gate is None else act(inputs @ gate.T)
        passed = activated if gate is None else activated * upward
        np.testing.assert_allclose(
            plain[layer], activated.square().mean(0).sqrt().detach(), rtol=1e-4, atol=1e-6
        )
        np.testing.assert_allclose(
            gated[layer], passed.square().mean(0).sqrt().detach(), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("kind", KINDS)
def test_magnitude_is_the_norm_of_all_weights_of_a_neuron(kind: str) -> None:
    retriever = load_retriever(f"random:{kind}")
    scores = rank_neurons(retriever, "magnitude", [])
    for layer in mlps(retriever):
        gate, up, down = projections(retriever, layer)
        for neuron in (0, 77, 127):
            weights = [up[neuron], down[:, neuron]] + ([] if gate is None else [gate[neuron]])
            assert scores[layer][neuron] == pytest.approx(torch.cat(weights).norm().item(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_taylor_predicts_the_loss_of_a_slightly_closed_gate(kind: str) -> None:
    retriever = load_retriever(f"random:{kind}")
    scores = rank_neurons(retriever, "taylor", PAIRS)
    batch, config = pair_batch(retriever, PAIRS), SlimmingConfig(penalty=0.0)
    gates = {layer: gate.detach() for layer, gate in fresh_gates(retriever).items()}
    layer, step = 2, 0.02
    for neuron in np.argsort(-scores[layer])[:3]:
        losses = []
        for value in (1 - step, 1 + step):
            gates[layer][neuron] = value
            with torch.no_grad():
                losses.append(slimming_loss(retriever, batch, gates, config).item())
        gates[layer][neuron] = 1.0
        assert abs(losses[1] - losses[0]) / (2 * step) == pytest.approx(scores[layer][neuron], rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_slimming_loss_is_the_paper_s(kind: str) -> None:
    """InfoNCE with the down projections scaled by relu(z), plus lambda * sum sigmoid(beta |z|)."""
    retriever = load_retriever(f"random:{kind}")
    generator = torch.Generator().manual_seed(1)
    gates = {
        layer: (torch.randn(len(gate), generator=generator) * 0.5 + 0.8).requires_grad_()
        for layer, gate in fresh_gates(retriever).items()
    }
    config = SlimmingConfig(beta=5.0, penalty=1e-3)
    with frozen(retriever):
        loss = slimming_loss(retriever, pair_batch(retriever, PAIRS), gates, config)
        loss.backward()

    scaled = load_retriever(f"random:{kind}")
    for layer, mlp in mlps(scaled).items():
        scaled.family.down(mlp).weight.data *= gates[layer].detach().clamp(min=0)
    queries = vectors(scaled, [pair.query for pair in PAIRS], "query")
    documents = vectors(scaled, [pair.positives[0] for pair in PAIRS])
    contrast = -(queries @ documents.T / 0.02).log_softmax(1).diagonal().mean().item()
    values = torch.cat([gate.detach() for gate in gates.values()]).tolist()
    penalty = sum(1 / (1 + math.exp(-5.0 * abs(value))) for value in values)
    assert loss.item() == pytest.approx(contrast + 1e-3 * penalty, rel=1e-4)

    negative = gates[1].detach() < 0  # relu stops InfoNCE's gradient there: only the penalty's is left
    shut = gates[1].detach()[negative]
    sigmoid = torch.sigmoid(5.0 * shut.abs())
    expected = 1e-3 * 5.0 * sigmoid * (1 - sigmoid) * shut.sign()
    assert gates[1].grad is not None
    torch.testing.assert_close(gates[1].grad[negative], expected)


def test_the_gates_gradient_is_that_of_finite_differences() -> None:
    retriever = load_retriever("random:qwen3")
    retriever.model.double()
    batch, config = pair_batch(retriever, PAIRS), SlimmingConfig(penalty=1e-2)
    gates = fresh_gates(retriever)
    with frozen(retriever):
        slimming_loss(retriever, batch, gates, config).backward()
    closed = {layer: gate.detach().clone() for layer, gate in gates.items()}
    for layer, neuron in ((0, 5), (3, 100)):
        losses = []
        for value in (1 - 1e-3, 1 + 1e-3):
            closed[layer][neuron] = value
            with torch.no_grad():
                losses.append(slimming_loss(retriever, batch, closed, config).item())
        closed[layer][neuron] = 1.0
        assert gates[layer].grad is not None
        measured = (losses[1] - losses[0]) / 2e-3
        assert gates[layer].grad[neuron].item() == pytest.approx(measured, rel=2e-2, abs=1e-5)


def test_penalty_counts_every_gate() -> None:
    gates = {0: torch.tensor([0.0, 1.0]), 4: torch.tensor([-1.0])}
    one = 1 / (1 + math.exp(-5))
    assert sparsity_penalty(gates, beta=5.0).item() == pytest.approx(0.5 + one + one)


def test_training_the_gates_lowers_the_loss_and_follows_the_seed() -> None:
    retriever = load_retriever("random:llama")
    config = SlimmingConfig(steps=25, learning_rate=0.05, batch_size=4)
    first, again = train_gates(retriever, PAIRS, config), train_gates(retriever, PAIRS, config)
    assert first.losses == again.losses
    assert first.losses[-1] < 0.7 * first.losses[0]
    other = train_gates(retriever, PAIRS * 2, config.model_copy(update={"seed": 1}))
    assert other.losses != first.losses
    assert all((scores >= 0).all() and scores.std() > 0 for scores in first.scores().values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_ranking_leaves_the_model_bit_for_bit(kind: str, method: str) -> None:
    retriever = load_retriever(f"random:{kind}")
    retriever.model.train()
    next(retriever.model.parameters()).requires_grad_(False)
    flags = [parameter.requires_grad for parameter in retriever.model.parameters()]
    before, embedded = state(retriever), vectors(retriever, TEXTS)
    scores = rank_neurons(retriever, method, PAIRS, steps=3, batch_size=4)
    assert {layer: values.shape for layer, values in scores.items()} == dict.fromkeys(range(4), (128,))
    assert all(np.isfinite(values).all() and values.std() > 0 for values in scores.values())
    after = state(retriever)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(vectors(retriever, TEXTS), embedded)
    assert [parameter.requires_grad for parameter in retriever.model.parameters()] == flags
    assert retriever.model.training
    assert all(parameter.grad is None for parameter in retriever.model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_sorted_neurons_make_every_width_a_prefix(kind: str) -> None:
    original, sorted_model = load_retriever(f"random:{kind}"), load_retriever(f"random:{kind}")
    scores = rank_neurons(original, "random", [], seed=9)
    orders = sort_neurons(sorted_model, scores)
    torch.testing.assert_close(vectors(sorted_model, TEXTS), vectors(original, TEXTS), atol=2e-6, rtol=0)
    for layer in range(4):
        for old, new in zip(projections(original, layer), projections(sorted_model, layer), strict=True):
            if old is not None:
                moved = old[orders[layer]] if old.shape[0] == 128 else old[:, orders[layer]]
                assert torch.equal(moved, new)
    for width in (24, 96):
        kept = {layer: tuple(sorted(orders[layer][:width].tolist())) for layer in range(4)}
        chosen = Plan(layers=tuple(LayerPlan(neurons=kept[layer]) for layer in range(4)))
        prefix = Plan(layers=(LayerPlan(neurons=tuple(range(width))),) * 4)
        pruned = apply_plan(load_retriever(f"random:{kind}"), chosen)
        sliced = load_retriever(f"random:{kind}")
        sort_neurons(sliced, scores)
        apply_plan(sliced, prefix)
        torch.testing.assert_close(vectors(sliced, TEXTS), vectors(pruned, TEXTS), atol=2e-6, rtol=0)


def test_sorting_refuses_what_it_cannot_do() -> None:
    retriever = load_retriever("random:llama")
    scores = rank_neurons(retriever, "magnitude", [])
    with pytest.raises(InputError, match="layer 3 has 128 neurons; found 0 scores"):
        sort_neurons(retriever, {layer: scores[layer] for layer in range(3)})
    apply_plan(retriever, Plan(layers=(LayerPlan(neurons=tuple(range(64))),) * 4))
    with pytest.raises(InputError, match="narrowed already"):
        sort_neurons(retriever, scores)


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(InputError, match="expected one of self-slimming, magnitude"):
        rank_neurons(load_retriever("random:llama"), "slimming", PAIRS)  # type: ignore[arg-type]  # the point


def test_dropped_mlps_have_no_neurons_to_rank() -> None:
    retriever = load_retriever("random:gemma2")
    layers = (
        LayerPlan(),
        LayerPlan(mlp=False),
        LayerPlan(attention=False),
        LayerPlan(attention=False, mlp=False),
    )
    apply_plan(retriever, Plan(layers=layers))
    for method in METHODS:
        assert set(rank_neurons(retriever, method, PAIRS, steps=2)) == {0, 2}
