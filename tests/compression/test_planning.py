"""Plans from schedules: what goes, in which order, and that width targets are met exactly."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effir_ray.compression.planning import (
    ImportanceScores,
    grain,
    make_plan,
    narrow_plan,
    needs_scores,
    sized_plan,
    within,
)
from effir_ray.compression.schedule import Schedule
from effir_ray.compression.surgery import apply_plan
from effir_ray.errors import InputError
from effir_ray.models.accounting import count_parameters
from effir_ray.models.loading import load_config
from effir_ray.models.plan import LayerPlan, Plan
from effir_ray.models.retriever import load_retriever

SCORES = ImportanceScores(
    criterion="cosine", attention=(0.9, 0.1, 0.5, 0.3), mlp=(0.2, 0.8, 0.1, 0.7), block=(0.4, 0.3, 0.2, 0.1)
)


def dropped(plan: Plan) -> tuple[list[int], list[int]]:
    layers = list(enumerate(plan.layers))
    return [i for i, layer in layers if not layer.attention], [i for i, layer in layers if not layer.mlp]


@pytest.mark.parametrize(
    ("schedule", "attention", "mlp"),
    [
        (Schedule(), [], []),
        (Schedule(drop_attention=2), [1, 3], []),
        (Schedule(drop_mlp=2), [], [0, 2]),
        (Schedule(drop_mlp=1, drop_attention=1), [1], [2]),
        (Schedule(drop_block=2), [2, 3], [2, 3]),
        (Schedule(drop_last_blocks=3), [1, 2, 3], [1, 2, 3]),
        (Schedule(drop_last_blocks=1, drop_block=1), [2, 3], [2, 3]),
        (Schedule(drop_block=(0,), drop_mlp=2), [0], [0, 2, 3]),
        (Schedule(drop_block=(1,), drop_attention=1), [1, 3], [1]),
        (Schedule(drop_attention=(0, 2), drop_mlp=(3,)), [0, 2], [3]),
    ],
)
def test_what_a_schedule_drops(schedule: Schedule, attention: list[int], mlp: list[int]) -> None:
    assert dropped(make_plan(schedule, 4, SCORES)) == (attention, mlp)


def test_of_equals_the_later_layer_goes() -> None:
    flat = ImportanceScores(criterion="random", attention=(1.0,) * 4, mlp=(1.0,) * 4, block=(1.0,) * 4)
    assert dropped(make_plan(Schedule(drop_mlp=2), 4, flat))[1] == [2, 3]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (Schedule(drop_mlp=5), "only 4 of 4 layers"),
        (Schedule(drop_last_blocks=5), "the backbone has 4 blocks"),
        (Schedule(drop_last_blocks=2, drop_attention=3), "only 2 of 4 layers"),
        (Schedule(drop_mlp=(4,)), "layers 0 to 3"),
        (Schedule(drop_block=(1,), drop_mlp=(1,)), "dropped already"),
    ],
)
def test_dropping_more_than_there_is(schedule: Schedule, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_plan(schedule, 4, SCORES)


def test_counts_need_scores_and_indices_do_not() -> None:
    assert needs_scores(Schedule(drop_mlp=1))
    assert not needs_scores(Schedule(drop_mlp=(1,), drop_last_blocks=2))
    with pytest.raises(InputError, match="needs importance scores"):
        make_plan(Schedule(drop_mlp=1), 4, None)
    with pytest.raises(InputError, match="for 4 layers; the backbone has 5"):
        make_plan(Schedule(drop_mlp=1), 5, SCORES)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    reduction=st.floats(0.01, 0.9),
    multiple=st.sampled_from([1, 2, 8, 16]),
    kept=st.sets(st.integers(0, 5), min_size=1),
    seed=st.integers(0, 1000),
)
def test_the_width_target_is_met_exactly(reduction: float, multiple: int, kept: set[int], seed: int) -> None:
    random, width = np.random.default_rng(seed), 64
    plan = Plan(layers=tuple(LayerPlan(mlp=layer in kept) for layer in range(6)))
    scores = {layer: random.random(width) * 10.0 ** random.integers(-3, 3) for layer in kept}
    schedule = Schedule(width_reduction=reduction, width_multiple=multiple)
    target = round(len(kept) * width * (1 - reduction) / multiple) * multiple
    if target < multiple * len(kept):
        with pytest.raises(InputError, match="lower width_reduction"):
            narrow_plan(plan, schedule, scores)
        return
    narrowed = narrow_plan(plan, schedule, scores)
    widths = []
    for layer in kept:
        neurons = narrowed.layers[layer].neurons
        chosen = np.arange(width) if neurons is None else np.array(neurons)
        widths.append(len(chosen))
        assert len(chosen) % multiple == 0
        assert len(chosen) >= multiple
        gone = np.setdiff1d(np.arange(width), chosen)
        assert not len(gone) or scores[layer][chosen].min() >= scores[layer][gone].max()
    assert sum(widths) == target


def test_with_multiple_one_the_ranking_is_the_papers() -> None:
    """Globally the lowest scores go, wherever they are (section 3.2)."""
    random = np.random.default_rng(0)
    scores = {0: random.random(64), 1: random.random(64) + 0.3}
    plan = narrow_plan(Plan.full(2), Schedule(width_reduction=0.25, width_multiple=1), scores)
    threshold = np.sort(np.concatenate(list(scores.values())))[32]
    for layer, values in scores.items():
        assert plan.layers[layer].neurons == tuple(np.flatnonzero(values >= threshold))


def widths(plan: Plan, full: int) -> list[int]:
    return [full if layer.neurons is None else len(layer.neurons) for layer in plan.layers]


def test_equal_scores_narrow_all_layers_alike() -> None:
    schedule = Schedule(width_reduction=0.3)
    equal = narrow_plan(Plan.full(4), schedule, {layer: np.full(1536, 0.1) for layer in range(4)})
    assert widths(equal, 1536) == [1080, 1080, 1072, 1072]
    scores = {layer: np.ones(64) for layer in range(3)}
    scores[0] = np.r_[np.full(32, 2.0), np.ones(32)]  # what is clearly better stays; the rest is shared
    plan = narrow_plan(Plan.full(3), Schedule(width_reduction=0.5, width_multiple=8), scores)
    assert widths(plan, 64) == [48, 24, 24]


@pytest.mark.parametrize(
    ("schedule", "scores", "message"),
    [
        (Schedule(width_reduction=0.5), {0: np.ones(64)}, r"no neuron scores for layers \[1\]"),
        (
            Schedule(width_reduction=0.5, width_multiple=48),
            {0: np.ones(64), 1: np.ones(64)},
            "does not divide",
        ),
        (Schedule(width_reduction=0.5), {0: np.full(64, np.nan), 1: np.ones(64)}, "not all finite"),
    ],
)
def test_bad_neuron_scores(schedule: Schedule, scores: dict[int, np.ndarray], message: str) -> None:
    with pytest.raises(InputError, match=message):
        narrow_plan(Plan.full(2), schedule, scores)


@pytest.mark.parametrize(
    ("multiple", "widths", "expected"),
    [
        (None, [14336, 14336], 64),
        (None, [14336, 4104], 8),  # 64 does not divide it
        (None, [1536, 1536], 8),
        (None, [14336, 1536], 8),
        (16, [14336], 16),
    ],
)
def test_widths_suit_the_size_of_the_model(multiple: int | None, widths: list[int], expected: int) -> None:
    assert grain(multiple, widths) == expected


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (Schedule(width_reduction=0.5), "width_reduction is 0.5 but the schedule drops every MLP"),
        (Schedule(layer_widths=(0,)), "there are layer_widths but the schedule drops every MLP"),
    ],
)
def test_width_without_any_mlp(schedule: Schedule, message: str) -> None:
    plan = Plan(layers=(LayerPlan(mlp=False),))
    with pytest.raises(InputError, match=message):
        narrow_plan(plan, schedule, {})


def test_every_layer_keeps_its_best_neurons_to_the_width_given_for_it() -> None:
    random = np.random.default_rng(0)
    plan = Plan(layers=(LayerPlan(), LayerPlan(mlp=False), LayerPlan(attention=False), LayerPlan()))
    scores = {0: random.random(64), 2: 100 * random.random(64), 3: random.random(60)}
    schedule = Schedule(drop_mlp=(1,), drop_attention=1, layer_widths=(16, 0, 8, 60))
    narrowed = narrow_plan(plan, schedule, scores)
    assert [layer.attention for layer in narrowed.layers] == [True, True, False, True]
    for layer, size in ((0, 16), (2, 8)):
        best = sorted(np.argsort(-scores[layer])[:size].tolist())
        assert narrowed.layers[layer].neurons == tuple(best)
    assert narrowed.layers[1] == plan.layers[1]
    assert narrowed.layers[3] == plan.layers[3], "its present width leaves it, whatever the multiple"
    left = Plan(layers=(LayerPlan(neurons=tuple(range(0, 64, 2))),))
    again = narrow_plan(left, Schedule(layer_widths=(8,)), {0: np.arange(32)})
    assert again.layers[0].neurons == tuple(range(48, 64, 2)), "of the neurons that are left"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer_widths": (64, 64)}, "layer_widths has 2 widths; the backbone has 3 layers"),
        ({"layer_widths": (64, 0, 72)}, "is 72 for layer 2, whose MLP has 64 neurons; expected no more"),
        ({"layer_widths": (64, 8, 64)}, "is 8 for layer 1, which has no MLP; expected 0"),
        (
            {"layer_widths": (0, 0, 64)},
            "is 0 for layer 0, whose MLP stays; name the layer in drop_mlp, or keep 8",
        ),
        (
            {"layer_widths": (64, 0, 12)},
            r"is 12 for layer 2; expected a multiple of 8 \(see width_multiple\), or 64",
        ),
        ({"layer_widths": (24, 0, 64), "width_multiple": 16}, "is 24 for layer 0; expected a multiple of 16"),
        (
            {"layer_widths": (64, 0, 64), "drop_mlp": 1},
            "drop_mlp only how many lose theirs: name the layers there",
        ),
        ({"layer_widths": (64, 0, 64), "drop_block": 1}, "drop_block only how many"),
    ],
)
def test_widths_that_do_not_fit_the_backbone(settings: dict[str, object], message: str) -> None:
    plan = Plan(layers=(LayerPlan(), LayerPlan(mlp=False), LayerPlan()))
    with pytest.raises(InputError, match=message):
        narrow_plan(plan, Schedule(**settings), {0: np.ones(64), 2: np.ones(64)})


def test_sizes_are_counted_layer_by_layer() -> None:
    config, schedule = load_config("random:modernbert"), Schedule(layer_widths=(8, 128, 64, 128))
    sized = sized_plan(config, Plan.full(4), schedule)
    assert widths(sized, 128) == [8, 128, 64, 128]
    retriever = apply_plan(load_retriever("random:modernbert"), sized)
    assert count_parameters(config, sized) == sum(p.numel() for p in retriever.model.parameters())
    assert sized_plan(config, Plan.full(4), Schedule(drop_mlp=1)) == Plan.full(4)


def test_narrowing_what_is_narrow_already() -> None:
    """Scores then are those of the neurons that are left; the plan keeps the backbone's numbers."""
    plan = Plan(layers=(LayerPlan(neurons=tuple(range(0, 64, 2))),))
    narrower = narrow_plan(plan, Schedule(width_reduction=0.5), {0: np.arange(32)})
    assert narrower.layers[0].neurons == tuple(range(32, 64, 2))
    with pytest.raises(InputError, match="64 neuron scores; the plan keeps 32"):
        narrow_plan(plan, Schedule(width_reduction=0.5), {0: np.arange(64)})


def test_a_plan_within_what_is_left() -> None:
    present = Plan(layers=(LayerPlan(attention=False, neurons=(1, 2, 3)), LayerPlan(mlp=False), LayerPlan()))
    asked = Plan(layers=(LayerPlan(neurons=(2, 3, 4)), LayerPlan(), LayerPlan(mlp=False)))
    assert within(asked, present).layers == (
        LayerPlan(attention=False, neurons=(2, 3)),
        LayerPlan(mlp=False),
        LayerPlan(mlp=False),
    )
    assert within(Plan.full(3), present) == present
