"""Which trial is next, with every sampler, after failures and after kills."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from effir_ray.errors import InputError
from effir_ray.search.candidates import Candidate
from effir_ray.search.dry_run import dry_run, load_backbones
from effir_ray.search.proposals import Proposals, TrialRequest
from effir_ray.search.space import SearchSpace
from tests.helpers.search_examples import row, small_space

AXES = {"drop_mlp": {"low": 0, "high": 3}, "drop_attention": [0, 1, 2], "width_reduction": [0.0, 0.5]}


def proposals(space: SearchSpace, out: Path, rows: Any = ()) -> Proposals:
    return Proposals(space, out, list(rows), load_backbones(space))


def score(request: TrialRequest) -> Any:
    """Fewer dropped sublayers score better and are larger: every trial is on the front but equal ones."""
    dropped = int(request.config.schedule.drop_mlp) + int(request.config.schedule.drop_attention)
    return row(request.config, 0.9 - 0.1 * dropped, split=request.split, parameters=100 - dropped)


def finish(study: Proposals, *, stop_after: int | None = None) -> list[TrialRequest]:
    done = []
    while (stop_after is None or len(done) < stop_after) and (request := study.next()) is not None:
        done.append(request)
        study.finished(score(request))
    return done


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random", "gp"])
def test_listed_schedules_then_samples_then_the_front(tmp_path: Path, sampler: str) -> None:
    space = small_space(sampler=sampler, parameters=AXES, trials=6, schedules=[{"drop_block": 2}])
    study = proposals(space, tmp_path)
    request = finish(study)
    dev, test = ([w for w in request if w.split == split] for split in ("dev", "test"))
    assert [w.config.name for w in dev[:2]] == ["full", "2B"]
    assert len({w.config.id for w in dev}) == len(dev) == 8
    assert [w.config.id for w in test] == [config.id for config in study.front()]
    assert request == dev + test
    assert study.complete


def test_a_small_space_is_exhausted_not_repeated(tmp_path: Path) -> None:
    study = proposals(small_space(parameters={"drop_mlp": [0, 1, 2]}, trials=9), tmp_path)
    names = [request.config.name for request in finish(study) if request.split == "dev"]
    assert sorted(names) == ["1M", "2M", "full"]
    assert study.complete
    assert study.planned == 3
    assert study.to_come() == ([], 0, 0)
    asked = len(study.study.get_trials())
    again = proposals(study.space, tmp_path, study.rows.values())
    assert again.complete
    assert again.planned == 3
    assert len(again.study.get_trials()) == asked


def test_test_scores_wait_for_running_trials_and_front_is_chosen_on_dev(tmp_path: Path) -> None:
    study = proposals(small_space(schedules=[{"drop_mlp": 1}]), tmp_path)
    full, pruned = study.next(), study.next()
    assert full is not None and pruned is not None
    study.finished(score(full))
    assert study.next() is None
    assert not study.exhausted
    study.finished(row(pruned.config, 0.1, parameters=200))  # worse and larger: not on the front
    final = study.next()
    assert final == TrialRequest(config=full.config, split="test")


def test_the_full_model_is_tested_even_when_it_is_beaten(tmp_path: Path) -> None:
    study = proposals(small_space(schedules=[{"drop_mlp": 1}]), tmp_path)
    full, pruned = study.next(), study.next()
    assert full is not None and pruned is not None
    study.finished(row(full.config, 0.5))
    study.finished(row(pruned.config, 0.6, parameters=50, speed=2.0))
    assert [config.id for config in study.front()] == [pruned.config.id]
    assert study.to_come() == ([], 0, 2) and not study.complete
    assert [request.config.id for request in finish(study)] == [pruned.config.id, full.config.id]
    assert study.complete


def test_failed_trials_teach_nothing_and_are_not_repeated(tmp_path: Path) -> None:
    study = proposals(small_space(parameters=AXES, trials=3, schedules=[{"drop_mlp": 2}]), tmp_path)
    seen = []
    while (request := study.next()) is not None and request.split == "dev":
        seen.append(request.config.id)
        study.finished(row(request.config, None))
    assert len(seen) == len(set(seen)) == 5
    assert study.front() == []


def test_a_resumed_study_tries_failed_samples_again_and_no_others(tmp_path: Path) -> None:
    """What the sampler only proposed (known, impossible) is not among them."""
    space = small_space(parameters={"drop_mlp": {"low": 0, "high": 5}}, trials=4)
    first, failed = proposals(space, tmp_path), ""
    while (request := first.next()) is not None and request.split == "dev":
        lost = request.config.name != "full" and not failed
        failed = request.config.id if lost else failed
        first.finished(row(request.config, None) if lost else score(request))
    for retry_fails in (True, False):
        rows = [kept for kept in first.rows.values() if kept.status == "ok"]
        second = proposals(space, tmp_path, rows)
        again = second.next()
        assert again is not None
        assert again.config.id == failed
        assert second.planned == first.planned
        second.finished(row(again.config, None) if retry_fails else score(again))
        request = second.next()
        assert request is None or request.split == "test"
    told = [trial.state.name for trial in second.study.get_trials() if trial.user_attrs.get("handed_out")]
    assert sorted(told) == ["COMPLETE", "COMPLETE", "COMPLETE", "FAIL"]


@pytest.mark.parametrize("kill_at", [0, 2, 4, 6])
@pytest.mark.parametrize("row_written", [True, False], ids=["after the row", "before the row"])
def test_resume_runs_every_trial_exactly_once(tmp_path: Path, kill_at: int, row_written: bool) -> None:
    space = small_space(parameters=AXES, trials=4, schedules=[{"drop_mlp": 1}, {"drop_block": 1}])
    first = proposals(space, tmp_path)
    done = finish(first, stop_after=kill_at)
    interrupted = first.next()
    rows = [score(request) for request in done]
    if row_written and interrupted is not None:  # the process died between the row and telling Optuna
        rows.append(score(interrupted))
    second = proposals(space, tmp_path, rows)
    later = finish(second)
    ran = [request.key for request in done + ([interrupted] if row_written and interrupted else []) + later]
    assert len(ran) == len(set(ran))
    assert sum(split == "dev" for _, split in ran) == 7
    assert second.complete
    states = [trial.state.name for trial in second.study.get_trials()]
    assert "RUNNING" not in states


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random", "gp"])
def test_a_continuous_axis_is_sampled_to_the_end(tmp_path: Path, sampler: str) -> None:
    """Though most of what a sampler proposes here cannot be built: one MLP is left, which needs a neuron."""
    axes = {"drop_mlp": {"low": 3, "high": 4}, "width_reduction": {"low": 0.9, "high": 0.999}}
    study = proposals(small_space(parameters=axes, trials=6, sampler=sampler), tmp_path)
    dev = [request for request in finish(study) if request.split == "dev"]
    assert len(dev) == 7
    assert study.shortfall == ""


def test_known_proposals_in_a_row_do_not_end_a_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a sampler that has settled on one end of a range."""
    axes = {"width_reduction": {"low": 0.0, "high": 0.5}}
    study = proposals(small_space(parameters=axes, trials=5), tmp_path)
    ask = study.study.ask

    def settled(distributions: Any) -> Any:
        if not any(trial.state.name == "WAITING" for trial in study.study.get_trials()):
            study.study.enqueue_trial({"width_reduction": 0.5})
        return ask(distributions)

    monkeypatch.setattr(study.study, "ask", settled)
    assert sum(request.split == "dev" for request in finish(study)) == 6


