"""Computing where a GPU is reserved: a process that Ray started without one must not take Ray's own."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from effir_ray.hardware import Hardware, detect
from effir_ray.progress import progress_stream, show_progress

T = TypeVar("T")

WAITING = "waiting for a GPU"


@dataclass(frozen=True, kw_only=True)
class Computed(Generic[T]):
    """``seconds``: how long it took, the wait for a GPU left out."""

    value: T
    seconds: float


def on_device(function: Callable[..., T], *arguments: Any) -> Computed[T]:
    """``function(*arguments)`` on a GPU that is reserved for it, where the cluster has GPUs; else here.

    A process that has a GPU already (a stage within a stage) uses that one. Progress goes where this
    process's goes, if that is a file that the other process sees. Raises what ``function`` raises.
    """
    if "ray" not in sys.modules:  # no part of any cluster
        return _timed(function, *arguments)
    import ray

    if not ray.is_initialized() or not _gpus() or ray.get_runtime_context().get_accelerator_ids().get("GPU"):
        return _timed(function, *arguments)
    log = _log()
    if log is not None and ray.available_resources().get("GPU", 0) < 1:
        with log.open("a") as lines:
            lines.write(f"{WAITING}\n")
    # Without a strategy of its own the task would have to fit into the reservation of this trial, a sliver
    # of a CPU. A lost one is the trial's to try again.
    task = ray.remote(num_cpus=0, num_gpus=1, max_retries=0, scheduling_strategy="DEFAULT")(_there)
    try:
        found: Computed[T] = ray.get(task.remote(log, function, *arguments))
    except ray.exceptions.RayTaskError as error:
        if error.cause is None or isinstance(error.cause, ray.exceptions.RayError):
            raise
        raise error.cause from None
    return found


def machine() -> Hardware:
    """What stages compute on: a GPU's process where the cluster has any, else this machine."""
    return on_device(detect).value


def _there(log: Path | None, function: Callable[..., T], *arguments: Any) -> Computed[T]:
    with ExitStack() as stack:
        if log is not None and log.parent.is_dir():  # a machine that sees the same disk
            stack.enter_context(show_progress(stack.enter_context(log.open("a", buffering=1))))
        return _timed(function, *arguments)


def _timed(function: Callable[..., T], *arguments: Any) -> Computed[T]:
    started = time.monotonic()
    value = function(*arguments)
    return Computed(value=value, seconds=time.monotonic() - started)


def _log() -> Path | None:
    name = getattr(progress_stream(), "name", None)
    return Path(name) if isinstance(name, str) and Path(name).is_file() else None


def _gpus() -> float:
    import ray

    return float(ray.cluster_resources().get("GPU", 0))
