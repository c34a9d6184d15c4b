"""A run's rows in MLflow and Weights & Biases, through Ray's integrations; both are optional packages.

They run where the rows are read, on the driver's machine, so workers need neither package nor credentials.
Where the trackers keep things is theirs to know: MLFLOW_TRACKING_URI, ``wandb login``, WANDB_MODE.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any, Protocol

from effir_ray.errors import InputError

_PROJECT = "effir-ray"


Log = Callable[[dict[str, float], int], object]  # values, step


def check_installed(trackers: Collection[str]) -> None:
    """Raise InputError for a tracker that does not exist or is not installed."""
    for name in trackers:
        if name not in _OPENERS:
            raise InputError(f"there is no tracker '{name}'; there are {', '.join(_OPENERS)}")
        if find_spec(name) is None:
            raise InputError(f"{name} is not installed here; pip install {name}, or leave it out of --track")


class Board(Protocol):
    """Takes rows as they come."""

    def on_row(self, row: Mapping[str, Any]) -> None: ...


@contextmanager
def tracked(
    trackers: Collection[str], name: str, run_id: str, settings: Mapping[str, Any]
) -> Iterator[list[Board]]:
    """Boards for the run ``name``, open within this context. ``settings`` become its parameters.

    With W&B a resumed run (the same ``run_id``) goes on; MLflow gets another run of the same name. Raises
    InputError when a tracker cannot be reached at the start; later it is left out with a warning.
    """
    with ExitStack() as opened:
        boards: list[Board] = []
        for tracker in trackers:
            try:
                log = opened.enter_context(_OPENERS[tracker](name, run_id, settings))
            except Exception as error:  # each tracker has its own
                raise InputError(f"{tracker} does not start: {_reason(error)}") from error
            boards.append(opened.enter_context(_Logged(tracker, log)))
        yield boards


class _Logged:
    """Sends rows in a thread of its own, since a server may take its time; training goes on without a tracker
    that stops answering.
    """

    def __init__(self, tracker: str, log: Log) -> None:
        self._tracker, self._log = tracker, log
        self._works = True
        self._thread = ThreadPoolExecutor(1)

    def on_row(self, row: Mapping[str, Any]) -> None:
        self._thread.submit(self._send, numbers(row), row["step"])

    def _send(self, values: dict[str, float], step: int) -> None:
        if not self._works:
            return
        try:
            self._log(values, step)
        except Exception as error:
            self._works = False
            warnings.warn(
                f"{self._tracker} gets no more rows: {_reason(error)}", RuntimeWarning, stacklevel=1
            )

    def __enter__(self) -> _Logged:
        return self

    def __exit__(self, *exception: object) -> None:
        self._thread.shutdown()


def _reason(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


@contextmanager
def _mlflow(name: str, run_id: str, settings: Mapping[str, Any]) -> Iterator[Log]:
    import mlflow
    from ray.air.integrations.mlflow import setup_mlflow

    callers = mlflow.active_run()  # then the rows belong there, and the caller ends it
    setup_mlflow(
        {key: str(value) for key, value in settings.items()},
        tracking_uri=os.environ.get("MLFLOW_TRACKING_URI"),
        experiment_name=os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT),
        create_experiment_if_not_exists=True,
        run_name=name,
        tags={"effir_ray.run": run_id},
    )
    opened = mlflow.active_run().info.run_id  # active in this thread only
    with _ended("mlflow", lambda ok: None if callers else mlflow.end_run("FINISHED" if ok else "FAILED")):
        yield lambda values, step: mlflow.log_metrics(values, step=step, run_id=opened)


@contextmanager
def _wandb(name: str, run_id: str, settings: Mapping[str, Any]) -> Iterator[Log]:
    from ray.air.integrations.wandb import setup_wandb

    project = os.environ.get("WANDB_PROJECT", _PROJECT)
    run: Any = setup_wandb(dict(settings), trial_id=run_id, trial_name=name, project=project)
    with _ended("wandb", lambda ok: run.finish(exit_code=0 if ok else 1)):
        yield lambda values, step: run.log(values, step=step)


@contextmanager
def _ended(tracker: str, end: Callable[[bool], object]) -> Iterator[None]:
    """Calls ``end`` with whether all went well; a tracker that cannot be told costs no result."""
    ok = False
    try:
        yield
        ok = True
    finally:
        try:
            end(ok)
        except Exception as error:
            warnings.warn(
                f"{tracker} was not told of the end: {_reason(error)}", RuntimeWarning, stacklevel=2
            )


_OPENERS = {"mlflow": _mlflow, "wandb": _wandb}


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """What can be plotted of a row, without the counters."""
    return {
        name: value
        for name, value in row.items()
        if isinstance(value, int | float) and name not in ("step", "steps")
    }
