"""Whole runs through Ray Train and DeepSpeed, some of which are killed on the way."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch

from effir_ray.cluster.connection import connect
from effir_ray.data.pairs import load_pairs, write_pairs
from effir_ray.encoding.encoder import Encoder
from effir_ray.errors import InputError, TrialFailure
from effir_ray.models.checkpoint import save_checkpoint
from effir_ray.models.retriever import load_retriever
from effir_ray.training.config import TrainConfig
from effir_ray.training.run import fault_tolerance, launcher, loop
from effir_ray.training.run.history import HistoryWriter, read_history
from effir_ray.training.run.launcher import TrainResult, train
from effir_ray.training.step.gradcache import ContrastiveStep
from tests.helpers.lost_node import lose_a_node

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

STEPS = 24


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BEIR folder of 80 short documents, each with a query that asks for its number."""
    folder = tmp_path_factory.mktemp("numbers")
    (folder / "qrels").mkdir()
    documents = ({"_id": f"d{i}", "title": "", "text": f"entry {i} of {i * 7 % 80}"} for i in range(80))
    queries = ({"_id": f"q{i}", "text": f"which entry is number {i}"} for i in range(80))
    for name, rows in (("corpus", documents), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for split, numbers in (("train", range(60)), ("dev", range(60, 70)), ("test", range(70, 80))):
        lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in numbers)]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def settings(dataset: Path, **changes: object) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "dataset": str(dataset),
            "hard_negatives": 0,
            "steps": STEPS,
            "batch_size": 8,
            "learning_rate": 1e-3,
            "lora": None,
            "checkpoint_every": 3,
            **changes,
        }
    )


def losses(result: TrainResult) -> list[float]:
    assert [row["step"] for row in result.history] == list(range(1, STEPS + 1))
    return [row["loss"] for row in result.history]


