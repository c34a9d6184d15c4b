"""Losses of options, measured by masks, are those of models that are really cut."""

import itertools

import numpy as np
import pytest
import torch

from effir_ray.compression.budget import LayerOption, choose_within, layer_options, option_costs, to_schedule
from effir_ray.compression.pipeline import depth_plan
from effir_ray.compression.planning import narrow_plan
from effir_ray.compression.replacements import measure_replacements
from effir_ray.compression.surgery import apply_plan
from effir_ray.compression.width.reduction import rank_neurons
from effir_ray.errors import InputError
from effir_ray.models.plan import LayerPlan, Plan
from effir_ray.models.retriever import Retriever, load_retriever
from tests.helpers.compression_examples import QUERIES, TEXTS, vectors

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "bert", "modernbert"]
LEVELS = (0.5, 0.125, 0.0)


def moved(full: Retriever, small: Retriever) -> float:
    """Mean of 1 - cos over texts and queries, one text at a time."""
    distances = [
        1 - torch.cosine_similarity(vectors(full, texts, kind), vectors(small, texts, kind))
        for texts, kind in ((TEXTS, "document"), (QUERIES, "query"))
    ]
    return torch.cat(distances).mean().item()


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize("kind", FAMILIES)
def test_losses_are_those_of_models_that_are_cut(kind: str, gone: bool) -> None:
    """One layer at a time, in the whole model or in what depth left of it."""
    name = f"random:{kind}"
    full = load_retriever(name)
    plan = Plan.full(4)
    if gone:
        plan = Plan(
            layers=(LayerPlan(), LayerPlan(attention=False, mlp=False), LayerPlan(mlp=False), LayerPlan())
        )
    scores = rank_neurons(full, "random", (), seed=3)
    options = layer_options(full.model.config, plan, LEVELS)
    before = {key: value.clone() for key, value in full.model.state_dict().items()}
    found = measure_replacements(full, TEXTS, options, scores, plan=plan, queries=QUERIES, token_budget=40)
    assert all(torch.equal(before[key], value) for key, value in full.model.state_dict().items())
    assert (found.plan, found.options) == (plan, options)
    for layer, choices in enumerate(options):
        assert len({round(loss, 7) for loss in found.losses[layer]}) == len(choices), "all differ"
        assert found.losses[layer][0] == 0
        for option, loss in zip(choices, found.losses[layer], strict=True):
            chosen = [each[0] for each in options]  # the first one is as it is
            chosen[layer] = option
            schedule = to_schedule(full.model.config, plan, chosen)
            cut = narrow_plan(depth_plan(schedule, Plan.full(4), None), schedule, scores)
            small = apply_plan(load_retriever(name), cut)
            assert found.loss + loss == pytest.approx(moved(full, small), abs=2e-6), (layer, option)


def test_the_batches_make_no_difference_and_what_is_as_it_was_loses_nothing() -> None:
    full = load_retriever("random:llama")
    options = layer_options(full.model.config, Plan.full(4), LEVELS)
    scores = rank_neurons(full, "magnitude", ())
    one, many = (
        measure_replacements(full, TEXTS, options, scores, token_budget=budget) for budget in (4096, 1)
    )
    for layer, others in zip(one.losses, many.losses, strict=True):
        np.testing.assert_allclose(layer, others, atol=2e-6)
        assert layer[0] == 0 < min(layer[1:])
    assert abs(one.loss) < 1e-6


def test_what_a_compressed_model_has_left_is_replaced_by_less_of_it() -> None:
    full = load_retriever("random:bert")
    layers = (LayerPlan(neurons=tuple(range(0, 128, 2))), LayerPlan(mlp=False), LayerPlan(), LayerPlan())
    full = apply_plan(full, Plan(layers=layers))
    options = layer_options(full.model.config, full.plan, (0.5,), attention=False)
    assert [len(choices) for choices in options] == [2, 1, 2, 2]
    scores = {layer: np.arange(size) for layer, size in ((0, 64), (2, 128), (3, 128))}
    found = measure_replacements(full, TEXTS, options, scores, queries=QUERIES)
    narrower = full.plan.layers[0].model_copy(update={"neurons": tuple(range(64, 128, 2))})
    cut = Plan(layers=(narrower, *full.plan.layers[1:]))
    small = apply_plan(apply_plan(load_retriever("random:bert"), full.plan), cut)
    assert found.losses[0][1] == pytest.approx(moved(full, small), abs=2e-6)


def test_the_best_choice_is_that_of_the_least_sum_of_what_was_measured() -> None:
    """From measuring to a schedule, beside all choices of as many parameters at most."""
    full = load_retriever("random:qwen3")
    config = full.model.config
    options = layer_options(config, Plan.full(4), (0.5, 0.0), attention=False)
    measured = measure_replacements(full, TEXTS, options, rank_neurons(full, "magnitude", ()))
    costs = option_costs(config, options)
    budget = round(0.7 * sum(layer[0] for layer in costs))
    layers = [list(zip(*layer, strict=True)) for layer in zip(options, measured.losses, costs, strict=True)]
    best = min(
        (chosen for chosen in itertools.product(*layers) if sum(cost for _, _, cost in chosen) <= budget),
        key=lambda chosen: sum(loss for _, loss, _ in chosen),
    )
    (choice,) = choose_within(config, measured, [0.7])
    assert choice.schedule == to_schedule(config, Plan.full(4), [option for option, _, _ in best])
    assert choice.loss == pytest.approx(measured.loss + sum(loss for _, loss, _ in best))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": []}, "needs calibration texts; found none"),
        ({"neuron_scores": {}}, "layer 0 has 128 neurons; found 0 neuron scores"),
        ({"neuron_scores": dict.fromkeys(range(4), np.ones(64))}, "found 64 neuron scores"),
        (
            {"options": ((LayerOption(attention=True, width=128),),)},
            "options are of 1 layers; the model has 4",
        ),
        (
            {"options": ((LayerOption(attention=True, width=136),),) * 4},
            "an option of layer 0 has attention, 136 neurons; the plan attention, 128",
        ),
        (
            {"plan": Plan(layers=(LayerPlan(attention=False), *Plan.full(3).layers))},
            "an option of layer 0 has attention, 128 neurons; the plan 128",
        ),
        (
            {"plan": Plan(layers=(LayerPlan(neurons=(1, 2)), *Plan.full(3).layers))},
            "the plan narrows layer 0; expected one of depth",
        ),
    ],
)
def test_what_does_not_fit_the_model(change: dict[str, object], message: str) -> None:
    full = load_retriever("random:llama")
    given = {
        "texts": TEXTS,
        "options": layer_options(full.model.config, Plan.full(4), (0.5,)),
        "neuron_scores": dict.fromkeys(range(4), np.ones(128)),
    }
    with pytest.raises(InputError, match=message):
        measure_replacements(full, **given | change)  # type: ignore[arg-type]  # one of them is wrong
