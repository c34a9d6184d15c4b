"""Processes that Ray lost: which errors say so, and how long to wait before the work is tried again.

A killed process, one without memory or a node that is gone says nothing about the work: it is tried again.
An error that the work itself raised would only come again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from effir_ray.errors import InputError, LostProcess, TrialFailure

FIRST_PAUSE = 2.0  # seconds; doubled with every further try

_NEEDED = ("raylet", "gcs_server")

_PARTS = ("cause", "controller_failure", "health_check_failure", "__cause__", "__context__")
"""Where errors of Ray, Ray Train and Python keep the one they came from."""


def is_lost_process(error: BaseException) -> bool:
    """Whether ``error``, or one it came from, says that a process or a node is gone."""
    from ray import exceptions
    from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError

    kinds = (
        LostProcess,
        exceptions.WorkerCrashedError,
        exceptions.RayActorError,
        exceptions.NodeDiedError,
        exceptions.LocalRayletDiedError,
        exceptions.ObjectLostError,
        exceptions.OutOfMemoryError,  # its memory monitor killed the process
        exceptions.RpcError,
        exceptions.TaskPlacementGroupRemoved,
        exceptions.ActorPlacementGroupRemoved,
        WorkerGroupStartupFailedError,
    )
    return any(
        isinstance(part, kinds) and not getattr(part, "actor_init_failed", False) for part in _parts(error)
    )


@contextmanager
def in_one_line(work: str) -> Iterator[None]:
    """What Ray raises within it while it does ``work`` comes out as one line: our own errors as the processes
    there raised them, a lost process as LostProcess, anything else without the other process's traceback."""
    from ray.exceptions import RayError

    try:
        yield
    except RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, InputError | TrialFailure | LostProcess):
            raise cause from None
        if is_lost_process(error):
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise LostProcess(
                f"{work}: a process was lost (killed, out of memory, or its node gone); run it again to "
                f"go on ({reason.strip()})"
            ) from error
        if cause is None or isinstance(cause, RayError):
            raise
        raise cause from None


def check_local_processes() -> None:
    """Raise LostProcess when a process of the Ray that this process started is gone.

    Whoever waits for such a Ray waits for ever, or is ended by it after a minute. Nothing is known of a
    cluster that was there before.
    """
    from ray._private import worker

    node = worker._global_node
    if node is not None and (dead := [name for name, _ in node.dead_processes()]):
        raise LostProcess(f"Ray's own {' and '.join(dead)} ended")


def pause_seconds(failures: int) -> float:
    """How long to wait before the next try, after so many failures in a row."""
    return float(FIRST_PAUSE * 2 ** (failures - 1))


def _parts(error: BaseException) -> Iterator[BaseException]:
    """``error`` and every error it came from, each once."""
    seen: dict[int, BaseException] = {}
    todo: list[Any] = [error]
    while todo:
        part = todo.pop()
        if not isinstance(part, BaseException) or id(part) in seen:
            continue
        seen[id(part)] = part
        todo += [getattr(part, name, None) for name in _PARTS]
        todo += getattr(part, "worker_failures", {}).values()
    yield from seen.values()