def test_a_study_that_finds_no_new_trial_says_so(tmp_path: Path) -> None:
    for name in ("one", "few"):
        (tmp_path / name).mkdir()
    one = {"width_reduction": {"low": 0.5, "high": 0.5}}
    study = proposals(small_space(parameters=one, trials=3), tmp_path / "one")
    finish(study)
    assert "1 of 3 trials were sampled: of 500 random combinations" in study.shortfall
    few = proposals(small_space(parameters={"drop_mlp": [0, 1, 2]}, trials=9), tmp_path / "few")
    finish(few)
    assert few.shortfall == (
        "2 of 9 trials were sampled: every combination of 'parameters' that can be built has been tried"
    )


@pytest.mark.parametrize("content", [b"no database", b"SQLite format 3\0" + b"x" * 5000])
def test_a_damaged_database_is_one_line_and_made_anew_once_it_is_away(tmp_path: Path, content: bytes) -> None:
    space = small_space(parameters=AXES, trials=4)
    rows = [score(request) for request in finish(proposals(space, tmp_path))]
    (tmp_path / "optuna.db").write_bytes(content)
    with pytest.raises(
        InputError, match=r"optuna\.db: not readable as Optuna's database .*move it away"
    ) as said:
        proposals(space, tmp_path, rows)
    assert "\n" not in str(said.value)
    (tmp_path / "optuna.db").unlink()
    again = proposals(space, tmp_path, rows)
    assert again.complete
    assert len(again.study.get_trials()) == 5


