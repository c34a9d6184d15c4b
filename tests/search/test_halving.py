"""Which trials go on from a rung, and that the parts of a trial add up to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from effir_ray.errors import InputError
from effir_ray.results.pareto import non_dominated
from effir_ray.search.dry_run import dry_run
from effir_ray.search.folder import claim
from effir_ray.search.halving import choose
from effir_ray.search.optuna_study import open_study
from tests.helpers.search_examples import row
from tests.helpers.studies_in_parts import halving_space, names, proposals, run, score


def test_whole_layers_go_on_and_then_what_lies_farthest() -> None:
    front = [[0.0, 4.0], [1.0, 1.0], [4.0, 0.0]]
    behind = [[1.0, 4.5], [1.2, 1.2], [4.5, 0.5]]
    costs = np.array(behind + front + [[np.nan, 0.0]])
    assert sorted(choose(costs, 3)) == [3, 4, 5]
    assert set(choose(costs, 4)) - {3, 4, 5} == {0}
    assert choose(costs, 2) == [3, 5], "the best in the first objective, then the other end"
    assert len(choose(costs, 99)) == 6
    assert choose(costs[-1:], 1) == []


@given(
    costs=arrays(
        float, st.tuples(st.integers(1, 12), st.integers(1, 3)), elements=st.floats(0, 3).map(round)
    ),
    count=st.integers(1, 12),
)
def test_nothing_goes_on_before_what_beats_it(costs: Any, count: int) -> None:
    chosen = choose(costs, count)
    assert len(set(chosen)) == len(chosen) == min(count, len(costs))
    rest = np.setdiff1d(np.arange(len(costs)), chosen)
    for left in rest:
        for gone in chosen:
            better = (costs[left] <= costs[gone]).all() and (costs[left] < costs[gone]).any()
            assert not better
    assert non_dominated(costs)[chosen].sum() == min(count, non_dominated(costs).sum())


@pytest.mark.parametrize("at_once", [1, 4])
def test_one_in_three_goes_on_from_each_rung(tmp_path: Path, at_once: int) -> None:
    study = proposals(halving_space(), tmp_path)
    assert study.planned == 1 + 9 + 3 + 1
    asked = run(study, at_once=at_once)
    parts = names(asked)
    assert parts[0] == "full"
    assert [sum(name.endswith(end) for name in parts) for end in ("@2", "@6", "+ft")] == [9, 3, 1]
    assert {name for name in parts if name.endswith("@6")} >= {"M[3]+ft@6", "M[1,3]+ft@6"}, (
        "the best of both sizes"
    )
    assert study.complete and study.planned == len(parts) and study.to_come() == ([], 0, 0)
    tested = names(asked, "test")
    assert parts[-1] in tested and "full" in tested
    assert sorted(names(asked)) == sorted(names(run(proposals(halving_space(), tmp_path / "b"), at_once=1)))


@pytest.mark.parametrize("kill_at", range(16))
def test_a_resumed_study_does_every_part_once(tmp_path: Path, kill_at: int) -> None:
    undisturbed = run(proposals(halving_space(), tmp_path / "a"))
    first = proposals(halving_space(), tmp_path / "b")
    run(first, stop_after=kill_at)
    rows = list(first.rows.values())
    second = proposals(halving_space(), tmp_path / "b", rows)
    run(second)
    assert second.complete
    assert sorted(second.rows) == sorted(request.key for request in undisturbed)
    states = {trial.state.name for trial in second.study.get_trials()}
    assert states == {"COMPLETE"}


def test_the_sampler_learns_from_the_first_rung(tmp_path: Path) -> None:
    space = halving_space(
        schedules=[],
        trials=6,
        parameters={"drop_mlp": [0, [0], [1], [2], [3], [0, 1], [2, 3]], "recover": [True]},
    )
    study = proposals(space, tmp_path)
    run(study)
    told = [
        trial.user_attrs["schedule"] for trial in study.study.get_trials() if "handed_out" in trial.user_attrs
    ]
    assert len(told) == 6 and all(name.endswith("@2") for name in told)
    assert study.complete and study.planned == len([key for key in study.rows if key[1] == "dev"])
    again = proposals(space, tmp_path, study.rows.values())
    assert again.complete and len(again.study.get_trials()) == len(study.study.get_trials())


def test_what_another_strategy_measured_is_not_measured_again(tmp_path: Path) -> None:
    alone, together = halving_space(strategy="independent"), halving_space()
    claim(tmp_path, alone, {}, resume=False)
    before = proposals(alone, tmp_path)
    whole = names(run(before, stop_after=4))
    assert whole == ["full", "M[0]+ft", "M[1]+ft", "M[2]+ft"]
    claim(tmp_path, together, {}, resume=True)
    after = proposals(together, tmp_path, before.rows.values())
    parts = names(run(after))
    assert [sum(name.endswith(end) for name in parts) for end in ("@2", "@6", "+ft")] == [6, 2, 1]
    assert not [name for name in parts if name.partition("@")[0] in whole]
    back = proposals(alone, tmp_path, after.rows.values())
    rest = [config.name for config in map(alone.trial, alone.schedules)]
    assert sorted(names(run(back))) == sorted(set(rest) - set(whole) - set(parts))


def test_a_trial_that_breaks_a_measured_constraint_goes_on_after_those_that_meet_it(tmp_path: Path) -> None:
    further = [
        {name for name in names(run(study)) if name.endswith("@6")}
        for study in (
            proposals(halving_space(constraints=texts), tmp_path / str(len(texts)))
            for texts in ([], ["ndcg_at_10 <= 0.46"], ["ndcg_at_10 >= 0.501", "map_at_100 >= 0.5"])
        )
    ]
    assert further[0] >= {"M[3]+ft@6", "M[1,3]+ft@6"}
    assert further[1] >= {"M[0]+ft@6", "M[1,3]+ft@6"} and "M[3]+ft@6" not in further[1]
    assert further[2] >= {"M[3]+ft@6", "M[1,3]+ft@6"}, "where none meets them, the best go on"


def test_a_failed_trial_does_not_go_on(tmp_path: Path) -> None:
    study = proposals(halving_space(), tmp_path)
    while (request := study.next()) is not None:
        lost = request.config.name.startswith("M[3]+ft")
        study.finished(row(request.config, None) if lost else score(request))
    assert not [row for row in study.rows.values() if row.schedule == "M[3]+ft@6"]
    assert study.complete


def test_backbones_whose_trainings_are_of_other_lengths_meet_at_the_same_rungs(tmp_path: Path) -> None:
    """One of four steps has two rungs where the other has three."""
    short = {"backbone": "random:llama:1", "recovery": {"steps": 4, "batch_size": 4}}
    drops = [{"drop_mlp": [layer], "recover": True} for layer in range(3)]
    space = halving_space(backbones=["random:llama", short], schedules=drops)
    study = proposals(space, tmp_path)
    asked = [request.config for request in run(study) if request.split == "dev"]
    at = {
        name: [str(config.name).partition("+ft")[2] for config in asked if config.backbone == name][1:]
        for name in space.backbone_names
    }
    assert at["random:llama"][:3] == ["@2"] * 3 and at["random:llama:1"][:3] == ["@1"] * 3
    further = at["random:llama"][3:] + at["random:llama:1"][3:]
    assert len(further) >= 2 and set(further) <= {"@6", ""}
    assert study.complete and study.planned == len(asked)


def test_a_dry_run_counts_the_parts_that_are_expected_to_run() -> None:
    """Of nine trainings of 18 steps 9 do two, 3 four more and 1 twelve more: 42 steps instead of 162."""
    names = ("halving", "independent")
    short = [dry_run(halving_space(strategy=name)) for name in names]
    long = [
        dry_run(halving_space(strategy=name, recovery={"steps": 18000, "batch_size": 4})) for name in names
    ]
    assert [preview.rungs for preview in short] == [(9, 3, 1), (9,)]
    assert short[0].trials[1].schedule == "M[0]+ft@2"
    more = [after.work.flops - before.work.flops for before, after in zip(short, long, strict=True)]
    assert more[0] / more[1] == pytest.approx(42 / 162, rel=0.05), "which of the sizes go on is not known"
    assert short[0].peak_bytes > short[1].peak_bytes, "what waits keeps its optimizer's state"


def test_studies_of_parts_have_a_sampler_of_their_own(tmp_path: Path) -> None:
    space = halving_space()
    assert (
        open_study(space, tmp_path).study_name
        != open_study(space.model_copy(update={"strategy": "independent"}), tmp_path).study_name
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recovery": None, "schedules": []}, "no 'recovery'"),
        ({"recovery": {"epochs": 1, "batch_size": 4}}, "give 'steps', not 'epochs'"),
        ({"recovery": {"steps": 2, "batch_size": 4}}, "too few"),
        ({"recovery": {"steps": 18, "dev": {"every": 2}}}, "leave recovery.dev out"),
        ({"recovery": {"steps": 18, "stop_after": 3}}, "recovery.stop_after is for the strategy"),
        ({"base_training": {"steps": 18, "stop_after": 3}}, "base_training.stop_after is for the strategy"),
        ({"halving": {"factor": 1}}, "greater than or equal to 2"),
        ({"recovery": {"steps": 18, "stop_after": 18}}, "fewer than steps"),
    ],
)
def test_what_cannot_be_stopped_on_the_way_is_said(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        halving_space(**changes)


def test_identities_of_trials_are_what_they_were() -> None:
    """Fields that came later are no part of an identity where they say nothing."""
    config = halving_space().trial(halving_space().schedules[0])
    assert "stop_after" not in config.model_dump_json()
    assert config.until(6).until(None).id == config.id != config.until(6).id
    with pytest.raises(InputError):
        type(config).read(
            config.until(6).model_dump_json().replace('"stop_after":6', '"stop_after":60'), "here"
        )
