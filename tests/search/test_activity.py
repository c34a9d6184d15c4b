"""What trial processes tell the driver."""

from pathlib import Path

from effir_ray.mirrors import Mirror
from effir_ray.progress import progress
from effir_ray.search.activity import current, remove_leftovers, reporting


def test_the_driver_sees_stage_and_progress_until_the_trial_ends(tmp_path: Path) -> None:
    assert current(Mirror(tmp_path)) == []
    with reporting(Mirror(tmp_path), "3f2a", "2M", "dev") as report:
        report("embeddings")
        with progress("Encoding", total=4, unit="docs") as bar:
            bar.advance(4)
        (activity,) = current(Mirror(tmp_path))
        assert (activity.trial, activity.split, activity.stage) == ("2M", "dev", "embeddings")
        assert activity.detail.startswith("Encoding 4/4 docs")
        report("scores")
        (activity,) = current(Mirror(tmp_path))
        assert (activity.stage, activity.detail) == ("scores", "")
    assert current(Mirror(tmp_path)) == []


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    killed = reporting(Mirror(tmp_path), "3f2a", "2M", "dev")
    killed.__enter__()("base")
    assert len(current(Mirror(tmp_path))) == 1
    remove_leftovers(Mirror(tmp_path))
    assert current(Mirror(tmp_path)) == []


def test_a_trial_that_is_tried_again_is_shown_once(tmp_path: Path) -> None:
    killed = reporting(Mirror(tmp_path), "3f2a", "2M", "dev")
    killed.__enter__()("base")
    with reporting(Mirror(tmp_path), "3f2a", "2M", "dev") as report:
        report("scores")
        assert [activity.stage for activity in current(Mirror(tmp_path))] == ["scores"]
    assert current(Mirror(tmp_path)) == []


def test_a_file_that_no_trial_has_written_is_not_shown(tmp_path: Path) -> None:
    with reporting(Mirror(tmp_path), "3f2a", "2M", "dev") as report:
        report("scores")
        for number, content in enumerate(["{", "[]", "{}", '{"trial": 5}']):
            (tmp_path / "activity" / f"{number}-dev.json").write_text(content)
        assert [activity.stage for activity in current(Mirror(tmp_path))] == ["scores"]