def test_a_row_of_another_version_is_named(tmp_path: Path) -> None:
    space = small_space(parameters=AXES, trials=4)
    rows = [score(request) for request in finish(proposals(space, tmp_path))]
    rows[1] = rows[1].model_copy(update={"trial": rows[1].trial.replace('"drop_mlp"', '"drop_mlps"')})
    (tmp_path / "optuna.db").unlink()
    with pytest.raises(InputError, match=f"the row of trial {rows[1].trial_id}: .*drop_mlps"):
        proposals(space, tmp_path, rows)


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random", "gp"])
def test_what_breaks_a_constraint_is_not_on_the_front_and_teaches(tmp_path: Path, sampler: str) -> None:
    space = small_space(
        sampler=sampler, parameters=AXES, trials=6, constraints=["document_speedup >= 1.25"], seed=3
    )

    def measured(request: TrialRequest) -> Any:
        dropped = int(request.config.schedule.drop_mlp) + int(request.config.schedule.drop_attention)
        found = row(request.config, 0.9 - 0.1 * dropped, split=request.split, speed=1 + 0.1 * dropped)
        return found.model_copy(update={"parameters": 100 - dropped})

    study = proposals(space, tmp_path)
    while (request := study.next()) is not None:
        study.finished(measured(request))
    dev = [found for (_, split), found in study.rows.items() if split == "dev"]
    front = {study.rows[config.id, "dev"].document_speedup for config in study.front()}
    assert front == {found.document_speedup for found in dev if found.document_speedup >= 1.25}
    assert {config.id for config in study.to_test()} == {config.id for config in study.front()} | {
        space.trial(Candidate()).id
    }
    told = [trial for trial in study.study.get_trials() if trial.state.name == "COMPLETE"]
    assert told
    for trial in told:
        (violation,) = trial.constraints.values()
        assert (violation <= 0) == (trial.values[2] >= 1.25)
    assert study.complete


def test_trials_that_cannot_meet_the_constraints_do_not_run(tmp_path: Path) -> None:
    two = small_space(schedules=[{"drop_mlp": 2}])
    bound = {trial.schedule: trial.parameters for trial in dry_run(two).trials}["2M"]
    space = small_space(parameters={"drop_mlp": [0, 1, 2, 3]}, trials=9, constraints=[f"parameters<={bound}"])
    study = proposals(space, tmp_path)
    names = [request.config.name for request in finish(study) if request.split == "dev"]
    assert sorted(names) == ["2M", "3M", "full"]
    assert study.shortfall == (
        "2 of 9 trials were sampled: every combination of 'parameters' that can be built and meets the "
        "constraints has been tried"
    )


