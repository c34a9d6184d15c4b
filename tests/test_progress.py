"""Progress is silent by default, plain lines in a pipe."""

import io
import time

import pytest

from effir_ray.progress import duration, progress, show_progress


def test_the_library_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("Working", total=2) as bar:
        bar.advance(2)
    assert capsys.readouterr() == ("", "")


def test_a_finished_piece_of_work_leaves_its_figures() -> None:
    stream = io.StringIO()
    with show_progress(stream), progress("Encoding", total=4, unit="docs") as bar:
        bar.advance(1)
        bar.advance(3, loss=0.25)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("Encoding 4/4 docs, ") and lines[0].endswith("loss 0.25")


def test_what_an_earlier_run_did_is_no_speed_of_this_one() -> None:
    with progress("Training", total=1200, unit="steps") as bar:
        bar.started = time.monotonic() - 10
        bar.go_on_from(360)
        assert bar.line() == "Training 360/1200 steps"
        bar.advance(40)
        assert bar.line() == "Training 400/1200 steps, 4 steps/s, 3 min 20 s left"


@pytest.mark.parametrize("seconds, text", [(5, "5 s"), (95, "1 min 35 s"), (7320, "2 h 2 min")])
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text
