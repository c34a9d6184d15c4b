"""Whole runs some process of which is killed on the way: they go on from their checkpoints."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray

from effir_ray.cluster.connection import connect
from effir_ray.errors import LostProcess
from effir_ray.models.retriever import load_retriever
from effir_ray.stages import StageStore
from effir_ray.training.run import launcher
from effir_ray.training.run.history import HistoryWriter, read_history
from effir_ray.training.run.launcher import TrainResult, train
from tests.helpers.lost_node import lose_a_node
from tests.helpers.training_runs import (
    STEPS,
    first_steps,
    has_step,
    kill_a_worker,
    losses,
    settings,
    wait_for,
    when,
)

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


def test_a_killed_worker_is_replaced_and_the_loss_curve_is_the_same(
    dataset: Path, uninterrupted: TrainResult, tmp_path: Path
) -> None:
    with when(partial(has_step, tmp_path / "out", 4), kill_a_worker):
        result = train("random:llama", settings(dataset), tmp_path / "out")
    assert losses(result) == pytest.approx(losses(uninterrupted), rel=1e-4)
    assert first_steps(tmp_path / "out") == 1


@pytest.mark.parametrize("victim", ["worker", "controller"])
def test_a_process_that_dies_before_it_trains_is_replaced(
    victim: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Train calls it an error of its controller. Every CPU is asked for: none may stay reserved."""
    flag = tmp_path / "killed"

    def trainer(*arguments: Any) -> Any:
        made = plain(*arguments)
        config = made.backend_config

        class Backend(config.backend_cls):
            def meet(self, worker_group: Any, backend_config: Any) -> None:
                if not flag.exists():
                    flag.touch()
                    if victim == "controller":
                        os.kill(os.getpid(), signal.SIGKILL)
                    worker_group.execute_single(0, lambda: os.kill(os.getpid(), signal.SIGKILL))
                super().meet(worker_group, backend_config)

        config.__class__ = type("Config", (type(config),), {"backend_cls": Backend})
        return made

    plain = launcher._trainer
    monkeypatch.setattr(launcher, "_trainer", trainer)
    connect()
    config = settings(dataset, steps=2, cpus_per_worker=ray.cluster_resources()["CPU"])
    result = train("random:llama", config, tmp_path / "out")
    assert flag.exists()
    assert [row["step"] for row in result.history] == [1, 2]


def test_rows_that_came_with_a_checkpoint_outlive_a_controller_that_did_not_write_them(
    dataset: Path, uninterrupted: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag = tmp_path / "killed"

    class Writer(HistoryWriter):
        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            if checkpoint is not None and not flag.exists():
                flag.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            super().after_report(run_context, metrics, checkpoint)

    monkeypatch.setattr(launcher, "HistoryWriter", Writer)
    result = train("random:llama", settings(dataset), tmp_path / "out")
    assert flag.exists()
    assert losses(result) == pytest.approx(losses(uninterrupted), rel=1e-4)


def test_a_killed_driver_goes_on_where_it_was(
    dataset: Path, uninterrupted: TrainResult, object_store: str, tmp_path: Path
) -> None:
    """With its checkpoints in an object store; the run that was out of memory has them in a folder."""
    out, config = tmp_path / "out", settings(dataset, storage_path=object_store.format("kept"))
    script = (
        "import sys; from pathlib import Path; from effir_ray.training.run.launcher import train;"
        "from effir_ray.training.config import TrainConfig;"
        "train('random:llama', TrainConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", script, config.model_dump_json(), str(out)]
    driver = subprocess.Popen(command, start_new_session=True)
    wait_for(partial(has_step, out, 4))
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    before = len(read_history(out / "history.jsonl"))
    assert not (out / "checkpoint").exists() and before < STEPS
    result = train("random:llama", config, out)
    assert losses(result) == pytest.approx(losses(uninterrupted), rel=1e-4)
    assert first_steps(out) == 1
    load_retriever(str(result.checkpoint))
    again = train("random:llama", config, out)
    assert again.history == result.history


def test_a_run_whose_stage_another_process_took_over_writes_nothing_more(
    dataset: Path, tmp_path: Path
) -> None:
    store = StageStore(tmp_path)
    out = store.path("recovered", {}).with_suffix(".tmp")

    def build(folder: Path) -> None:
        train("random:llama", settings(dataset), folder, stages=store)

    def take_over() -> None:
        (holder,) = (tmp_path / "locks").glob("recovered-*.1")
        holder.with_suffix(".2").write_text("{}")

    with (
        when(partial(has_step, out, 4), take_over),
        pytest.raises(LostProcess, match="another process took this work over"),
    ):
        store.run("recovered", {}, build, resumable=True)
    assert not (out / "checkpoint").exists()
    assert len(read_history(out / "history.jsonl")) < STEPS
    assert not (tmp_path / "runs.log").exists()


def test_a_lost_node_is_replaced_and_the_loss_curve_is_the_same(
    dataset: Path, uninterrupted: TrainResult, tmp_path: Path
) -> None:
    out, config = tmp_path / "out", settings(dataset)
    lose_a_node(partial(train, "random:llama", config, out), partial(has_step, out, 4))
    result = train("random:llama", config, out)
    assert losses(result) == pytest.approx(losses(uninterrupted), rel=1e-4)
