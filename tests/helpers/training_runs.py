"""A small training run, what is read from it, and what may happen to it on the way."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from effir_ray.training.config import TrainConfig
from effir_ray.training.run.history import read_history
from effir_ray.training.run.launcher import TrainResult

STEPS = 24


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
    return [row["step"] for row in rows(out)].count(1)


def rows(out: Path) -> list[dict[str, Any]]:
    """Every row as it was written, those of repeated steps too."""
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


def processes(name: str) -> list[psutil.Process]:
    """Of the Ray that this process has started; ``name`` is part of what Ray calls them."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # ended meanwhile
            if name in " ".join(process.cmdline()):
                found.append(process)
    return found


def kill_a_worker() -> None:
    """One rank: if there is another, it is left waiting inside a collective."""
    processes("RayTrainWorker")[0].kill()


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


def ran_with(out: Path, workers: int) -> bool:
    return any(row["workers"] == workers for row in read_history(out / "history.jsonl"))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 500
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.05)
