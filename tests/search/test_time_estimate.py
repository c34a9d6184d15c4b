"""How long is left: falls as stages finish, follows the speed they had, counts shared stages once."""

from pathlib import Path

import pytest

from effir_ray.search.candidates import Candidate
from effir_ray.search.dry_run import load_backbones, named_sources
from effir_ray.search.time_estimate import TimeEstimate
from effir_ray.search.trial_stages import trial_stages
from effir_ray.stages import StageStore
from tests.helpers.search_examples import small_space

SPACE = small_space(base_training={"steps": 2, "batch_size": 4, "lora": None})
FULL, PRUNED = SPACE.trial(Candidate()), SPACE.trial(Candidate(drop_mlp=1))


def estimate(root: Path) -> TimeEstimate:
    return TimeEstimate(StageStore(root), load_backbones(SPACE), {SPACE.backbone: named_sources(FULL)})


def finish(root: Path, *names: str, seconds: float) -> None:
    for stage in trial_stages(FULL, named_sources(FULL), "dev"):
        if stage.name in names:
            folder = stage.path(StageStore(root))
            folder.mkdir(parents=True)
            (folder / "stage.json").write_text(f'{{"inputs": {{}}, "seconds": {seconds}}}')


def test_shared_stages_count_once_and_unknown_trials_count_too(tmp_path: Path) -> None:
    one, two = (estimate(tmp_path).seconds_left(c, 0, 0, ()) for c in ([FULL], [FULL, PRUNED]))
    alone = estimate(tmp_path).seconds_left([PRUNED], 0, 0, ())
    assert one < two < one + alone
    assert estimate(tmp_path).seconds_left([FULL], 3, 0, ()) > one
    assert estimate(tmp_path).seconds_left([FULL], 0, 2, ()) > one


def test_finished_stages_leave_and_set_the_speed_of_those_to_come(tmp_path: Path) -> None:
    before = estimate(tmp_path).seconds_left([FULL, PRUNED], 0, 0, ())
    finish(tmp_path / "quick", "backbone", "base", "embeddings", seconds=0.1)
    finish(tmp_path / "slow", "backbone", "base", "embeddings", seconds=500.0)
    quick = estimate(tmp_path / "quick").seconds_left([FULL, PRUNED], 0, 0, ())
    slow = estimate(tmp_path / "slow").seconds_left([FULL, PRUNED], 0, 0, ())
    assert quick < before
    assert slow > 500


def test_time_already_spent_on_a_running_stage_is_taken_off(tmp_path: Path) -> None:
    whole = estimate(tmp_path).seconds_left([FULL], 0, 0, ())
    started_long_ago = estimate(tmp_path).seconds_left([FULL], 0, 0, [("base", 0.0)])
    assert 0 < started_long_ago < whole
    assert whole - started_long_ago == pytest.approx(0.95 * 30, rel=0.1)  # the start of Ray Train dominates


def test_the_stages_of_a_trial_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = estimate(tmp_path)
    before = known.seconds_left([FULL, PRUNED], 1, None, ())
    monkeypatch.setattr("effir_ray.search.time_estimate.trial_stages", None)
    assert known.seconds_left([FULL, PRUNED], 1, None, ()) == before
