"""The rows of a run as they are read back."""

from __future__ import annotations

from pathlib import Path

from effir_ray.training.run.history import read_history


def test_steps_done_again_after_a_restart_replace_the_first(tmp_path: Path) -> None:
    file = tmp_path / "history.jsonl"
    file.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 2, "loss": 2.5}\n{"step": 3')
    assert read_history(file) == [{"step": 1, "loss": 3}, {"step": 2, "loss": 2.5}]
