"""Budgets: the best of all choices, exact costs, and schedules that are what was chosen."""

import itertools
import math

import numpy as np
import pytest

from effir_ray.compression.budget import (
    LayerOption,
    Replacements,
    choose_within,
    layer_options,
    option_costs,
    solve,
    to_schedule,
)
from effir_ray.compression.pipeline import check_room, compress, depth_plan
from effir_ray.compression.planning import sized_plan
from effir_ray.compression.schedule import Schedule
from effir_ray.errors import InputError
from effir_ray.models.accounting import count_block_parameters, flops
from effir_ray.models.loading import load_config
from effir_ray.models.plan import LayerPlan, Plan


def brute_force(losses: list[list[float]], costs: list[list[int]], budget: int) -> float:
    """The least total loss of all choices within the budget; infinite where there is none."""
    places = itertools.product(*(range(len(layer)) for layer in losses))
    return min(
        (
            sum(layer[place] for layer, place in zip(losses, chosen, strict=True))
            for chosen in places
            if sum(layer[place] for layer, place in zip(costs, chosen, strict=True)) <= budget
        ),
        default=math.inf,
    )


@pytest.mark.parametrize("unit", [1, 7, 10**6, 10**11 + 7])
def test_no_choice_within_the_budget_loses_less(unit: int) -> None:
    """Of parameters and of FLOPs, also where costs differ by one and losses by little."""
    random = np.random.default_rng(0)
    for _ in range(40):
        sizes = random.integers(1, 6, size=random.integers(1, 6)).tolist()
        close = random.random() < 0.5
        losses = [(random.random(size) * 10.0 ** random.integers(-6, 1)).tolist() for size in sizes]
        costs = [
            (unit * random.integers(0, 3 if close else 50, size) + random.integers(0, 3, size)).tolist()
            for size in sizes
        ]
        least, most = sum(map(min, costs)), sum(map(max, costs))
        for budget in {least, (least + most) // 2, int(random.integers(least, most + 1)), most}:
            chosen = solve(losses, costs, budget)
            assert sum(layer[place] for layer, place in zip(costs, chosen, strict=True)) <= budget
            found = sum(layer[place] for layer, place in zip(losses, chosen, strict=True))
            assert found == pytest.approx(brute_force(losses, costs, budget), rel=1e-9, abs=1e-12)


def test_losses_that_differ_by_less_than_the_solvers_gap_are_told_apart() -> None:
    losses = [[1e-9, 0.0, 3e-9], [2e-9, 1e-9, 0.0], [0.0, 5e-10, 1e-9]]
    assert solve(losses, [[1, 1, 1]] * 3, 3) == (1, 2, 0)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_large_model_is_solved_and_its_budget_kept_to_the_last_parameter(seed: int) -> None:
    """32 layers, nine widths with attention and without. Of seed 1, what HiGHS first takes for a choice that
    the budget allows is a few parameters above it."""
    random = np.random.default_rng(seed)
    costs = [
        [58_000_000 * a + 176_000_000 * w // 8 + int(random.integers(9)) for a in (1, 0) for w in range(9)]
        for _ in range(32)
    ]
    losses = [(1e-2 * random.random(18)).tolist() for _ in range(32)]
    budget = sum(map(max, costs)) // 2
    chosen = solve(losses, costs, budget)
    assert 0.99 * budget < sum(layer[place] for layer, place in zip(costs, chosen, strict=True)) <= budget


@pytest.mark.parametrize(
    ("losses", "costs", "budget", "message"),
    [
        ([[0.1, 0.2], [0.3]], [[5000, 10], [7]], 16, "a budget of 16 is less .* costs; expected 17 or more"),
        ([[0.1, 0.2]], [[5]], 16, "every option one loss and one cost"),
        ([[0.1], []], [[5], []], 16, "every layer needs options"),
        ([], [], 16, "every layer needs options"),
        ([[math.nan, 0.2]], [[5, 1]], 16, "not all finite"),
    ],
)
def test_what_cannot_be_solved(
    losses: list[list[float]], costs: list[list[int]], budget: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        solve(losses, costs, budget)


def test_a_layer_may_be_what_is_left_of_it_and_less() -> None:
    config = load_config("random:llama")
    layers = (
        LayerPlan(),
        LayerPlan(attention=False),
        LayerPlan(mlp=False),
        LayerPlan(neurons=tuple(range(24))),
    )
    plan = Plan(layers=layers)
    options = layer_options(config, plan, (0.5, 0.0, 0.01))
    assert [[(option.attention, option.width) for option in layer] for layer in options] == [
        [(True, 128), (True, 64), (True, 8), (True, 0), (False, 128), (False, 64), (False, 8), (False, 0)],
        [(False, 128), (False, 64), (False, 8), (False, 0)],
        [(True, 0), (False, 0)],
        [(True, 24), (True, 16), (True, 8), (True, 0), (False, 24), (False, 16), (False, 8), (False, 0)],
    ]
    kept = layer_options(config, plan, (0.5,), attention=False)
    assert [len(layer) for layer in kept] == [2, 2, 1, 2]
    assert layer_options(config, plan, (0.4,), multiple=32)[0][1].width == 64
    with pytest.raises(InputError, match=r"level 1\.5 of a width; expected shares"):
        layer_options(config, plan, (1.5,))


@pytest.mark.parametrize("kind", ["llama", "bert", "modernbert", "gemma3"])
def test_costs_of_layers_are_those_of_the_model(kind: str) -> None:
    """To the last parameter and FLOP, also where layers have windows."""
    config = load_config(f"random:{kind}")
    options = layer_options(config, Plan.full(4))
    random = np.random.default_rng(2)
    parameters, work = option_costs(config, options), option_costs(config, options, tokens=300)
    for _ in range(20):
        places = [int(random.integers(len(layer))) for layer in options]
        chosen = [layer[place] for layer, place in zip(options, places, strict=True)]
        schedule = to_schedule(config, Plan.full(4), chosen)
        plan = depth_plan(schedule, Plan.full(4), None)
        if any(option.width for option in chosen):
            plan = sized_plan(config, plan, schedule)
        total = sum(layer[place] for layer, place in zip(parameters, places, strict=True))
        assert total == count_block_parameters(config, plan)
        total = sum(layer[place] for layer, place in zip(work, places, strict=True))
        assert total == flops(config, plan, 300)


def measured(plan: Plan, seed: int = 0) -> Replacements:
    """Random losses, more of them where more goes."""
    random = np.random.default_rng(seed)
    options = layer_options(load_config("random:llama"), plan)
    losses = tuple(
        tuple(float(random.random() * (2 - option.attention - option.width / 128)) for option in layer)
        for layer in options
    )
    return Replacements(plan=plan, loss=0.25, options=options, losses=losses)


@pytest.mark.parametrize("tokens", [None, 64])
def test_every_budget_has_a_schedule_that_keeps_it(tokens: int | None) -> None:
    config = load_config("random:llama")
    plan = Plan(layers=(LayerPlan(), LayerPlan(attention=False), LayerPlan(mlp=False), LayerPlan()))
    fractions = [round(0.95 - 0.04 * step, 2) for step in range(22)]
    like = Schedule(width_method="magnitude", vocabulary=300)
    found = choose_within(config, measured(plan), fractions, tokens=tokens, like=like)
    assert [choice.fraction for choice in found] == fractions
    full = Plan.full(4)
    whole = count_block_parameters(config, full) if tokens is None else flops(config, full, tokens)
    for choice in found:
        schedule = choice.schedule
        check_room(schedule, config, full)
        cut = sized_plan(config, depth_plan(schedule, full, None), schedule)
        size = count_block_parameters(config, cut) if tokens is None else flops(config, cut, tokens)
        assert choice.cost == size <= round(choice.fraction * whole)
        assert not cut.layers[1].attention and not cut.layers[2].mlp
        assert (schedule.width_method, schedule.vocabulary, schedule.width_reduction) == ("magnitude", 300, 0)
    losses = [choice.loss for choice in found]
    assert losses == sorted(losses) and losses[0] > 0.25, "less costs more"
    assert len({choice.schedule.name for choice in found}) >= 8


def test_budgets_that_nothing_is_cheap_enough_for_are_left_out() -> None:
    config, plan = load_config("random:llama"), Plan.full(4)
    options = layer_options(config, plan, (0.5,), attention=False)
    losses = tuple((0.0, 1.0) for _ in options)
    found = Replacements(plan=plan, loss=0.0, options=options, losses=losses)
    least = 1 - 0.5 * 3 * 64 * 128 * 4 / count_block_parameters(config, plan)
    choices = choose_within(config, found, [0.2, least, 1.0])
    assert [choice.schedule.name for choice in choices] == ["w[64x4]", "full"]
    with pytest.raises(InputError, match=rf"the cheapest has {least:.4f} of the full blocks"):
        choose_within(config, found, [0.2])


def test_a_schedule_names_what_was_chosen() -> None:
    config = load_config("random:llama")
    chosen = [
        LayerOption(attention=True, width=128),
        LayerOption(attention=False, width=64),
        LayerOption(attention=True, width=0),
        LayerOption(attention=False, width=0),
    ]
    schedule = to_schedule(config, Plan.full(4), chosen, like=Schedule(drop_block=1, width_reduction=0.5))
    assert schedule == Schedule(
        drop_attention=(1,), drop_mlp=(2,), drop_block=(3,), layer_widths=(128, 64, 0, 0)
    )
    made = compress("random:llama", schedule, None)
    assert made.plan is not None
    assert [(layer.attention, layer.mlp) for layer in made.plan.layers] == [
        (True, True),
        (False, True),
        (True, False),
        (False, False),
    ]
    whole = [LayerOption(attention=layer != 1, width=128 * (layer != 2)) for layer in range(4)]
    assert to_schedule(config, Plan.full(4), whole) == Schedule(drop_attention=(1,), drop_mlp=(2,))
    assert to_schedule(config, Plan.full(4), [LayerOption(attention=True, width=128)] * 4) == Schedule()


def test_every_option_has_one_loss() -> None:
    found = measured(Plan.full(4))
    assert Replacements.model_validate_json(found.model_dump_json()) == found
    for losses in (found.losses[:3], (*found.losses[:3], (0.0,))):
        with pytest.raises(ValueError, match=r"one number of layers|one loss"):
            Replacements(plan=found.plan, loss=0.0, options=found.options, losses=losses)
