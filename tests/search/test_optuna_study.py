"""What optuna-dashboard shows of a study: every trial, when it ran, and what it scored on test."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from effir_ray.results.schema import TrialRow
from effir_ray.search.dry_run import load_backbones
from effir_ray.search.optuna_study import all_trials, write_all_trials
from effir_ray.search.proposals import Proposals
from effir_ray.search.space import SearchSpace
from tests.helpers.search_examples import row, small_space

BEGAN = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


@pytest.fixture
def space() -> SearchSpace:
    """A trial of the listed schedules cannot be said in the parameters that are sampled."""
    return small_space(parameters={"drop_mlp": [0, 1, 2]}, trials=2, schedules=[{"drop_block": 2}])


def run(space: SearchSpace, out: Path) -> list[TrialRow]:
    """Every trial took 90 s; the second one failed."""
    proposals = Proposals(space, out, [], load_backbones(space))
    rows: list[TrialRow] = []
    while (request := proposals.next()) is not None:
        ended = BEGAN + timedelta(seconds=100 * (len(rows) + 1))
        score = None if len(rows) == 1 else 0.5 + len(rows) / 100
        scored = row(request.config, score, split=request.split, parameters=100 - len(rows))
        made = scored.model_copy(update={"created_at": ended, "wall_seconds": 90.0})
        rows.append(made)
        proposals.finished(made)
    return rows


def test_every_trial_is_there_with_its_times_and_test_score(space: SearchSpace, tmp_path: Path) -> None:
    rows = run(space, tmp_path)
    for _ in range(2):  # a study that goes on writes it anew
        write_all_trials(space, tmp_path, rows)
    storage = f"sqlite:///{tmp_path}/optuna.db"
    assert set(optuna.get_all_study_names(storage)) == {space.name, all_trials(space)}
    study = optuna.load_study(study_name=all_trials(space), storage=storage)
    dev = [row for row in rows if row.split == "dev"]
    tested = {row.trial_id: row.ndcg_at_10 for row in rows if row.split == "test"}
    assert len(tested) < len(dev)
    assert [trial.user_attrs["schedule"] for trial in study.trials] == [row.schedule for row in dev]
    assert {row.schedule for row in dev} >= {"full", "2B"}
    for trial, of in zip(study.trials, dev, strict=True):
        assert trial.user_attrs["trial_id"] == of.trial_id
        assert trial.user_attrs.get("test_ndcg_at_10") == tested.get(of.trial_id)
        assert trial.datetime_complete is not None and trial.duration == timedelta(seconds=90)
        assert trial.datetime_complete.astimezone(UTC) == of.created_at
        assert (trial.state == TrialState.FAIL) == (of.status == "failed")
        assert trial.user_attrs.get("reason", "") == of.reason
        assert "schedule.drop_mlp" in trial.params


@pytest.mark.parametrize("name", ["a?mode=ro", "50%25", "a%2Fb", "a#b?c&d=e"])
def test_the_database_is_in_a_folder_of_any_name(space: SearchSpace, tmp_path: Path, name: str) -> None:
    """Pasted into a URL, such a name would be options, or that of another folder."""
    out = tmp_path / "studies" / name
    out.mkdir(parents=True)
    write_all_trials(space, out, run(space, out))
    assert [file.relative_to(out).as_posix() for file in out.rglob("*") if file.is_file()] == ["optuna.db"]
    assert list(out.parent.rglob("*")) == [out, out / "optuna.db"]


def test_what_the_sampler_learns_from_has_true_times(space: SearchSpace, tmp_path: Path) -> None:
    rows = {row.trial_id: row for row in run(space, tmp_path) if row.split == "dev"}
    (tmp_path / "optuna.db").unlink()
    again = Proposals(space, tmp_path, list(rows.values()), load_backbones(space))
    trials = again.study.get_trials()
    assert trials
    for trial in trials:
        assert trial.duration == timedelta(seconds=90)
        assert trial.user_attrs["schedule"] == rows[trial.user_attrs["trial_id"]].schedule