def test_no_trial_that_meets_the_constraints_leaves_the_full_model_to_test(tmp_path: Path) -> None:
    study = proposals(small_space(schedules=[{"drop_mlp": 1}], constraints=["ndcg_at_10 > 0.95"]), tmp_path)
    done = finish(study)
    assert study.front() == []
    assert [request.config.name for request in done if request.split == "test"] == ["full"]
    assert study.complete


def test_other_objectives_make_another_front(tmp_path: Path) -> None:
    space = small_space(schedules=[{"drop_mlp": 1}, {"drop_mlp": 2}], objectives=["parameters"])
    study = proposals(space, tmp_path)
    finish(study)
    assert [config.name for config in study.front()] == ["2M"]
    assert [direction.name for direction in study.study.directions] == ["MINIMIZE"]


def test_a_spent_budget_ends_a_study_in_order_and_a_larger_one_goes_on(tmp_path: Path) -> None:
    """Each dev trial takes an hour of the device: the second is the last within 1.5 device-hours."""

    def costly(request: TrialRequest) -> Any:
        seconds = 3600.0 if request.split == "dev" else 0.0
        return score(request).model_copy(update={"device_seconds": seconds})

    def run(study: Proposals) -> list[str]:
        names = []
        while (request := study.next()) is not None:
            names.append(f"{request.config.name} {request.split}")
            study.finished(costly(request))
        return names

    schedules = [{"drop_mlp": 1}, {"drop_mlp": 2}, {"drop_mlp": 3}]
    study = proposals(small_space(schedules=schedules, budget={"device_hours": 1.5}), tmp_path)
    assert run(study) == ["full dev", "1M dev", "full test", "1M test"]
    assert study.complete
    assert study.shortfall == "2 of 4 trials ran: the budget of 1.5 device-hours is spent (2)"
    assert study.to_come() == ([], 0, 0)
    more = proposals(
        small_space(schedules=schedules, budget={"device_hours": 3}), tmp_path, study.rows.values()
    )
    assert run(more) == ["2M dev", "2M test"]
    rest = proposals(small_space(schedules=schedules), tmp_path, more.rows.values())
    assert run(rest) == ["3M dev", "3M test"]
    assert rest.shortfall == ""


def test_hours_are_counted_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = proposals(small_space(schedules=[{"drop_mlp": 1}], budget={"hours": 2}), tmp_path)
    first = study.next()
    assert first is not None
    study.started -= 3 * 3600
    assert study.next() is None  # what runs ends
    study.finished(score(first))
    later = [request.split for request in finish(study)]
    assert later == ["test"]
    assert study.shortfall == "1 of 2 trials ran: the budget of 2 hours is spent"


def test_what_noise_keeps_off_the_front_may_come_back_and_what_is_beaten_not(tmp_path: Path) -> None:
    space = small_space(schedules=[{"drop_mlp": 1}, {"drop_mlp": 2}, {"drop_mlp": 3}])
    study = proposals(space, tmp_path)
    speeds = {"full": (1.0, 1.0), "1M": (1.1, 2.2), "2M": (1.9, 2.1), "3M": (1.0, 1.0)}
    scores = {"full": 0.7, "1M": 0.6, "2M": 0.58, "3M": 0.1}
    while (request := study.next()) is not None and request.split == "dev":
        low, high = speeds[request.config.name]
        found = row(request.config, scores[request.config.name], speed=(low + high) / 2, parameters=100)
        bounds = {"document_speedup_low": low, "document_speedup_high": high}
        study.finished(found.model_copy(update=bounds))
    assert [config.name for config in study.front()] == ["full", "1M"]
    assert [config.name for config in study.undefeated()] == ["full", "1M", "2M"]


