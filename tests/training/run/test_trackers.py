"""Rows in the real MLflow and Weights & Biases, both without a server."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from effir_ray.errors import InputError
from effir_ray.training.run import trackers
from effir_ray.training.run.trackers import check_installed, tracked

ROWS = [
    {"step": step, "steps": 2, "loss": 3.0 - step, "mfu": 0.5, "engine": "DDP", "note": "x"}
    for step in (1, 2)
]
SETTINGS = {"model": "m", "lora": {"r": 4}, "learning_rate": 1e-4}


def test_mlflow_has_the_curve_and_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    place = (tmp_path / "mlruns").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    with tracked(["mlflow"], "small", "abc", SETTINGS) as (board,):
        for row in ROWS:
            board.on_row(row)
    client = MlflowClient(place)
    (experiment,) = [each for each in client.search_experiments() if each.name == "effir-ray"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("small", "FINISHED")
    assert run.data.params["learning_rate"] == "0.0001"
    assert set(run.data.metrics) == {"loss", "mfu"}
    curve = client.get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in curve] == [(1, 2.0), (2, 1.0)]


def test_wandb_has_the_curve_and_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    with tracked(["wandb"], "small", "abc", SETTINGS) as (board,):
        for row in ROWS:
            board.on_row(row)
    (written,) = tmp_path.glob("wandb/offline-run-*/run-abc.wandb")
    deadline = time.monotonic() + 60
    while b"loss" not in (content := written.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.05)  # offline, W&B's own process still writes when the run has finished
    assert b"learning_rate" in content and b"loss" in content and b"engine" not in content


def test_a_tracker_that_does_not_start_is_an_input_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with (
        pytest.raises(InputError, match=r"^mlflow does not start: .*127\.0\.0\.1"),
        tracked(["mlflow"], "small", "abc", SETTINGS),
    ):
        pass


def test_training_goes_on_without_a_tracker_that_stops_answering() -> None:
    seen = []

    def log(values: dict[str, float], step: int) -> None:
        seen.append(step)
        raise ConnectionError("gone\nfor good")

    with (
        pytest.warns(RuntimeWarning, match="mlflow gets no more rows: gone$"),
        trackers._Logged("mlflow", log) as board,
    ):
        for row in ROWS:
            board.on_row(row)
    assert seen == [1]


def test_training_ends_without_a_tracker_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "_PATIENCE", 0.2)
    answer = threading.Event()
    with (
        pytest.warns(RuntimeWarning, match="mlflow took no rows for 0.2 s"),
        trackers._Logged("mlflow", lambda values, step: answer.wait()) as board,
    ):
        board.on_row(ROWS[0])
    answer.set()


def test_a_tracker_that_is_gone_at_the_end_costs_no_result() -> None:
    def end(ok: bool) -> None:
        told.append(ok)
        raise ConnectionError("gone")

    told: list[bool] = []
    with pytest.warns(RuntimeWarning, match="mlflow was not told of the end: gone"):
        with trackers._ended("mlflow", end):
            pass
        with pytest.raises(ValueError, match="training"), trackers._ended("mlflow", end):
            raise ValueError("training")
    assert told == [True, False]


def test_rows_join_a_run_of_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    place = (tmp_path / "mlruns").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(place)
    with mlflow.start_run() as own:
        with tracked(["mlflow"], "small", "abc", SETTINGS) as (board,):
            board.on_row(ROWS[0])
        assert mlflow.active_run().info.run_id == own.info.run_id
    assert mlflow.get_run(own.info.run_id).data.metrics["loss"] == 2.0


def test_unknown_and_missing_trackers(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="there is no tracker 'neptune'; there are mlflow, wandb"):
        check_installed(["neptune"])
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"mlflow is not installed here; pip install mlflow"):
        check_installed(["mlflow"])
