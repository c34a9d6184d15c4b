"""Progress is silent by default, plain lines in a pipe."""

import io

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


@pytest.mark.parametrize("seconds, text", [(5, "5 s"), (95, "1 min 35 s"), (7320, "2 h 2 min")])
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text