def first_steps(out: Path) -> int:
    """How often the run in ``out`` began at its first step: once, if it went on from its checkpoints."""
    lines = (out / "history.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines].count(1)


def training_workers() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # ended meanwhile
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def kill_a_worker() -> None:
    """One rank: if there is another, it is left waiting inside a collective."""
    training_workers()[0].kill()


@pytest.fixture(scope="module")
def uninterrupted(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return train("random:llama", settings(dataset), tmp_path_factory.mktemp("whole") / "out")


def test_a_run_learns_and_leaves_an_ordinary_checkpoint(uninterrupted: TrainResult) -> None:
    assert uninterrupted.engine == "DeepSpeed ZeRO-2"
    curve = losses(uninterrupted)
    assert sum(curve[-4:]) < 0.8 * sum(curve[:4])
    assert load_retriever(str(uninterrupted.checkpoint)).plan.layers
    assert not list(uninterrupted.checkpoint.parent.glob("run/*")), "the run's own checkpoints are left over"


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


def test_out_of_memory_goes_on_with_half_the_budget(
    dataset: Path, uninterrupted: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once in a step, and Ray Train starts the worker again; once in the dev score, past ``max_failures``."""

    def worker(job: dict[str, Any]) -> dict[str, Any]:
        from effir_ray.training.run.monitoring import DevScore

        fault_tolerance.CHECKPOINT_SECONDS = 0.0
        exhausted_once(ContrastiveStep, 6)
        exhausted_once(DevScore, 1)
        return loop.train_worker(job)

    def exhausted_once(kind: Any, call: int) -> None:
        calls, plain, flag = itertools.count(1), kind.__call__, tmp_path / kind.__name__

        def __call__(self: Any, *arguments: Any) -> Any:
            if next(calls) == call and not flag.exists():
                flag.touch()
                torch.empty(1 << 50)
            return plain(self, *arguments)

        kind.__call__ = __call__

    with monkeypatch.context() as patch:
        patch.setattr(launcher, "train_worker", worker)  # pickled by value: the worker's module has its own
        config = settings(
            dataset,
            token_budget=1024,
            max_failures=1,
            checkpoint_every=None,
            dev={"every": 8, "queries": 10, "documents": 40},
        )
        result = train("random:llama", config, tmp_path / "out")
    notes = {row["step"]: row["note"] for row in result.history if "note" in row}
    assert notes == {
        5: "out of memory: token budget halved to 512",
        7: "out of memory: token budget halved to 256",
    }
    assert losses(result) == pytest.approx(losses(uninterrupted), rel=1e-4)
    assert first_steps(tmp_path / "out") == 1


def test_a_lost_node_is_replaced_and_the_loss_curve_is_the_same(
    dataset: Path, uninterrupted: TrainResult, tmp_path: Path
) -> None:
    out, config = tmp_path / "out", settings(dataset)
    lose_a_node(partial(train, "random:llama", config, out), partial(has_step, out, 4))
    result = train("random:llama", config, out)
    assert losses(result) == pytest.approx(losses(uninterrupted), rel=1e-4)


def test_names_of_files_are_relative_to_where_the_call_is_made(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(load_retriever("random:llama"), tmp_path / "model")
    (tmp_path / "data").symlink_to(dataset)
    monkeypatch.chdir(tmp_path)
    config = settings(Path("data"), steps=2, storage_path="kept", dev={"every": 2, "dataset": "data"})
    result = train("model", config, Path("out"))
    assert result.checkpoint == tmp_path / "out" / "checkpoint"
    assert result.history[-1]["dev_ndcg_at_10"] >= 0
    assert not list((tmp_path / "kept").glob("*/model"))


def test_two_workers_zero3_lora_mined_negatives_and_the_best_dev_score(dataset: Path, tmp_path: Path) -> None:
    """And once more with a rank killed on the way."""
    config = settings(
        dataset,
        workers=2,
        zero_stage=3,
        lora={"r": 4, "alpha": 8},
        negatives="bm25",
        hard_negatives=2,
        token_budget=128,
        dev={"every": 6, "queries": 10, "documents": 40},
        checkpoint_every=None,
        keep_checkpoints=2,
    )
    whole = train("random:llama", config, tmp_path / "whole")
    assert whole.engine == "DeepSpeed ZeRO-3"
    scores = {row["step"]: row["dev_ndcg_at_10"] for row in whole.history if "dev_ndcg_at_10" in row}
    assert list(scores) == [6, 12, 18, 24]
    assert scores[whole.step] == max(scores.values())
    load_retriever(str(whole.checkpoint))
    with when(partial(has_step, tmp_path / "killed", 8), kill_a_worker):
        killed = train("random:llama", config, tmp_path / "killed")
    assert losses(killed) == pytest.approx(losses(whole), rel=1e-4)
    assert first_steps(tmp_path / "killed") == 1


def test_a_teachers_embeddings_of_a_stream_pull_the_student_to_them(
    dataset: Path, uninterrupted: TrainResult, tmp_path: Path
) -> None:
    pairs = load_pairs(dataset)
    (tmp_path / "pairs").mkdir()
    write_pairs(pairs[:25], tmp_path / "pairs" / "a.jsonl")
    write_pairs(pairs[25:], tmp_path / "pairs" / "b.jsonl")
    config = settings(
        tmp_path / "pairs",
        held_out=str(dataset),
        workers=2,
        distillation={"teacher": str(uninterrupted.checkpoint), "embedding": 20.0, "similarity": 1.0},
    )
    student = train("random:llama", config, tmp_path / "student")
    queries = [pair.query for pair in pairs]
    teacher, before, after = (
        Encoder(load_retriever(str(model))).encode(queries, "query")
        for model in (uninterrupted.checkpoint, "random:llama", student.checkpoint)
    )
    distance = np.linalg.norm(before - teacher, axis=1).mean()
    assert np.linalg.norm(after - teacher, axis=1).mean() < 0.6 * distance


def test_a_diverging_run_fails_with_its_reason_and_is_not_repeated(dataset: Path, tmp_path: Path) -> None:
    config = settings(dataset, learning_rate=1e3, weight_decay=1e3)  # each step a millionfold the weights
    with pytest.raises(TrialFailure, match=r"step .*loss"):
        train("random:llama", config, tmp_path / "out")


def test_more_than_the_cluster_has_is_said_at_once(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="but the cluster has"):
        train("random:llama", settings(dataset, cpus_per_worker=4000), tmp_path / "out")


class when:
    """Calls ``action`` in the background once ``condition`` holds."""

    def __init__(self, condition: Callable[[], bool], action: Callable[[], None]) -> None:
        self._condition, self._action = condition, action
        self._acted = False
        self._thread = threading.Thread(target=self._wait, daemon=True)

    def _wait(self) -> None:
        wait_for(self._condition)
        self._action()
        self._acted = True

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exception: object) -> None:
        self._thread.join(timeout=60)
        assert self._acted, "the run ended before anything happened to it"


def has_step(out: Path, step: int) -> bool:
    return any(row["step"] >= step for row in read_history(out / "history.jsonl"))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 500
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.05)
