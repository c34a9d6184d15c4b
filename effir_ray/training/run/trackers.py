"""A run's rows in TensorBoard, MLflow and Weights & Biases; the last two are optional, by Ray's integrations.

They run where the rows are read, on the driver's machine, so workers need neither package nor credentials.
Where the trackers keep things is theirs to know: MLFLOW_TRACKING_URI, ``wandb login``, WANDB_MODE.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Protocol

from effir_ray.errors import InputError

_PROJECT = "effir-ray"
_PATIENCE = 60.0  # seconds that the end of a run waits for a tracker

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


class TensorBoard:
    """Event files that ``tensorboard --logdir`` shows while training runs. A context manager."""

    def __init__(self, folder: Path, *, purge_from: int | None = None) -> None:
        """``purge_from``: a resumed run hides the events from this step on that a killed run had written."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=purge_from)

    def on_row(self, row: Mapping[str, Any]) -> None:
        for name, value in numbers(row).items():
            self._writer.add_scalar(f"train/{name}", value, row["step"])
        self._writer.flush()

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()


class _Logged:
    """Sends rows in a thread of its own, since a server may take its time; training goes on without a tracker
    that stops answering, and ends without it.
    """

    def __init__(self, tracker: str, log: Log) -> None:
        self._tracker, self._log = tracker, log
        self._rows: SimpleQueue[tuple[dict[str, float], int] | None] = SimpleQueue()
        # A daemon: a server that never answers must not keep the process.
        self._thread = threading.Thread(target=self._send, daemon=True)

    def on_row(self, row: Mapping[str, Any]) -> None:
        self._rows.put((numbers(row), row["step"]))

    def _send(self) -> None:
        while (row := self._rows.get()) is not None:
            try:
                self._log(*row)
            except Exception as error:  # each tracker has its own
                _warn(f"{self._tracker} gets no more rows: {_reason(error)}")
                return

    def __enter__(self) -> _Logged:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._rows.put(None)
        self._thread.join(_PATIENCE)
        if self._thread.is_alive():
            _warn(f"{self._tracker} took no rows for {_PATIENCE:g} s: the last ones are not there")


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


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

    def finish(ok: bool) -> None:
        """It talks to a process of W&B's own, for as long as that takes."""
        thread = threading.Thread(target=run.finish, kwargs={"exit_code": 0 if ok else 1}, daemon=True)
        thread.start()
        thread.join(_PATIENCE)
        if thread.is_alive():
            raise TimeoutError(f"no answer in {_PATIENCE:g} s")

    with _ended("wandb", finish):
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
            _warn(f"{tracker} was not told of the end: {_reason(error)}")


_OPENERS = {"mlflow": _mlflow, "wandb": _wandb}


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """What can be plotted of a row, without the counters."""
    return {
        name: value
        for name, value in row.items()
        if isinstance(value, int | float) and name not in ("step", "steps")
    }
