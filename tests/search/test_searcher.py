"""What the study makes of Tune's events."""

from pathlib import Path

import pytest

from effir_ray.cluster.lost import pause_seconds
from effir_ray.errors import InputError, LostProcess, TrialFailure
from effir_ray.leases import LEASES
from effir_ray.mirrors import Mirror
from effir_ray.results import store
from effir_ray.search.dry_run import load_backbones
from effir_ray.search.folder import exclusive
from effir_ray.search.proposals import Proposals
from effir_ray.search.searcher import (
    ABORT,
    FILE,
    LOST,
    MAX_LOSSES,
    ROW,
    UNFIT,
    ScheduleSearcher,
    StillHeld,
)
from effir_ray.search.trial_config import TrialConfig
from tests.helpers.search_examples import row, small_space


@pytest.fixture
def searcher(tmp_path: Path) -> ScheduleSearcher:
    space = small_space(schedules=[{"drop_mlp": 1}, {"drop_block": 1}])
    proposals = Proposals(space, tmp_path, [], load_backbones(space))
    return ScheduleSearcher(proposals, Mirror(tmp_path), lambda work, row: None)


def start(searcher: ScheduleSearcher, name: str) -> TrialConfig:
    suggestion = searcher.suggest(name)
    assert isinstance(suggestion, dict)
    return TrialConfig.model_validate_json(suggestion["trial"])


def end(searcher: ScheduleSearcher, name: str, config: TrialConfig, ndcg: float | None) -> None:
    done = row(config, ndcg)
    file = store.append(searcher.out, [done]).name
    searcher.on_trial_complete(name, {ROW: done.model_dump_json(), FILE: file})


@pytest.mark.parametrize(
    ("result", "reason"),
    [(None, "without a result"), ({LOST: "an encoding worker died"}, "an encoding worker died, 4 times")],
)
def test_a_trial_that_lost_a_process_is_tried_again_after_a_pause_and_then_fails(
    searcher: ScheduleSearcher,
    monkeypatch: pytest.MonkeyPatch,
    result: dict[str, object] | None,
    reason: str,
) -> None:
    now = [0.0]
    monkeypatch.setattr("effir_ray.search.searcher.time.monotonic", lambda: now[0])
    end(searcher, "a", start(searcher, "a"), 0.5)
    lost = start(searcher, "0")
    for failures in range(1, MAX_LOSSES + 1):
        searcher.on_trial_complete(str(failures - 1), result, error=result is None)
        if failures == 1:  # others run meanwhile
            end(searcher, "c", start(searcher, "c"), 0.4)
        assert searcher.suggest("too early") is None
        now[0] += pause_seconds(failures)
        again = searcher.suggest(str(failures))
        assert isinstance(again, dict)
        assert (again["attempt"], again["trial"]) == (failures + 1, lost.model_dump_json())
    assert {row["status"] for row in store.read([searcher.out]).to_pylist()} == {"ok"}
    searcher.on_trial_complete(str(MAX_LOSSES), result, error=result is None)
    (failed,) = [row for row in store.read([searcher.out]).to_pylist() if row["status"] != "ok"]
    assert (failed["status"], failed["attempt"]) == ("failed", MAX_LOSSES + 1)
    assert reason in failed["reason"]
    assert searcher.fatal is None


def test_a_process_that_dies_after_its_row_has_not_failed(searcher: ScheduleSearcher) -> None:
    written = row(start(searcher, "a"), 0.5)
    store.append(searcher.out, [written])
    searcher.on_trial_complete("a", None, error=True)
    assert searcher.proposals.rows[written.trial_id, "dev"].ndcg_at_10 == 0.5
    assert len(store.read([searcher.out])) == 1
    assert searcher.fatal is None


def test_a_failed_trial_is_passed_over(searcher: ScheduleSearcher) -> None:
    end(searcher, "a", start(searcher, "a"), 0.5)
    end(searcher, "b", start(searcher, "b"), None)
    assert searcher.fatal is None
    assert start(searcher, "c").name == "1B"


def test_without_the_full_model_there_is_no_study(searcher: ScheduleSearcher) -> None:
    end(searcher, "a", start(searcher, "a"), None)
    assert isinstance(searcher.fatal, TrialFailure)
    assert searcher.suggest("b") == ScheduleSearcher.FINISHED


def test_wrong_input_stops_the_study_without_a_row(searcher: ScheduleSearcher) -> None:
    end(searcher, "a", start(searcher, "a"), 0.5)
    start(searcher, "b")
    searcher.on_trial_complete("b", {ABORT: "no disk space left"})
    assert isinstance(searcher.fatal, InputError)
    assert searcher.suggest("c") == ScheduleSearcher.FINISHED
    assert not searcher.proposals.done("dev") > 1


def test_a_search_whose_folder_another_took_over_ends(tmp_path: Path) -> None:
    with exclusive(Mirror(tmp_path)) as held:
        asked = StillHeld(held)
        (tmp_path / LEASES / held.key).with_suffix(".2").write_text("{}")
        with pytest.raises(LostProcess, match="another process took this work over"):
            asked.stop_all()


def test_a_row_that_is_not_in_the_studys_own_folder_ends_it(
    searcher: ScheduleSearcher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A folder of the same name on another node has it."""
    monkeypatch.setattr("effir_ray.search.searcher._SIGHT_SECONDS", 0.0)
    done = row(start(searcher, "a"), 0.5)
    file = store.append(tmp_path / "elsewhere", [done]).name
    searcher.on_trial_complete("a", {ROW: done.model_dump_json(), FILE: file})
    assert isinstance(searcher.fatal, InputError)
    assert "on another node" in str(searcher.fatal)
    assert searcher.proposals.done("dev") == 0


def test_no_work_goes_to_a_node_that_was_unfit(searcher: ScheduleSearcher) -> None:
    start(searcher, "a")
    searcher.on_trial_complete("a", {LOST: "node left: no space in /tmp", UNFIT: "0123"})
    suggestion = searcher.suggest("b")
    assert isinstance(suggestion, dict)
    assert suggestion["avoid"] == ["0123"]