def test_several_backbones_are_sampled_and_all_full_models_tested(tmp_path: Path) -> None:
    backbones = ["random:llama", {"backbone": "random:bert", "first_blocks": 2}]
    space = small_space(backbones=backbones, parameters={"drop_mlp": {"low": 1, "high": 4}}, trials=6)
    study = proposals(space, tmp_path)
    done = finish(study)
    dev = [(w.config.backbone, w.config.name) for w in done if w.split == "dev"]
    # Of two blocks no more than two MLPs can go: four and two combinations are there, and all were tried.
    assert dev[:2] == [("random:llama", "full"), ("random:bert", "full")]
    expected = [("random:llama", f"{k}M") for k in range(1, 5)] + [("random:bert", f"{k}M") for k in (1, 2)]
    assert sorted(dev[2:]) == sorted(expected)
    tested = {w.config.id for w in done if w.split == "test"}
    assert tested >= {space.trial(Candidate(backbone=name)).id for name in space.backbone_names}
    again = proposals(space, tmp_path, study.rows.values())
    assert again.complete and again.sampled == study.sampled


def test_the_front_is_measured_with_every_seed_and_chosen_with_the_first(tmp_path: Path) -> None:
    space = small_space(seeds=[5, 6, 7], schedules=[{"drop_mlp": 1}, {"drop_mlp": 2}], strategy="independent")
    study = proposals(space, tmp_path)

    def scored(request: TrialRequest) -> Any:
        """Two MLPs less are beaten with the search's seed, and would be best by far with another."""
        lucky = request.config.seed != 5 and request.config.name != "full"
        known = {"full": (0.9, 100), "1M": (0.8, 90), "2M": (0.7, 95)}[request.config.name]
        return row(request.config, 0.99 if lucky else known[0], split=request.split, parameters=known[1])

    done = []
    while (request := study.next()) is not None:
        done.append((request.config.name, request.config.seed, request.split))
        study.finished(scored(request))
        if len(done) == 5:
            assert study.to_come()[0] and study.to_come()[1:] == (0, 4) and not study.complete
    front = ["full", "1M"]
    assert done == [
        *((name, 5, "dev") for name in ("full", "1M", "2M")),
        *((name, 5, "test") for name in front),
        *((name, seed, split) for seed in (6, 7) for split in ("dev", "test") for name in front),
    ]
    assert study.complete and study.to_come() == ([], 0, 0)
    assert [config.name for config in study.front()] == front and {c.seed for c in study.front()} == {5}

    rows = [*study.rows.values(), *study.repeated.values()]
    again = proposals(space, tmp_path, rows)
    assert again.complete and again.planned == study.planned == 3 and not again.sampled
    lost = proposals(space, tmp_path, rows[:-1])
    assert not lost.complete
    request = lost.next()
    assert request is not None and request.key == (rows[-1].trial_id, "test")
    lost.take_back()
    assert lost.next() == request and lost.next() is None
    more = space.model_copy(update={"seeds": (5, 6, 7, 8)})
    assert [w.config.seed for w in finish(proposals(more, tmp_path, rows))] == [8] * 4


def test_the_vocabulary_is_an_axis_in_which_0_is_all_of_it(tmp_path: Path) -> None:
    space = small_space(parameters={"vocabulary": [0, 300, 400], "drop_mlp": [0, 1]}, trials=5)
    study = proposals(space, tmp_path)
    dev = [request.config.name for request in finish(study) if request.split == "dev"]
    assert sorted(dev) == ["1M", "1M-v300", "1M-v400", "full", "v300", "v400"]
    (tmp_path / "other").mkdir()
    again = proposals(space, tmp_path / "other", study.rows.values())
    params = [trial.params["vocabulary"] for trial in again.study.get_trials()]
    assert sorted(params) == [0, 0, 300, 300, 400, 400] and again.complete


