"""What a run keeps and reads back; the runs that are really killed are in ``test_killed_runs``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.train
import torch

from effir_ray.models.retriever import load_retriever
from effir_ray.training.config import TrainConfig
from effir_ray.training.run import fault_tolerance
from effir_ray.training.run.fault_tolerance import (
    OutOfMemory,
    StepReports,
    halved_budget,
    halving,
)
from effir_ray.training.run.loop import hollow, write_checkpoint
from effir_ray.training.step.engine import PlainEngine
from effir_ray.training.step.text_encoder import TextEncoder


def on_a_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("too_much", [on_a_gpu, lambda: torch.empty(1 << 50), lambda: bytearray(1 << 50)])
def test_out_of_memory_halves_the_budget_of_the_next_start(
    tmp_path: Path, too_much: Callable[[], object]
) -> None:
    run = str(tmp_path / "run")
    assert halved_budget(run) is None
    with pytest.raises(OutOfMemory, match="token budget of 3000"), halving(run, 3000):
        too_much()
    assert halved_budget(run) == 1500


@pytest.mark.parametrize(
    ("seconds", "every", "expected"),
    [
        (1.0, None, []),  # nothing is lost that five minutes do not bring back
        (40.0, None, [8, 16, 24, 32]),
        (1000.0, None, [4, 8, 12, 16, 20, 24, 28, 32, 36]),
        (1.0, 15, [15, 30]),
    ],
)
def test_checkpoints_are_due_after_a_tenth_of_the_run_and_five_minutes(
    seconds: float,
    every: int | None,
    expected: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are put together beside the run's storage, where nothing of that stays."""
    now, written, run = [0.0], [], tmp_path / "run"
    (run / "staging-0").mkdir(parents=True)
    (run / "staging-0" / "left by a killed worker").touch()

    def report(metrics: dict[str, Any], checkpoint: Any) -> None:
        if checkpoint is not None:
            assert Path(checkpoint.path).parent == run
            assert torch.load(Path(checkpoint.path) / "state.pt")["weights"]
            written.append(metrics["step"])

    monkeypatch.setattr(fault_tolerance, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(ray.train, "report", report)  # there is no Ray Train around this process
    config = TrainConfig(dataset="unused", checkpoint_every=every)
    engine = PlainEngine(TextEncoder(load_retriever("random:llama")), config, torch.device("cpu"), False)
    reporter = StepReports(engine, config, str(run), fault_tolerance.staging(str(run), str(tmp_path)))
    assert not list(run.iterdir())
    for step in range(1, 41):
        now[0] += seconds
        reporter({"step": step, "steps": 40})
    assert written == expected
    assert not list(run.iterdir())


@pytest.mark.parametrize("seen", [True, False])
def test_what_goes_to_an_object_store_is_put_together_where_only_this_user_looks(
    seen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below the output folder, or in the cache of a machine that does not see it, not in a temporary one."""
    out, cache, temporary = (tmp_path / name for name in ("out", "cache", "temporary"))
    for folder in (out, temporary):
        folder.mkdir()
    if seen:
        (out / fault_tolerance.SETTINGS).touch()
    monkeypatch.setenv("EFFIR_RAY_CACHE", str(cache))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    run, places = f"{(tmp_path / 'store').as_uri()}/0123456789ab", []

    def report(metrics: dict[str, Any], checkpoint: Any) -> None:
        places.append(Path(checkpoint.path))
        assert places[-1].stat().st_mode & 0o777 == 0o700

    monkeypatch.setattr(ray.train, "report", report)
    config = TrainConfig(dataset="unused", checkpoint_every=1)
    retriever = load_retriever("random:llama")
    engine = PlainEngine(TextEncoder(retriever), config, torch.device("cpu"), False)
    place = fault_tolerance.staging(run, str(out))
    StepReports(engine, config, run, place)({"step": 1, "steps": 2})
    write_checkpoint(engine, hollow(retriever), f"{run}/model", place)
    assert [folder.parent for folder in places] == [out if seen else cache / "staging" / "0123456789ab"]
    assert (tmp_path / "store" / "0123456789ab" / "model" / "model.safetensors").is_file()
    assert not list(out.glob("staging-*")) and not list(temporary.iterdir())


def test_other_errors_leave_the_budget_alone(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shape"), halving(str(tmp_path), 3000):
        raise RuntimeError("shape mismatch")
    assert halved_budget(str(tmp_path)) is None
