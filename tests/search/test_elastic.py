"""One training for all trials: its networks, what trials take from it, and which of them train on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from effir_ray.compression.budget import Replacements, layer_options, option_costs
from effir_ray.compression.pipeline import compress
from effir_ray.compression.planning import ImportanceScores, make_plan, sized_plan
from effir_ray.compression.schedule import Schedule
from effir_ray.errors import InputError
from effir_ray.models.accounting import count_block_parameters
from effir_ray.models.plan import LayerPlan, Plan
from effir_ray.models.retriever import load_retriever
from effir_ray.results import store
from effir_ray.search.candidates import Candidate
from effir_ray.search.dry_run import dry_run, load_backbones, named_sources
from effir_ray.search.elastic import networks, removes, smallest
from effir_ray.search.model_stages import CHECKPOINT, read_plan
from effir_ray.search.proposals import Proposals
from effir_ray.search.shapes import best_shapes
from effir_ray.search.space import SearchSpace
from effir_ray.search.study import search
from effir_ray.search.trial_config import TrialConfig
from effir_ray.search.trial_stages import trial_stages
from effir_ray.training.config import TrainConfig
from effir_ray.training.run.launcher import train
from effir_ray.training.step.ladder import Rung, check_ladder
from tests.helpers.search_examples import small_space
from tests.helpers.studies_in_parts import SCHEDULES, halving_space, names, proposals, run

SCORES = ImportanceScores(
    criterion="pooled",
    attention=(0.9, 0.2, 0.3, 0.1, 0.8, 0.7),
    mlp=(0.9, 0.8, 0.1, 0.3, 0.2, 0.7),
    block=(0.9, 0.1, 0.3, 0.2, 0.8, 0.7),
    best={"block": ((2,), (1, 3), (1, 2, 3))},
)


def elastic_space(**changes: Any) -> SearchSpace:
    return halving_space(**{"strategy": "elastic", **changes})


def test_networks_lie_between_the_full_model_and_the_smallest() -> None:
    least = Schedule(drop_block=3, drop_mlp=1, width_reduction=0.6, importance="pooled")
    found = networks(least, Plan.full(6), SCORES)
    assert check_ladder(found) == found and len(found) == 4 * 4 - 1
    assert found[-1] == Rung(drop_attention=(1, 2, 3), drop_mlp=(1, 2, 3, 4), width=0.4)
    depths = sorted({rung.drop_mlp for rung in found}, key=len)
    assert depths == [(), (1,), (1, 3, 4), (1, 2, 3, 4)], "the least important of the best three first"
    assert {round(rung.width, 6) for rung in found if not rung.drop_mlp} == {0.8, 0.6, 0.4}
    for deep, deeper in pairwise(depths):
        assert set(deep) < set(deeper)


def test_depth_or_width_alone_make_networks_of_it() -> None:
    deep = networks(Schedule(drop_attention=2), Plan.full(6), SCORES)
    assert [rung.drop_attention for rung in deep] == [(3,), (1, 3)] and {rung.width for rung in deep} == {1.0}
    wide = networks(Schedule(width_reduction=0.75), Plan.full(6), None)
    assert [rung.width for rung in wide] == [0.75, 0.5, 0.25]


def test_the_last_blocks_go_from_the_end() -> None:
    found = networks(Schedule(drop_last_blocks=3), Plan.full(6), None)
    assert [rung.drop_mlp for rung in found] == [(5,), (4, 5), (3, 4, 5)]
    mixed = networks(Schedule(drop_last_blocks=1, drop_block=2), Plan.full(6), SCORES)
    assert [rung.drop_mlp for rung in mixed] == [(5,), (1, 5), (1, 3, 5)]


def test_what_is_gone_is_not_dropped_again_and_one_block_stays() -> None:
    gone = LayerPlan(attention=False, mlp=False)
    present = Plan(layers=(LayerPlan(), gone, LayerPlan(attention=False), LayerPlan(), LayerPlan(), gone))
    least = Schedule(drop_block=60, drop_mlp=60, width_reduction=0.5, importance="cosine")
    found = networks(least, present, SCORES.model_copy(update={"best": {}}))
    assert check_ladder(found) == found
    assert not {1, 5} & {*found[-1].drop_mlp, *found[-1].drop_attention} and 2 not in found[-1].drop_attention
    assert len({0, 2, 3, 4} - set(found[-1].drop_mlp)) == 1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, Schedule(drop_mlp=2, importance="pooled")),
        (
            {
                "schedules": [
                    {"drop_last_blocks": 1, "drop_block": 1, "importance": "cosine", "recover": True},
                    {"drop_attention": 3, "width_reduction": 0.25, "width_method": "taylor", "recover": True},
                    {"drop_mlp": 3, "importance": "random", "vocabulary": 100},
                ]
            },
            Schedule(
                drop_last_blocks=1,
                drop_block=1,
                drop_attention=3,
                width_reduction=0.25,
                width_method="taylor",
            ),
        ),
        (
            {
                "schedules": [],
                "trials": 3,
                "parameters": {
                    "drop_block": {"low": 0, "high": 2},
                    "width_reduction": {"low": 0.0, "high": 0.5},
                    "importance": ["pooled"],
                    "width_method": ["magnitude"],
                    "recover": [True],
                },
            },
            Schedule(drop_block=2, width_reduction=0.5, importance="pooled", width_method="magnitude"),
        ),
        (
            {"schedules": [{"layer_widths": [128, 32, 64, 128], "width_method": "taylor", "recover": True}]},
            Schedule(width_reduction=0.75, importance="pooled", width_method="taylor"),
        ),
    ],
)
def test_the_smallest_network_removes_the_most_of_each(changes: dict[str, Any], expected: Schedule) -> None:
    space = elastic_space(**changes)
    sampled = space.parameters
    assert smallest(space.listed(), sampled) == expected
    trained = [space.trial(candidate) for candidate in space.listed() if candidate.recover]
    assert {config.elastic.smallest for config in trained if config.elastic} <= {expected}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedules": [{"drop_mlp": 1}]}, "no schedule that recovers drops or narrows"),
        ({"schedules": [{"vocabulary": 50, "recover": True}]}, "no schedule that recovers drops or narrows"),
        (
            {
                "schedules": [
                    {"drop_mlp": 1, "importance": one, "recover": True} for one in ("pooled", "random")
                ]
            },
            "one importance, not pooled and random",
        ),
        (
            {
                "schedules": [],
                "trials": 2,
                "parameters": {
                    "width_reduction": [0.5],
                    "width_method": ["taylor", "random"],
                    "recover": [True],
                },
            },
            "one width_method, not random and taylor",
        ),
        ({"recovery": None, "schedules": []}, "no 'recovery'"),
        ({"elastic": {"steps": 0}}, "greater than or equal to 1"),
        ({"elastic": {"rungs": 3}}, "rungs"),
        ({"elastic": {"shapes": 20}}, "elastic.shapes are of other widths"),
    ],
)
def test_what_cannot_be_trained_together_is_said(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        elastic_space(**changes)


def test_a_training_of_no_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="stop_after is 0"):
        train("random:llama", TrainConfig(dataset="stdlib", steps=3, stop_after=0), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_all_are_scored_without_training_and_the_better_ones_train_on(tmp_path: Path) -> None:
    study = proposals(elastic_space(), tmp_path)
    assert study.planned == 1 + 9 + 3 + 1
    asked = run(study)
    parts = names(asked)
    assert parts[0] == "full"
    assert [sum(name.endswith(end) for name in parts) for end in ("+el", "+el+ft@6", "+el+ft")] == [9, 3, 1]
    assert study.complete and study.planned == len(parts)
    entry = next(request.config for request in asked if request.config.name == "M[0]+el")
    assert [part.name for part in study.space.rungs(entry)] == ["M[0]+el", "M[0]+el+ft@6", "M[0]+el+ft"]
    assert TrialConfig.read(entry.model_dump_json(), "here").id == entry.id


@pytest.mark.parametrize("kill_at", [0, 5, 11, 14])
def test_a_resumed_study_does_every_part_once(tmp_path: Path, kill_at: int) -> None:
    undisturbed = run(proposals(elastic_space(), tmp_path / "a"))
    first = proposals(elastic_space(), tmp_path / "b")
    run(first, stop_after=kill_at)
    second = proposals(elastic_space(), tmp_path / "b", first.rows.values())
    run(second)
    assert second.complete
    assert sorted(second.rows) == sorted(request.key for request in undisturbed)


@pytest.mark.parametrize(
    ("before", "after"), [("halving", "elastic"), ("elastic", "halving"), ("elastic", "longer")]
)
def test_a_study_goes_on_by_another_strategy_beside_what_it_measured(
    tmp_path: Path, before: str, after: str
) -> None:
    """Their models are others, and both stand on the front."""
    spaces = {
        "halving": halving_space(),
        "elastic": elastic_space(),
        "longer": elastic_space(elastic={"steps": 40}),
    }
    first = proposals(spaces[before], tmp_path)
    run(first)
    second = proposals(spaces[after], tmp_path, first.rows.values())
    assert not second.complete
    parts = [request.config for request in run(second) if request.split == "dev"]
    assert len(parts) == 9 + 3 + 1 and second.complete
    assert {config.elastic is None for config in parts} == {after == "halving"}
    assert second.done("dev") == first.done("dev") + len(parts)


def test_neurons_of_narrowed_mlps_cannot_be_sorted(tmp_path: Path) -> None:
    """Said before anything runs; depth alone needs no order of neurons."""
    narrow = Schedule(width_reduction=0.5, width_method="magnitude")
    compress("random:llama", narrow, tmp_path / "narrow")
    deep = {"backbone": str(tmp_path / "narrow"), "schedules": [{"drop_mlp": [1], "recover": True}]}
    assert dry_run(elastic_space(**deep)).stages["elastic"] == 1
    wide = {**deep, "schedules": [{"width_reduction": 0.25, "recover": True}]}
    with pytest.raises(InputError, match="has narrowed MLPs, and strategy elastic sorts"):
        dry_run(elastic_space(**wide))


def test_what_a_solver_may_add_is_counted() -> None:
    """Also where no schedule leaves the widths alone: it measures at their depth."""
    schedules = [{"width_reduction": width, "recover": True} for width in (0.25, 0.5)]
    some, more = (
        dry_run(elastic_space(schedules=schedules, elastic={"shapes": shapes})) for shapes in (0, 16)
    )
    assert (some.shapes, more.shapes) == (0, 16)
    assert (some.rungs[0], more.rungs[0]) == (2, 18)
    assert more.stages["shapes"] == 1 and "shapes" not in some.stages
    assert more.peak_bytes > some.peak_bytes and more.work.flops > some.work.flops


def test_trials_share_the_training_and_the_orders_it_goes_along() -> None:
    schedules = [
        {"drop_mlp": drop, "width_reduction": width, "importance": "pooled", "recover": True}
        for drop in (0, 1, 2)
        for width in (0.25, 0.5)
    ]
    space = elastic_space(schedules=schedules)
    trained = [space.trial(candidate) for candidate in space.schedules]
    stages = [trial_stages(config, named_sources(config), "dev") for config in trained]
    for name in ("importance", "neurons", "sorted", "elastic"):
        assert len({stage.key for own in stages for stage in own if stage.name == name}) == 1, name
    assert len({stage.key for own in stages for stage in own if stage.name == "pruned"}) == 6
    full = space.trial(space.always()[0])
    assert "elastic" not in {stage.name for stage in trial_stages(full, named_sources(full), "dev")}
    begun = trained[0].until(0)
    assert "recovered" not in {stage.name for stage in trial_stages(begun, named_sources(begun), "dev")}

    def key(config: TrialConfig) -> str:
        own = trial_stages(config, named_sources(config), "dev")
        return next(stage.key for stage in own if stage.name == "elastic")

    assert key(begun) == key(trained[0].until(6)) == key(trained[0])
    assert key(trained[0].with_seed(1)) != key(trained[0])
    longer = elastic_space(schedules=schedules, elastic={"steps": 40})
    assert key(longer.trial(longer.schedules[0])) != key(trained[0])


def test_a_dry_run_counts_one_training_of_four_networks_a_step() -> None:
    spaces = [elastic_space(elastic={"steps": steps}) for steps in (1000, 2000)]
    short, long = (dry_run(space) for space in spaces)
    assert short.rungs == (9, 3, 1) and short.stages["elastic"] == 1
    assert short.trials[1].schedule == "M[0]+el"
    independent = [
        dry_run(halving_space(strategy="independent", recovery={"steps": steps, "batch_size": 4}))
        for steps in (18_000, 19_000)
    ]
    a_thousand = (independent[1].work.flops - independent[0].work.flops) / 9  # of nine smaller models
    assert 4 < (long.work.flops - short.work.flops) / a_thousand < 6


def test_what_a_solver_finds_is_scored_and_trained_on_like_the_rest(tmp_path: Path) -> None:
    widths = {"layer_widths": [32, 64, 64, 64], "width_method": "taylor", "recover": True}
    schedules = [*SCHEDULES, {"width_reduction": 0.5, "width_method": "taylor", "recover": True}]
    space = elastic_space(schedules=schedules, elastic={"shapes": 4})
    asked: list[list[str]] = []

    def solve(trials: Sequence[TrialConfig]) -> list[Candidate]:
        asked.append([trial.name for trial in trials])
        impossible = {**widths, "layer_widths": [32, 64]}
        return [Candidate(**widths), Candidate(**impossible), Candidate(drop_mlp=[0], recover=True)]

    def study(rows: Any = ()) -> Proposals:
        tmp_path.mkdir(exist_ok=True)
        return Proposals(space, tmp_path, list(rows), load_backbones(space), solve)

    first = study()
    assert first.planned == 1 + 10 + 4 + 5 + 2
    parts = names(run(first))
    assert [len(names) for names in asked] == [11], "all that have been scored, once"
    assert next(name for name in parts if "w[" in name) == "w[32,64x3]+el"
    assert sum(name.endswith("+el") for name in parts) == 11 and first.complete
    again = study(first.rows.values())
    assert run(again) == [] and again.complete and len(asked) == 2
    stopped = study([row for row in first.rows.values() if row.schedule.endswith("+el")])
    assert sorted(names(run(stopped))) == sorted(name for name in parts if not name.endswith("+el"))


def test_each_budget_takes_the_depth_and_widths_that_lose_least() -> None:
    """A block less loses 0.3; narrowing a layer to half loses 0.1, 0.2, 0.3, 0.4, by its number."""
    config = load_backbones(small_space())["random:llama"]
    full = Plan.full(4)
    fewer = Plan(layers=(*full.layers[:2], LayerPlan(attention=False, mlp=False), full.layers[3]))

    def measured(plan: Plan, loss: float) -> Replacements:
        options = layer_options(config, plan, (0.5,), attention=False)
        losses = [(0.0, 0.1 * layer)[: len(own)] for layer, own in enumerate(options, start=1)]
        return Replacements(plan=plan, loss=loss, options=options, losses=tuple(losses))

    both = [measured(full, 0.0), measured(fewer, 0.3)]
    found = best_shapes(config, both, 24, Schedule(width_method="taylor"))
    everything = []
    for each in both:
        layers = zip(option_costs(config, each.options), each.losses, strict=True)
        for chosen in itertools.product(*(list(zip(*layer, strict=True)) for layer in layers)):
            everything.append((sum(cost for cost, _ in chosen), each.loss + sum(loss for _, loss in chosen)))
    assert len(found) == len(set(found)) > 3
    assert {bool(shape.drop_block) for shape in found} == {False, True}
    for shape in found:
        assert shape.width_method == "taylor"
        plan = sized_plan(config, make_plan(shape, 4, None), shape)
        loss = 0.3 * bool(shape.drop_block) + sum(
            0.1 * layer for layer, size in enumerate(shape.layer_widths, start=1) if 0 < size < 128
        )
        cost = count_block_parameters(config, plan)
        assert loss == pytest.approx(min(lost for other, lost in everything if other <= cost))


def test_only_what_is_cut_counts() -> None:
    assert not removes(Schedule(vocabulary=9, dimension=3))
    assert all(
        map(removes, (Schedule(drop_last_blocks=1), Schedule(drop_mlp=(2,)), Schedule(width_reduction=0.1)))
    )


@pytest.mark.integration
def test_an_elastic_study_cuts_its_models_from_the_one_it_trained(tmp_path: Path) -> None:
    space = small_space(
        recovery={"steps": 8, "batch_size": 4, "hard_negatives": 0, "lora": None, "learning_rate": 1e-3},
        schedules=[
            {"drop_mlp": 1, "importance": "pooled", "recover": True},
            {"drop_mlp": 1, "importance": "pooled", "width_reduction": 0.5, "recover": True},
        ],
        strategy="elastic",
        elastic={"steps": 6, "shapes": 3},
        halving={"factor": 2, "rungs": 2},
        objectives=["ndcg_at_10", "parameters"],
        keep="all",
        threads=2,
    )
    out = tmp_path / "study"
    result = search(space, out)
    rows = [row for row in store.read([out]).to_pylist() if row["split"] == "dev"]
    assert {row["status"] for row in rows} == {"ok"} and result.trials == len(rows)
    shapes = [row for row in rows if "-w[" in row["schedule"] and row["schedule"].endswith("+el")]
    assert 1 <= len(shapes) <= 3
    assert {"full", "1M+el", "1M-w50+el"} < {row["schedule"] for row in rows}
    sizes = {row["schedule"]: row["parameters"] for row in rows}
    assert all(row["parameters"] < sizes["1M+el"] for row in shapes), "depth as in 1M, narrower"
    assert sum(row["schedule"].endswith("+el+ft") for row in rows) == math.ceil((2 + len(shapes)) / 2)
    assert len(list(out.glob("stages/shapes/*"))) == 1, "both are of one depth"
    (elastic,) = out.glob("stages/elastic/*")
    trained = load_retriever(elastic / CHECKPOINT)
    plans = {}
    for place in out.glob("stages/pruned/*"):
        plan, model = read_plan(place), load_retriever(place / CHECKPOINT)
        narrow = [layer.neurons for layer in plan.layers if layer.neurons is not None]
        plans[bool(narrow)] = plan
        for kept in narrow:
            assert kept == tuple(range(len(kept))), "the first of the neurons, which were sorted"
        for index, layer in enumerate(plan.layers):
            mlp = model.family.mlp(model.family.layers(model.model)[index])
            if mlp is not None:
                whole = trained.family.mlp(trained.family.layers(trained.model)[index])
                assert whole is not None
                weight, cut = trained.family.down(whole).weight, model.family.down(mlp).weight
                torch.testing.assert_close(cut, weight[:, : cut.shape[1]])
            assert (mlp is not None) == layer.mlp
    assert set(plans) == {False, True}
    backbone = load_retriever("random:llama")
    assert not torch.equal(
        backbone.family.layers(backbone.model)[0].self_attn.q_proj.weight,
        trained.family.layers(trained.model)[0].self_attn.q_proj.weight,
    )
    resumed = search(space, out, resume=True)
    assert resumed.trials == result.trials