def test_the_dimension_is_an_axis_in_which_0_is_all_of_them(tmp_path: Path) -> None:
    """What makes the index smaller is asked of a schedule before it runs."""
    parameters = {"dimension": [0, 16, 32, 48], "drop_mlp": [0, 1]}
    space = small_space(parameters=parameters, trials=5, constraints=[f"index_bytes <= {4 * 32 * 10**6}"])
    study = proposals(space, tmp_path)
    dev = [request.config.name for request in finish(study) if request.split == "dev"]
    assert sorted(dev) == ["1M-d16", "1M-d32", "d16", "d32", "full"]
    (tmp_path / "other").mkdir()
    again = proposals(space, tmp_path / "other", study.rows.values())
    params = [trial.params["dimension"] for trial in again.study.get_trials()]
    assert sorted(params) == [0, 16, 16, 32, 32] and again.complete


def test_widths_of_layers_are_an_axis_in_which_an_empty_list_is_none(tmp_path: Path) -> None:
    parameters = {"layer_widths": [[], [64, 64, 8, 8], [64, 64, 64, 64]], "drop_mlp": [0, 1]}
    space = small_space(parameters=parameters, trials=6)
    study = proposals(space, tmp_path)
    dev = [request.config.name for request in finish(study) if request.split == "dev"]
    assert sorted(dev) == ["1M", "full", "w[64x2,8x2]", "w[64x4]"], "which of 1M is 0 wide, no list says"
    (tmp_path / "other").mkdir()
    again = proposals(space, tmp_path / "other", study.rows.values())
    params = [trial.params["layer_widths"] for trial in again.study.get_trials()]
    assert sorted(params) == ["", "", "64,64,64,64", "64,64,8,8"]


def test_what_a_model_is_served_in_is_an_axis(tmp_path: Path) -> None:
    """A study that goes on knows which of its rows it had proposed with which."""
    space = small_space(parameters={"precision": ["auto", "int8"], "drop_mlp": [0, 1]}, trials=3)
    study = proposals(space, tmp_path)
    dev = [request.config for request in finish(study) if request.split == "dev"]
    assert sorted(config.name for config in dev) == ["1M", "1M+int8", "full", "full+int8"]
    (tmp_path / "other").mkdir()
    again = proposals(space, tmp_path / "other", study.rows.values())
    params = [trial.params["precision"] for trial in again.study.get_trials()]
    assert sorted(params) == ["auto", "auto", "int8", "int8"] and again.complete
    with pytest.raises(ValidationError, match="should be 'auto', 'float32', 'bfloat16' or 'int8'"):
        small_space(parameters={"precision": ["int4"]}, trials=1)


def test_a_spent_budget_leaves_the_other_seeds_out(tmp_path: Path) -> None:
    space = small_space(seeds=[0, 1], schedules=[{"drop_mlp": 1}], budget={"device_hours": 1})
    study = proposals(space, tmp_path)
    done = []
    while (request := study.next()) is not None:
        done.append((request.config.seed, request.split))
        study.finished(score(request).model_copy(update={"device_seconds": 1900.0}))
    assert done == [(0, "dev"), (0, "dev"), (0, "test"), (0, "test")] and study.complete


def test_a_grid_of_several_backbones_has_what_fits_each(tmp_path: Path) -> None:
    backbones = ["random:llama", {"backbone": "random:bert", "first_blocks": 2}]
    space = small_space(backbones=backbones, sampler="grid", parameters={"drop_mlp": [1, 3]})
    listed = [(config.backbone, config.name) for config in proposals(space, tmp_path).listed]
    assert listed[2:] == [("random:llama", "1M"), ("random:bert", "1M"), ("random:llama", "3M")]
    preview = dry_run(space)
    assert preview.excluded == 1 and preview.backbones == ("random:llama", "random:bert")
    assert [trial.parameter_ratio for trial in preview.trials[:2]] == [1.0, 1.0]
    assert preview.stages["backbone"] == preview.stages["importance"] == 2
    assert preview.stages["bm25"] == 1  # of the data set, whatever the backbone
